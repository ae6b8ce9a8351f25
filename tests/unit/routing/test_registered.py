"""Registered models: made known to the router when they are asked for, and their copies told of in their records."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from mmcore.cache import CopyState
from mmcore.errors import AlreadyExists, Conflict, InvalidRequest, LoadFailed, NotFound, Unavailable
from mmcore.model import ModelInfo
from mmcore.registry import CopyRecord, FailureRecord, InstanceRecord, MemoryStore, ModelRecord
from mmcore.registry.records import encode
from mmcore.registry.store import Entry
from mmcore.routing import ModelState
from mmcore.routing.reports import FAILURE_KEPT_MS, RETRY_S
from tests.unit.routing.instances_in_memory import INFO, Member, until

#: The design's budget for a model that is registered and not loaded, in bytes.
BUDGET_BYTES = 500


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def member(store: MemoryStore) -> AsyncIterator[Member]:
    made = await Member("one", store).start()
    yield made
    await made.close()


def record(member: Member, name: str = "m") -> ModelRecord:
    found = member.registry.models.get(name)
    assert found is not None
    return found


async def test_a_registered_model_is_loaded_when_it_is_asked_for(member: Member) -> None:
    router = member.router
    status = await member.registered.register("m", INFO)
    assert (status.state, status.errors, status.copies) == (ModelState.NOT_LOADED, (), ())
    assert (router.names(), router.versions("m"), router.lookup("m")) == (["m"], ("1",), None)
    assert "m" not in router.table
    assert [(row.version, row.state) for row in router.index()] == [("1", "UNAVAILABLE")]
    copy = await router.load("m")
    assert router.lookup("m") is router.lookup("m", "1") is copy
    (there,) = member.registered.status("m").copies
    assert (there.location, there.state) == ("one", ModelState.LOADED)
    await until(lambda: record(member).copies == {"one": CopyRecord(state="LOADED", since_ms=there.since_ms)})


async def test_a_copy_that_is_evicted_leaves_nothing_behind(member: Member) -> None:
    for name in ("a", "b"):
        member.loader.sizes[name] = 60
        await member.registered.register(name, INFO)
    first = await member.router.load("a")
    await until(lambda: record(member, "a").copies and not first.resident)
    await member.router.load("b")
    assert member.router.lookup("a") is None
    assert "a" not in member.router.table
    assert member.registered.status("a").state is ModelState.NOT_LOADED
    await until(lambda: not record(member, "a").copies and record(member, "b").copies)
    assert member.router.names() == ["b", "a"]


async def test_states_of_a_load_are_told_as_they_are(member: Member) -> None:
    gate = member.loader.gate("m")
    status = await member.registered.register("m", INFO, load_now=True)
    assert status.state is ModelState.LOADING
    assert [(copy.location, copy.state) for copy in status.copies] == [("one", ModelState.LOADING)]
    await until(lambda: record(member).copies.get("one", CopyRecord()).state == CopyState.LOADING)
    waiter = asyncio.create_task(member.registered.ensure_loaded("m", sync=True))
    gate.set()
    assert (await waiter).state is ModelState.LOADED
    assert member.loader.loads == ["m"]


async def test_a_load_whose_place_is_being_decided_is_a_load(member: Member) -> None:
    class Deciding:
        async def ensure(self, model: str, copies: int = 1, *, anew: bool = False) -> None:
            await decided.wait()

    decided = asyncio.Event()
    member.registered.loads = Deciding()
    assert (await member.registered.register("m", INFO, load_now=True)).state is ModelState.LOADING
    decided.set()


async def test_who_asks_expressly_has_a_failed_load_tried_again(member: Member) -> None:
    member.loader.errors["m"] = LoadFailed("model.onnx is corrupt")
    await member.registered.register("m", INFO, load_now=True, sync=True)
    for _ in range(3):
        member.clock.now += 1000
        with pytest.raises(LoadFailed):
            await member.router.load("m")
    del member.loader.errors["m"]
    tried = len(member.loader.loads)
    # Not at once, for whoever asks all the time; but long before a request would try.
    member.clock.now += 9
    assert (await member.registered.ensure_loaded("m", sync=True)).state is ModelState.LOADING_FAILED
    member.clock.now += 2
    with pytest.raises(LoadFailed):
        await member.router.load("m")
    assert len(member.loader.loads) == tried
    assert (await member.registered.register("m", INFO, load_now=True, sync=True)).state is ModelState.LOADED


async def test_a_failed_load_is_a_status_that_ends_with_a_later_load(member: Member) -> None:
    member.loader.errors["m"] = LoadFailed("model.onnx is corrupt")
    status = await member.registered.register("m", INFO, load_now=True, sync=True)
    assert (status.state, status.errors) == (ModelState.LOADING_FAILED, ("model.onnx is corrupt",))
    (there,) = status.copies
    assert (there.location, there.state) == ("one", ModelState.LOADING_FAILED)
    assert "m" not in member.router.table
    await until(lambda: record(member).failures)
    assert record(member).failures["one"].message == "model.onnx is corrupt"
    # It is remembered: not tried for each who asks, until it expires.
    with pytest.raises(LoadFailed, match="corrupt"):
        await member.router.load("m")
    assert member.loader.loads == ["m"]
    del member.loader.errors["m"]
    member.clock.now += 11
    assert (await member.registered.ensure_loaded("m", sync=True)).state is ModelState.LOADED
    await until(lambda: not record(member).failures)


async def test_a_failure_that_nothing_follows_is_taken_back(member: Member) -> None:
    member.loader.errors["m"] = LoadFailed("corrupt")
    await member.registered.register("m", INFO, load_now=True, sync=True)
    await until(lambda: record(member).failures)
    member.now_ms = lambda: record(member).last_used_ms + FAILURE_KEPT_MS * 100
    member.registered._reports.expire_failures()
    assert member.registered.status("m").state is ModelState.NOT_LOADED
    await until(lambda: not record(member).failures)


async def test_a_model_without_room_is_a_failed_load_too(member: Member) -> None:
    member.loader.sizes["m"] = 1000
    status = await member.registered.register("m", INFO, load_now=True, sync=True)
    assert status.state is ModelState.LOADING_FAILED
    assert "more than the capacity" in status.errors[0]


async def test_registering_again_changes_nothing_but_its_last_use_after_an_hour(member: Member) -> None:
    hour_ms, now_ms = 3_600_000, 100 * 3_600_000
    member.now_ms = lambda: now_ms
    await member.registered.register("m", INFO)
    assert record(member).last_used_ms == now_ms - 6 * hour_ms
    await member.registered.register("m", INFO, last_used_ms=now_ms - 5 * hour_ms)
    assert record(member).last_used_ms == now_ms - 6 * hour_ms
    await member.registered.register("m", INFO, last_used_ms=now_ms + hour_ms)
    assert record(member).last_used_ms == now_ms
    await member.registered.register("n", INFO, last_used_ms=5)
    assert record(member, "n").last_used_ms == 5
    with pytest.raises(AlreadyExists, match="Model already exists with different attribute values"):
        await member.registered.register("m", replace(INFO, path="/other"))


@pytest.mark.parametrize(
    ("name", "info", "text"),
    [
        ("", INFO, "must provide non-empty modelId"),
        ("m", ModelInfo("", "/m"), "Must provide non-empty model type string"),
    ],
)
async def test_what_cannot_be_registered(member: Member, name: str, info: ModelInfo, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        await member.registered.register(name, info)


async def test_unregistering_unloads_and_ends_loads(member: Member) -> None:
    await member.registered.register("m", INFO, load_now=True, sync=True)
    gate = member.loader.gate("loading")
    await member.registered.register("loading", INFO)
    waiter = member.router.load("loading")
    assert await asyncio.to_thread(member.loader.entered["loading"].wait, 10)
    await member.registered.unregister("m")
    await member.registered.unregister("loading")
    await member.registered.unregister("absent")
    assert member.registered.status("m").state is ModelState.NOT_FOUND
    with pytest.raises(NotFound):
        await waiter
    with pytest.raises(NotFound, match="Request for unknown model: 'm' is not found"):
        member.router.load("m")
    gate.set()
    await until(lambda: member.router.cache.used_bytes == 0)
    assert member.router.names() == []


async def test_what_is_referred_to_is_not_unregistered(member: Member) -> None:
    await member.registered.register("m", INFO)
    await member.registry.models.update("m", lambda record: replace(record, references=1) if record else None)
    with pytest.raises(Conflict, match="Model m has referents"):
        await member.registered.unregister("m")
    assert (await member.registered.find("m")).state is ModelState.NOT_LOADED


async def test_a_model_registered_anew_as_something_else_is_loaded_anew(member: Member) -> None:
    await member.registered.register("m", INFO, load_now=True, sync=True)
    first = member.router.lookup("m")
    await member.registry.models.update("m", lambda record: replace(record, path="/other") if record else None)
    assert member.router.lookup("m") is None
    assert await member.router.load("m") is not first
    assert member.loader.loads == ["m", "m"]


async def test_ensure_loaded_of_an_unknown_model_is_a_status(member: Member) -> None:
    assert (await member.registered.ensure_loaded("m", sync=True)).state is ModelState.NOT_FOUND


async def test_another_instances_copies_are_told_of_while_it_lives(member: Member, store: MemoryStore) -> None:
    other = await Member("two", store).start()
    await other.registry.publish(InstanceRecord())
    await other.registered.register("m", INFO, load_now=True, sync=True)
    # Its record may be written while it is loading, and again when it is loaded.
    await until(lambda: member.registered.status("m").state is ModelState.LOADED)
    assert [copy.location for copy in member.registered.status("m").copies] == ["two"]
    await member.router.load("m")
    assert {copy.location for copy in member.registered.status("m").copies} == {"one", "two"}
    await until(lambda: set(record(member).copies) == {"one", "two"})
    await other.close()
    await until(lambda: set(record(member).copies) == {"one"})
    dead = {"copies": {"dead": CopyRecord(state="LOADED")}, "failures": {"dead": FailureRecord(message="too late")}}
    await member.registry.models.update(
        "m",
        lambda record: replace(record, **dead) if record else None,  # type: ignore[arg-type]  # the fields' own types
    )
    assert member.registered.status("m").errors == ()
    assert [copy.location for copy in member.registered.status("m").copies] == ["one"]
    # What it holds is written again over what a store that lost it says.
    await until(lambda: "one" in record(member).copies)


class Away(MemoryStore):
    """A store that can be cut off from writes."""

    away = False

    async def transact(self, *args: Any, **more: Any) -> Any:
        if self.away:
            raise Unavailable("the store is away")
        return await super().transact(*args, **more)


async def test_a_store_that_is_away_disturbs_no_serving_and_hears_of_it_later() -> None:
    store = Away()
    member = await Member("one", store).start()
    try:
        for name in ("a", "b"):
            await member.registered.register(name, INFO)
        store.away = True
        assert (await member.router.load("a")).name == "a"
        assert member.registered.status("a").state is ModelState.LOADED
        assert (await member.registered.ensure_loaded("b", sync=True)).state is ModelState.LOADED
        with pytest.raises(Unavailable):
            await member.registered.register("c", INFO)
        await asyncio.sleep(0.05)
        assert not record(member, "a").copies
        store.away = False
        await until(lambda: record(member, "a").copies and record(member, "b").copies)
    finally:
        await member.close()


class Slow(MemoryStore):
    """Takes writes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.takes = asyncio.Event()
        self.takes.set()
        self.waiting = False

    async def transact(self, *args: Any, **more: Any) -> Any:
        self.waiting = not self.takes.is_set()
        await self.takes.wait()
        return await super().transact(*args, **more)


