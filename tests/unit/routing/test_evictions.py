"""What one instance evicts although it is used goes on where there is room, and nowhere else."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mmcore.routing.registered import wall_ms
from tests.unit.routing.instances_in_memory import until
from tests.unit.routing.mesh_in_memory import Meshes, MeshMember

MIB = 2**20
HOUR_MS = 3_600_000


@pytest.fixture
async def join() -> AsyncIterator[Meshes]:
    meshes = Meshes()
    yield meshes
    await meshes.close()


async def load(member: MeshMember, *names: str) -> None:
    """Load them here, and let their first moments pass."""
    for name in names:
        copy = await member.router.load(name)
        await until(lambda copy=copy, name=name: not copy.resident and member.name in member.holders(name))


async def full(join: Meshes, *, used_ago_ms: int = 0, age_ms: int = 0) -> MeshMember:
    """An instance of 25 bytes with two models that were loaded so long ago, and a third that is not loaded."""
    one = await join("one", capacity_bytes=25)
    for name in ("a", "b", "c"):
        await one.add(name, used_ago_ms=used_ago_ms)
    later = one.now_ms
    one.now_ms = lambda: wall_ms() - age_ms
    await load(one, "a", "b")
    one.now_ms = later
    return one


async def test_it_goes_on_where_there_is_room(join: Meshes) -> None:
    one = await full(join, age_ms=120_000)
    two = await join("two")
    await load(one, "c")
    await until(lambda: one.holders("c") == {"one"} and len(one.router.copies()) == 2)
    (gone,) = {"a", "b"} - {copy.name for copy in one.router.copies()}
    await until(lambda: one.holders(gone) == {"two"})
    assert two.loader.loads == [gone]


@pytest.mark.parametrize(
    ("used_ago_ms", "age_ms", "room"),
    [(2 * HOUR_MS, 120_000, 2**30), (0, 1000, 2**30), (0, 120_000, 25)],
    ids=["hardly used", "hardly there", "no room"],
)
async def test_it_just_goes_otherwise(join: Meshes, used_ago_ms: int, age_ms: int, room: int) -> None:
    one = await full(join, used_ago_ms=used_ago_ms, age_ms=age_ms)
    two = await join("two", capacity_bytes=room)
    if room == 25:
        for name in ("d", "e"):
            await two.add(name)
        await load(two, "d", "e")
        await two.mesh.members.announce()
        await until(lambda: (member := one.mesh.members.cluster.get("two")) and member.free_bytes < 10)
    before = list(two.loader.loads)
    await load(one, "c")
    (gone,) = {"a", "b"} - {copy.name for copy in one.router.copies()}
    await until(lambda: not one.holders(gone))
    await two.add("last")
    await two.router.load("last")
    # Whatever was under way has been, by the time that a request's own load has.
    assert [name for name in two.loader.loads if name not in before] == ["last"]


async def test_what_another_instance_has_too_just_goes(join: Meshes) -> None:
    one = await full(join, age_ms=120_000)
    two = await join("two")
    await load(two, "a", "b")
    await until(lambda: one.holders("a") == one.holders("b") == {"one", "two"})
    three = await join("three")
    await load(one, "c")
    (gone,) = {"a", "b"} - {copy.name for copy in one.router.copies()}
    await until(lambda: one.holders(gone) == {"two"})
    await load(three, "c")
    assert three.loader.loads == ["c"]
