"""What several instances do together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

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
