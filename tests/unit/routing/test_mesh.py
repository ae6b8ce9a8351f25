"""What several instances do together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from mmcore.errors import LoadFailed
from mmcore.registry.store import Write
from mmcore.routing import ModelState
from tests.unit.routing.instances_in_memory import until
from tests.unit.routing.mesh_in_memory import Meshes, MeshMember


@pytest.fixture
async def join() -> AsyncIterator[Meshes]:
    meshes = Meshes()
    yield meshes
    await meshes.close()


def loads(*members: MeshMember) -> Counter[str]:
    return Counter(name for member in members for name in member.loader.loads)


async def test_fifty_instances_that_decide_at_once_load_as_many_copies_as_are_wanted_and_one_more_at_most(
    join: Meshes,
) -> None:
    members = [await join(f"i{number}") for number in range(50)]
    await members[0].add("m")
    await until(lambda: all("m" in member.registry.models for member in members))
    await asyncio.gather(*(member.mesh.ensure("m") for member in members))
    assert 1 <= loads(*members)["m"] <= 2
    before = loads(*members)["m"]
    await asyncio.gather(*(member.mesh.ensure("m", 4) for member in members))
    assert before <= 4 <= loads(*members)["m"] <= 5


async def test_who_asks_expressly_has_a_model_tried_again_wherever_it_failed(join: Meshes) -> None:
    members = [await join(f"i{number}") for number in range(2)]
    for member in members:
        member.loader.errors["m"] = LoadFailed("corrupt")
    await members[0].add("m")
    status = await members[0].registered.ensure_loaded("m", sync=True)
    assert status.state is ModelState.LOADING_FAILED
    await until(lambda: len(members[0].registered.status("m").errors) == 2)
    for member in members:
        del member.loader.errors["m"]
        member.clock.now += 11
    # Placement keeps away from where it failed for a minute.
    with pytest.raises(LoadFailed, match="corrupt"):
        await members[0].mesh.ensure("m")
    assert (await members[0].registered.ensure_loaded("m", sync=True)).state is ModelState.LOADED
    assert loads(*members)["m"] == 3


async def test_a_model_that_was_registered_this_moment_is_loaded_where_it_is_not_known_yet(join: Meshes) -> None:
    one, two = await join("one"), await join("two")
    await one.add("m")
    await until(lambda: "m" in two.registry.models)
    entry = two.registry.models.entry("m")
    assert entry is not None
    # As if the change had not come here yet.
    two.registry.models.drop("models/m")
    listeners = len(two.registry.models._listeners)
    load = asyncio.create_task(one.mesh.load_at("two", "m"))
    await until(lambda: len(two.registry.models._listeners) > listeners)
    two.registry.models.put("models/m", entry)
    await load
    assert two.loader.loads == ["m"]


async def test_records_that_do_not_concern_an_instance_are_not_read_when_it_starts_or_they_change(
    join: Meshes, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a million registered models an instance that starts reads none; one that it cannot read would be logged."""
    await join.store.create_missing([("models/odd", b"no record")])
    member = await join("one")
    await join.store.transact({}, [Write("models/odd", b"still none")])
    await member.add("m")
    assert not [line for line in caplog.messages if "'odd'" in line]
    assert member.registry.models.get("odd") is None
    assert [line for line in caplog.messages if "'odd'" in line]


async def test_loads_that_were_there_before_an_instance_are_known_to_it(join: Meshes) -> None:
    first = await join("first")
    gate = first.loader.gate("slow")
    await first.add("slow")
    loading = asyncio.create_task(first.mesh.ensure("slow"))
    await until(lambda: (record := first.registry.models.get("slow")) is not None and record.copies)
    await first.add("m")
    await first.mesh.ensure("m")
    await until(lambda: first.holders("m"))
    second = await join("second")
    assert second.mesh.members.cluster.reserved("slow") == ["first"]
    gate.set()
    await loading
    await until(lambda: second.holders("slow") == second.holders("m") == {"first"})
