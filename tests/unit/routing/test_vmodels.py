"""vmodels over real transactions: transitions by the leader, waiting for them, and two instances at once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from mmcore.errors import AlreadyExists, InvalidRequest, LoadFailed, NotFound
from mmcore.model import ModelInfo
from mmcore.registry import CopyRecord, InstanceRecord, MemoryStore, VModelRecord
from mmcore.routing import Kind, ModelState, Wanted
from mmcore.routing.vmodel_changes import in_transition, touched
from tests.unit.routing.instances_in_memory import INFO, Member, until


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def member(store: MemoryStore) -> AsyncIterator[Member]:
    made = await Member("one", store).start()
    await until(lambda: made.registry.leader)
    yield made
    await made.close()


def vmodel(member: Member, name: str = "v") -> VModelRecord:
    found = member.registry.vmodels.get(name)
    assert found is not None
    return found


async def test_requests_by_a_vmodels_name_take_the_quick_path_and_follow_it(member: Member) -> None:
    await member.vmodels.assign("v", Wanted("a", INFO, load_now=True), sync=True)
    a = member.router.lookup("a")
    assert a is not None
    assert member.router.lookup("v") is None
    assert member.names.model("v") == "a"
    assert member.router.lookup("v") is a
    assert member.router.lookup_model("v") is None
    status = await member.vmodels.assign("v", Wanted("b", INFO), sync=True)
    assert (status.record.active, status.target, status.active.state) == ("b", None, ModelState.LOADED)
    b = member.router.lookup("b")
    assert b is not None and member.router.lookup("v") is b
    await member.vmodels.delete("v")
    assert member.router.lookup("v") is None
    assert member.router.lookup("b") is b


async def test_a_transition_waits_for_the_load_and_is_seen_on_its_way(member: Member) -> None:
    await member.vmodels.assign("v", Wanted("a", INFO, load_now=True), sync=True)
    gate = member.loader.gate("b")
    started = await member.vmodels.assign("v", Wanted("b", INFO, auto_delete=True))
    assert (started.record.active, started.record.target) == ("a", "b")
    assert started.target is not None and started.target.state is ModelState.LOADING
    waiting = asyncio.create_task(member.vmodels.assign("v", Wanted("b"), sync=True))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    gate.set()
    ended = await waiting
    assert (ended.record.active, ended.target) == ("b", None)
    # Back to the first, and what goes with its last vmodel is gone.
    await member.vmodels.assign("v", Wanted("a"), sync=True)
    assert (await member.registered.find("b")).state is ModelState.NOT_FOUND
    assert (await member.registered.find("a")).state is ModelState.LOADED


async def test_a_target_that_fails_leaves_the_active_model_and_is_tried_again(member: Member) -> None:
    await member.vmodels.assign("v", Wanted("a", INFO, load_now=True), sync=True)
    member.loader.errors["b"] = LoadFailed("b is corrupt")
    status = await member.vmodels.assign("v", Wanted("b", INFO), sync=True)
    assert (status.record.active, status.record.failed) == ("a", True)
    assert status.target is not None
    assert (status.target.state, status.target.errors) == (ModelState.LOADING_FAILED, ("b is corrupt",))
    assert member.names.model("v") == "a"
    del member.loader.errors["b"]
    member.clock.now += 11
    await until(lambda: vmodel(member).active == "b")
    assert not vmodel(member).failed


async def test_force_switches_at_once_and_has_the_target_loaded(member: Member) -> None:
    await member.vmodels.assign("v", Wanted("a", INFO, load_now=True), sync=True)
    gate = member.loader.gate("b")
    status = await member.vmodels.assign("v", Wanted("b", INFO, force=True))
    assert (status.record.active, status.target, status.active.state) == ("b", None, ModelState.LOADING)
    gate.set()
    await until(lambda: member.router.lookup("b"))


async def test_a_vmodel_of_a_model_that_is_not_loaded_moves_without_loading(member: Member) -> None:
    await member.vmodels.assign("v", Wanted("a", INFO))
    status = await member.vmodels.assign("v", Wanted("b", INFO))
    assert (status.record.active, status.active.state) == ("b", ModelState.NOT_LOADED)
    assert member.loader.loads == []


async def test_owners(member: Member) -> None:
    await member.vmodels.assign("v", Wanted("a", INFO, owner="me"))
    with pytest.raises(AlreadyExists, match="different owner 'me'"):
        await member.vmodels.assign("v", Wanted("a", owner="you"))
    assert await member.vmodels.find("v", "you") is None
    await member.vmodels.delete("v", "you")
    assert (await member.vmodels.find("v", "me")) == (await member.vmodels.find("v"))
    await member.vmodels.delete("v", "me")
    assert await member.vmodels.find("v") is None
    await member.vmodels.delete("v")


@pytest.mark.parametrize(
    ("name", "wanted", "text"),
    [
        ("", Wanted("a"), "Must provide vModelId"),
        ("v", Wanted(""), "Must provide targetModelId"),
        ("v", Wanted("a", ModelInfo("", "/a")), "Must provide non-empty model type string"),
    ],
)
async def test_what_must_be_said(member: Member, name: str, wanted: Wanted, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        await member.vmodels.assign(name, wanted)


async def test_a_target_is_loaded_in_as_many_copies_as_the_active_model_has(store: MemoryStore) -> None:
    asked: list[tuple[str, int]] = []

    class Counting:
        async def ensure(self, model: str, copies: int = 1, *, anew: bool = False) -> None:
            asked.append((model, copies))

    member = await Member("one", store, loads=Counting()).start()
    other = await Member("two", store).start()
    try:
        await other.registry.publish(InstanceRecord())
        await member.vmodels.assign("v", Wanted("a", INFO))
        copies = {name: CopyRecord(state="LOADED", since_ms=1) for name in ("one", "two", "dead")}
        await until(lambda: "two" in member.registry.instances)
        await other.router.load("a")
        await member.router.load("a")
        await until(lambda: member.vmodels.copies("a") == 2)
        await member.registry.models.update("a", lambda record: replace(record, copies=copies) if record else None)
        await member.vmodels.assign("v", Wanted("b", INFO), sync=True)
        assert vmodel(member).active == "b"
        assert ("b", 2) in asked
    finally:
        await other.close()
        await member.close()


async def test_the_next_leader_takes_up_what_is_on_its_way(store: MemoryStore) -> None:
    first = await Member("one", store).start()
    await until(lambda: first.registry.leader)
    second = await Member("two", store).start()
    try:
        await second.registry.publish(InstanceRecord())
        await second.vmodels.assign("v", Wanted("a", INFO, load_now=True), sync=True)
        await until(lambda: first.vmodels.copies("a") == 1)
        first.loader.gate("b")
        second.loader.gate("b")
        await second.vmodels.assign("v", Wanted("b", INFO))
        assert vmodel(second).active == "a"
        await first.close()
        second.loader.gates["b"].set()
        await until(lambda: vmodel(second).active == "b")
    finally:
        await second.close()


async def test_names_are_of_vmodels_first_and_each_kind_has_its_own(member: Member) -> None:
    await member.registered.register("x", INFO)
    await member.vmodels.assign("x", Wanted("y", INFO, load_now=True), sync=True)
    names = member.names
    assert (names.model("x"), names.model("x", Kind.VMODEL), names.model("x", Kind.MODEL)) == ("y", "y", "x")
    assert member.router.lookup("x") is member.router.lookup("y")
    x = await member.router.load("x")
    assert member.router.lookup_model("x") is x
    assert member.router.lookup("x") is member.router.lookup("y")
    for name, kind, text in (
        ("y", Kind.VMODEL, "vmodel not found: y"),
        ("z", Kind.MODEL, "model not found: z"),
        ("z", Kind.ANY, "Request for unknown model: 'z' is not found"),
    ):
        with pytest.raises(NotFound, match=text):
            await names.find(name, kind)


async def test_what_another_instance_has_just_made_is_found(member: Member, store: MemoryStore) -> None:
    other = await Member("two", store).start()
    try:
        for number in range(20):
            await other.vmodels.assign(f"v{number}", Wanted(f"m{number}", INFO))
            assert await member.names.find(f"v{number}") == f"m{number}"
    finally:
        await other.close()


@pytest.mark.parametrize("seed", range(3))
async def test_references_are_exact_whoever_changes_what_at_once(store: MemoryStore, seed: int) -> None:
    chance = random.Random(seed)
    members = [await Member(name, store, capacity_bytes=10_000).start() for name in ("one", "two", "three")]
    try:
        for one in members:
            await one.registry.publish(InstanceRecord())

        async def someone(one: Member) -> None:
            for _ in range(40):
                name, model = f"v{chance.randrange(3)}", f"m{chance.randrange(4)}"
                kind = chance.random()
                if kind < 0.7:
                    wanted = Wanted(model, INFO, auto_delete=kind < 0.4, force=kind > 0.6, load_now=kind < 0.3)
                    await one.vmodels.assign(name, wanted)
                elif kind < 0.8:
                    await one.vmodels.delete(name)
                else:
                    await one.registered.ensure_loaded(model)

        await asyncio.gather(*(someone(one) for one in members))
        registry = members[0].registry

        def exact() -> bool:
            vmodels = [record for name in registry.vmodels if (record := registry.vmodels.get(name))]
            counted = Counter(model for record in vmodels for model in touched(record))
            models = {name: record for name in registry.models if (record := registry.models.get(name))}
            kept = {name: record.references for name, record in models.items() if record.references}
            return kept == counted and not any(map(in_transition, vmodels))

        await until(exact)
    finally:
        for one in members:
            await one.close()
