"""Models that were used lately and are held nowhere are loaded where there is room, and nothing goes for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from mmcore.registry import CopyRecord
from mmcore.routing import filling
from tests.unit.routing.instances_in_memory import until
from tests.unit.routing.mesh_in_memory import Meshes, MeshMember

MIB = 2**20
MINUTE_MS = 60_000


@pytest.fixture
async def join() -> AsyncIterator[Meshes]:
    meshes = Meshes()
    yield meshes
    await meshes.close()


async def add(member: MeshMember, *names: str, used_ago_ms: int = MINUTE_MS) -> None:
    for number, name in enumerate(names):
        await member.add(name, used_ago_ms=used_ago_ms + 1000 * number)


def leader_of(*members: MeshMember) -> MeshMember:
    return next(member for member in members if member.registry.leader)


async def test_what_was_used_last_is_loaded_first_and_what_was_never_used_not_at_all(join: Meshes) -> None:
    # Models of 10 bytes are taken for 4 MiB before they are loaded, and a sixteenth of the room stays free.
    one = await join("one", capacity_bytes=10 * MIB)
    await add(one, "a", "b", "c", "d")
    await one.registered.register("only registered", one.info)
    await add(one, "long ago", used_ago_ms=5 * 60 * MINUTE_MS)
    assert await one.mesh.filling.waiting() == ["a", "b", "c", "d"]
    await one.mesh.filling.fill()
    # Two at a time.
    assert (sorted(one.loader.loads[:2]), sorted(one.loader.loads)) == (["a", "b"], ["a", "b", "c", "d"])
    await until(lambda: all(one.holders(name) == {"one"} for name in "abcd"))
    assert await one.mesh.filling.waiting() == []
    # It stands behind what is used from now on.
    await until(lambda: one.router.cache.oldest_idle_s)
    assert one.router.cache.oldest_idle_s == pytest.approx(60, abs=10)


async def test_a_new_instance_gets_what_has_no_room_elsewhere(join: Meshes) -> None:
    one = await join("one", capacity_bytes=25)
    await add(one, "a", "b", "c", "d")
    for name in ("a", "b"):
        await one.router.load(name)
    await until(lambda: one.holders("a") and one.holders("b"))
    await one.mesh.filling.fill()
    assert one.loader.loads == ["a", "b"]
    two = await join("two")
    await leader_of(one, two).mesh.filling.fill()
    assert (one.loader.loads, sorted(two.loader.loads)) == (["a", "b"], ["c", "d"])
    await until(lambda: one.holders("c") == one.holders("d") == {"two"})
    assert await two.mesh.filling.filled(10)


async def test_it_is_done_when_an_instance_joins_and_again_by_the_next_leader(join: Meshes) -> None:
    join.settle_s = 0.01
    one = await join("one")
    await add(one, "a")
    two = await join("two")
    await until(lambda: one.holders("a"))
    (held,) = one.holders("a")
    gone, left = (one, two) if held == "one" else (two, one)
    await join.end(gone)
    await until(lambda: left.holders("a") == {left.name})
    assert left.loader.loads == ["a"]


async def test_a_model_that_fails_is_tried_once(join: Meshes) -> None:
    one = await join("one")
    await add(one, "a", "bad")
    one.loader.errors["bad"] = ValueError("no such thing")
    await one.mesh.filling.fill()
    assert sorted(one.loader.loads) == ["a", "bad"]
    await until(lambda: one.holders("a"))
    await one.mesh.filling.fill()
    assert sorted(one.loader.loads) == ["a", "bad"]


async def test_the_copies_of_the_dead_are_none(join: Meshes) -> None:
    one = await join("one")
    await add(one, "a")
    dead = CopyRecord(state="LOADED", since_ms=1)
    await one.registry.models.update("a", lambda record: record and one.with_copies(record, {"dead": dead}))
    assert await one.mesh.filling.waiting() == ["a"]


async def test_an_instance_waits_until_it_has_what_comes_but_not_for_ever(join: Meshes) -> None:
    one = await join("one", capacity_bytes=15)
    # Alone it does not wait.
    await add(one, "a", "b")
    assert await one.mesh.filling.filled(10)
    await one.router.load("a")
    await until(lambda: one.holders("a"))
    two = await join("two")
    gate = two.loader.gate("b")
    filling = asyncio.create_task(leader_of(one, two).mesh.filling.fill())
    filled = asyncio.create_task(two.mesh.filling.filled(30))
    await until(lambda: "b" in two.loader.entered and two.loader.entered["b"].is_set())
    assert not await two.mesh.filling.filled(0.1)
    assert not filled.done()
    gate.set()
    assert await filled
    await filling
    assert two.router.lookup("b") is not None


async def test_nobody_holds_up_a_new_instance_for_long(join: Meshes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "STALLED_S", 0.2)
    one = await join("one", capacity_bytes=15)
    await add(one, "a", "b")
    await one.router.load("a")
    await until(lambda: one.holders("a"))
    two = await join("two")
    # The leader hangs: nothing comes.
    assert not await two.mesh.filling.filled(30)
    # Others that are about to leave answer for nobody.
    one.draining = True
    await one.mesh.members.announce()
    await until(lambda: (member := two.mesh.members.cluster.get("one")) and member.instance.draining)
    assert await two.mesh.filling.filled(30)


async def test_models_that_shall_have_copies_have_them_without_being_asked_for(join: Meshes) -> None:
    members = [await join(name) for name in ("one", "two", "three")]
    for name, copies in (("two copies", '{"min": 2}'), ("all", '{"everywhere": true}')):
        info = replace(members[0].info, key=f'{{"copies": {copies}}}')
        await members[0].registered.register(name, info)
    await until(lambda: len(members[0].holders("two copies")) == 2 and members[0].holders("all"))

    async def looked() -> None:
        for member in members:
            await member.mesh.upkeep.look()

    async def held(name: str, count: int) -> None:
        async with asyncio.timeout(10):
            while len(members[0].holders(name)) != count:
                await looked()
                await asyncio.sleep(0.01)

    await held("all", 3)
    members.append(await join("four"))
    await held("all", 4)
    # Fewer, and they go when there is no use for them.
    await members[0].registered.register("all", replace(members[0].info, key='{"copies": {"max": 1}}'))
    await held("all", 1)
    assert len(members[0].holders("two copies")) == 2
