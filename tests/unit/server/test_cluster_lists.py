"""Long lists of what an instance knows keep nobody else waiting."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from mmcore.pb import cluster_pb2 as pb
from mmcore.registry import VModelRecord
from mmcore.routing import ModelState
from mmcore.routing.status import ModelStatus
from mmcore.routing.vmodels import VModelStatus
from mmcore.server.cluster import Cluster

MANY = 2000


async def test_others_have_their_turns_while_vmodels_are_listed() -> None:
    records = {f"v{number}": VModelRecord("ksp", "m", "m") for number in range(MANY)}
    loaded = ModelStatus(ModelState.LOADED)

    def status(name: str) -> VModelStatus | None:
        record = records.get(name)
        return VModelStatus(record, loaded, None) if record is not None else None

    nothing: Any = None
    registry: Any = SimpleNamespace(vmodels=records)
    vmodels: Any = SimpleNamespace(status=status)
    cluster = Cluster(registry, nothing, nothing, vmodels, nothing)
    listing = asyncio.ensure_future(cluster._list_vmodels(pb.ListRequest()))
    turns = 0
    while not listing.done():
        await asyncio.sleep(0)
        turns += 1
        # One goes while the list is made.
        records.pop(f"v{MANY - 1}", None)
    assert turns >= MANY / 100
    answer = await listing
    assert {row.name for row in answer.vmodels} == records.keys()
    assert {row.status.owner for row in answer.vmodels} == {"ksp"}