async def test_a_load_that_ends_while_its_begin_is_being_written_is_told_at_once() -> None:
    """That was taken for a write that failed, and tried again after a second."""
    store = Slow()
    member = await Member("one", store).start()
    try:
        await member.registered.register("m", INFO)
        gate = member.loader.gate("m")
        store.takes.clear()
        load = asyncio.ensure_future(member.router.load("m"))
        await asyncio.to_thread(member.loader.entered["m"].wait, 10)
        await until(lambda: store.waiting)
        gate.set()
        await load
        store.takes.set()
        began = asyncio.get_running_loop().time()
        await until(lambda: (there := record(member).copies.get("one")) is not None and there.state == "LOADED")
        assert asyncio.get_running_loop().time() - began < 0.9 * RETRY_S
    finally:
        await member.close()


async def test_the_last_use_of_a_copy_is_written_when_it_goes(member: Member) -> None:
    await member.registered.register("m", INFO, last_used_ms=1)
    copy = await member.router.load("m")
    copy.statistics.record(1, 1, 1, 1, 1)
    used_ms = copy.statistics.snapshot().last_inference_ms
    member.router.cache.unload(copy)
    await until(lambda: record(member).last_used_ms == used_ms and not record(member).copies)


async def test_a_registered_model_that_is_not_loaded_costs_less_than_the_budget() -> None:
    store = MemoryStore()
    count = 5_000
    member = Member("one", store)
    key = '{"storage_key":"localMinIO","model_type":{"name":"sklearn"}}'
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            made = ModelRecord(type="mt:sklearn", path=f"sklearn/model-{number:08}", key=key, last_used_ms=number)
            key_of = member.registry.models.key(f"a-model-of-usual-name-length-{number:08}")
            member.registry.models.put(key_of, Entry.of(encode(made), number + 1))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(member.router.names()) == count
    assert taken / count < BUDGET_BYTES


async def test_the_count_of_models_is_that_of_their_names(member: Member) -> None:
    assert member.router.count() == 0
    for name in ("a", "b", "c"):
        await member.registered.register(name, INFO)
    await member.router.load("b")
    assert member.router.count() == len(member.router.names()) == 3


async def test_models_that_are_looked_at_and_not_loaded_cost_the_router_nothing(member: Member) -> None:
    await member.registered.register("m", INFO)
    member.router.check("m")
    member.router.index()
    assert "m" not in member.router.table


async def test_an_unload_on_demand_holds_until_it_is_loaded_on_demand(member: Member) -> None:
    await member.registered.register("m", INFO, load_now=True, sync=True)
    await member.router.unload("m")
    with pytest.raises(NotFound, match="has no available versions"):
        member.router.load("m")
    assert member.registered.status("m").state is ModelState.NOT_LOADED
    assert (await member.router.load_explicit("m")).name == "m"
    assert member.registered.status("m").state is ModelState.LOADED
