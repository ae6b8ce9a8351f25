"""Loads are shared, failures expire, the least recently used goes first, and what is in use stays."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator

import pytest

from mmcore.cache import Cache, Copy, CopyState, Priority
from mmcore.errors import Cancelled, LoadFailed, NotFound, Overloaded, Unavailable
from mmcore.model import ModelSettings
from tests.unit.models_in_memory import Clock, FakeModel, FakeOrigin, Loader


class Fixture:
    def __init__(
        self,
        capacity_bytes: int = 100,
        *,
        device_bytes: int = 0,
        room_wait_s: float = 30.0,
        loader_threads: int = 2,
        idle_timeout_s: float = 0.0,
    ) -> None:
        self.clock = Clock()
        self.loader = Loader()
        self.origin = FakeOrigin(ModelSettings(size_bytes=10))
        self.cache = Cache(
            capacity_bytes=capacity_bytes,
            device_bytes=device_bytes,
            idle_timeout_s=idle_timeout_s,
            load=self.loader,
            bind=lambda model: None,  # type: ignore[arg-type,return-value]  # nothing is bound here
            loader_threads=loader_threads,
            room_wait_s=room_wait_s,
            residency_s=0.0,
            eviction="lru",
            clock=self.clock,
        )
        self.events: list[str] = []
        self.cache.on_loaded = lambda copy: self.events.append(f"+{copy.name}")
        self.cache.on_gone = lambda copy: self.events.append(f"-{copy.name}")

    def load(self, name: str, version: str = "1") -> asyncio.Future[Copy]:
        return self.cache.load(name, version, self.origin)

    async def loaded(self, *names: str) -> list[Copy]:
        copies = [await self.load(name) for name in names]
        await settled(lambda: not any(copy.resident for copy in copies))
        return copies

    def names(self) -> list[str]:
        return [entry.key[0] for entry in self.cache.lru]  # type: ignore[index]  # (name, version)


async def settled(condition: object) -> None:
    """Let the loop and the threads work until the condition holds."""
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]  # a callable
            await asyncio.sleep(0.001)


@pytest.fixture
async def fixture() -> AsyncIterator[Fixture]:
    made = Fixture()
    yield made
    for gate in made.loader.gates.values():
        gate.set()
    await made.cache.close()


async def test_concurrent_loads_are_one(fixture: Fixture) -> None:
    gate = fixture.loader.gate("a")
    waiters = [fixture.load("a") for _ in range(50)]
    assert fixture.cache.state("a", "1") is CopyState.QUEUED
    await settled(fixture.loader.entered["a"].is_set)
    assert fixture.cache.state("a", "1") is CopyState.LOADING
    waiters.append(fixture.load("a"))
    gate.set()
    copies = await asyncio.gather(*waiters)
    assert len(set(copies)) == 1
    assert fixture.loader.loads == ["a"]
    assert fixture.cache.state("a", "1") is CopyState.LOADED
    assert await fixture.load("a") is copies[0]
    assert all(name.startswith("mmcore-load") for name in fixture.loader.threads)


async def test_a_waiter_that_leaves_does_not_disturb_the_others(fixture: Fixture) -> None:
    gate = fixture.loader.gate("a")
    leaving, staying = fixture.load("a"), fixture.load("a")
    await settled(fixture.loader.entered["a"].is_set)
    leaving.cancel()
    gate.set()
    assert (await staying).name == "a"


async def test_a_queued_load_that_nobody_waits_for_is_given_up(fixture: Fixture) -> None:
    gates = [fixture.loader.gate(name) for name in ("a", "b")]
    busy = [fixture.load("a"), fixture.load("b")]
    await settled(lambda: all(event.is_set() for event in fixture.loader.entered.values()))
    queued = fixture.load("c")
    await asyncio.sleep(0)
    queued.cancel()
    for gate in gates:
        gate.set()
    await asyncio.gather(*busy)
    await settled(lambda: fixture.cache.state("c", "1") is None)
    assert sorted(fixture.loader.loads) == ["a", "b"]
    assert (await fixture.load("c")).name == "c"


async def test_a_running_load_that_nobody_waits_for_is_kept(fixture: Fixture) -> None:
    gate = fixture.loader.gate("a")
    waiter = fixture.load("a")
    await settled(fixture.loader.entered["a"].is_set)
    waiter.cancel()
    gate.set()
    await settled(lambda: fixture.cache.state("a", "1") is not CopyState.LOADING)
    assert fixture.names() == ["a"]
    assert fixture.events == ["+a"]


async def test_a_failure_is_remembered_until_it_expires(fixture: Fixture) -> None:
    fixture.loader.errors["a"] = LoadFailed("corrupt file")
    expiries = [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]
    for count, expiry in enumerate(expiries, 1):
        for _ in range(3):
            with pytest.raises(LoadFailed, match="corrupt file"):
                await fixture.load("a")
        assert len(fixture.loader.loads) == count
        fixture.clock.now += expiry - 0.1
        with pytest.raises(LoadFailed):
            await fixture.load("a")
        assert len(fixture.loader.loads) == count
        assert fixture.cache.state("a", "1") is CopyState.FAILED
        fixture.clock.now += 0.2
    del fixture.loader.errors["a"]
    assert (await fixture.load("a")).state is CopyState.LOADED
    assert fixture.cache.failures.last("a", "1") == ""


async def test_a_failure_that_was_cleared_is_tried_again(fixture: Fixture) -> None:
    fixture.loader.errors["a"] = LoadFailed("corrupt")
    with pytest.raises(LoadFailed):
        await fixture.load("a")
    fixture.cache.failures.clear("a", "2")
    with pytest.raises(LoadFailed):
        await fixture.load("a")
    fixture.cache.failures.clear("a")
    fixture.loader.errors.clear()
    assert (await fixture.load("a")).name == "a"


async def test_any_exception_becomes_a_failed_load(fixture: Fixture, caplog: pytest.LogCaptureFixture) -> None:
    fixture.loader.errors["a"] = ZeroDivisionError("odd")
    with pytest.raises(LoadFailed, match="ZeroDivisionError: odd"):
        await fixture.load("a")
    assert "Traceback" in caplog.text


async def test_a_model_that_wants_to_end_the_process_only_fails(fixture: Fixture) -> None:
    fixture.loader.errors["a"] = SystemExit(3)
    with pytest.raises(LoadFailed, match="'a' ended with SystemExit: 3"):
        await fixture.load("a")


async def test_files_that_change_while_loading_void_the_load_and_are_not_remembered(fixture: Fixture) -> None:
    fixture.origin.fault = Unavailable("being changed")
    with pytest.raises(Unavailable, match="being changed"):
        await fixture.load("a")
    await settled(fixture.loader.models[0].closed.is_set)
    fixture.origin.fault = None
    assert (await fixture.load("a")).name == "a"
    assert fixture.cache.used_bytes == 10


async def test_a_version_that_is_gone_is_not_found(fixture: Fixture) -> None:
    fixture.origin.gone.add("7")
    with pytest.raises(NotFound):
        await fixture.load("a", "7")
    assert fixture.cache.state("a", "7") is None


async def test_the_least_recently_used_goes_first(fixture: Fixture) -> None:
    fixture.origin.settings = ModelSettings(size_bytes=30)
    copies = await fixture.loaded("a", "b", "c")
    fixture.cache.lru.touch(copies[0])
    await fixture.loaded("d")
    assert fixture.names() == ["c", "a", "d"]
    assert fixture.events == ["+a", "+b", "+c", "-b", "+d"]
    await settled(lambda: fixture.cache.used_bytes == 90)
    assert [model.closed.is_set() for model in fixture.loader.models] == [False, True, False, False]


async def test_as_many_go_as_the_new_one_needs(fixture: Fixture) -> None:
    fixture.origin.settings = ModelSettings(size_bytes=30)
    await fixture.loaded("a", "b", "c")
    fixture.origin.settings = ModelSettings(size_bytes=70)
    await fixture.loaded("d")
    assert fixture.names() == ["c", "d"]


async def test_a_copy_in_use_is_not_evicted(fixture: Fixture) -> None:
    fixture.origin.settings = ModelSettings(size_bytes=40)
    first, _ = await fixture.loaded("a", "b")
    first.acquire()
    await fixture.loaded("c")
    assert fixture.names() == ["a", "c"]
    assert first.state is CopyState.LOADED
    first.release()
    await fixture.loaded("d")
    assert fixture.names() == ["c", "d"]


async def test_a_load_waits_until_a_lease_is_returned() -> None:
    fixture = Fixture(loader_threads=3)
    fixture.origin.settings = ModelSettings(size_bytes=60)
    (first,) = await fixture.loaded("a")
    first.acquire()
    waiting = fixture.load("b")
    await settled(lambda: fixture.cache.state("b", "1") is CopyState.LOADING)
    # A small one that would fit does not overtake the one that waits.
    fixture.origin.settings = ModelSettings(size_bytes=20)
    small = fixture.load("c")
    await asyncio.sleep(0.02)
    assert not waiting.done()
    assert not small.done()
    first.release()
    assert (await waiting).name == "b"
    assert (await small).name == "c"
    assert fixture.names() == ["b", "c"]
    await fixture.cache.close()


async def test_a_load_that_finds_no_room_is_refused_and_not_remembered() -> None:
    fixture = Fixture(room_wait_s=0.01)
    fixture.origin.settings = ModelSettings(size_bytes=60)
    (first,) = await fixture.loaded("a")
    first.acquire()
    with pytest.raises(Overloaded, match=r"no room for model 'b': it needs 60 bytes.*of 100 bytes 60 are taken"):
        await fixture.load("b")
    first.release()
    assert (await fixture.load("b")).name == "b"
    await fixture.cache.close()


async def test_a_load_that_waits_for_room_ends_when_nobody_waits_for_it(fixture: Fixture) -> None:
    fixture.origin.settings = ModelSettings(size_bytes=60)
    (first,) = await fixture.loaded("a")
    first.acquire()
    waiting = fixture.load("b")
    await settled(lambda: fixture.cache.state("b", "1") is CopyState.LOADING)
    await asyncio.sleep(0.01)
    waiting.cancel()
    await settled(lambda: fixture.cache.state("b", "1") is None)
    assert fixture.loader.loads == ["a"]
    first.release()


async def test_a_model_above_the_capacity_is_refused_before_it_is_loaded(fixture: Fixture) -> None:
    await fixture.loaded("a")
    fixture.origin.settings = ModelSettings(size_bytes=101)
    with pytest.raises(Overloaded, match="model 'big' takes 101 bytes, which is more than the capacity of 100 bytes"):
        await fixture.load("big")
    assert fixture.loader.loads == ["a"]
    assert fixture.names() == ["a"]


async def test_a_model_that_turns_out_above_the_capacity_is_closed_and_remembered(fixture: Fixture) -> None:
    fixture.loader.sizes["big"] = 1000
    for _ in range(3):
        with pytest.raises(Overloaded, match="takes 1000 bytes"):
            await fixture.load("big")
    assert fixture.loader.loads == ["big"]
    await settled(lambda: fixture.loader.models[0].closed.is_set() and fixture.cache.used_bytes == 0)


async def test_a_model_larger_than_predicted_makes_more_room(fixture: Fixture) -> None:
    fixture.origin.settings = ModelSettings(size_bytes=30)
    await fixture.loaded("a", "b")
    fixture.loader.sizes["c"] = 65
    (copy,) = await fixture.loaded("c")
    assert copy.weight == 65
    assert fixture.names() == ["b", "c"]


async def test_space_being_unloaded_is_not_free(fixture: Fixture) -> None:
    fixture.origin.settings = ModelSettings(size_bytes=60)
    (first,) = await fixture.loaded("a")
    first.acquire()
    fixture.cache.unload(first)
    assert fixture.cache.used_bytes == 60
    waiting = fixture.load("b")
    await settled(lambda: fixture.cache.state("b", "1") is CopyState.LOADING)
    await asyncio.sleep(0.02)
    assert not waiting.done()
    assert fixture.cache.state("a", "1") is CopyState.UNLOADING
    first.release()
    await waiting
    assert fixture.cache.used_bytes == 60


async def test_an_unload_closes_after_the_last_lease(fixture: Fixture) -> None:
    (copy,) = await fixture.loaded("a")
    model = fixture.loader.models[0]
    copy.acquire()
    copy.acquire()
    fixture.cache.unload(copy)
    fixture.cache.unload(copy)
    assert fixture.events == ["+a", "-a"]
    copy.release()
    await asyncio.sleep(0.01)
    assert not model.closed.is_set()
    assert fixture.cache.unloading("a") == [copy]
    copy.release()
    await settled(model.closed.is_set)
    await settled(lambda: fixture.cache.used_bytes == 0)
    assert fixture.cache.unloading("a") == []


async def test_a_new_copy_stays_for_its_first_moments() -> None:
    fixture = Fixture()
    fixture.cache._residency_s = 60.0
    fixture.origin.settings = ModelSettings(size_bytes=60)
    first = await fixture.load("a")
    assert (first.in_flight, first.resident) == (0, True)
    waiting = fixture.load("b")
    await asyncio.sleep(0.02)
    assert fixture.names() == ["a"]
    await fixture.cache.close()
    with pytest.raises(Unavailable):
        await waiting


async def test_a_replacement_serves_from_the_moment_it_is_ready(fixture: Fixture) -> None:
    (old,) = await fixture.loaded("a")
    gate = fixture.loader.gate("a")
    replacing = asyncio.create_task(fixture.cache.replace("a", "1", fixture.origin))
    await settled(fixture.loader.entered["a"].is_set)
    assert fixture.cache.lru.get(("a", "1")) is old
    assert fixture.cache.state("a", "1") is CopyState.LOADED
    gate.set()
    new = await replacing
    assert fixture.cache.lru.get(("a", "1")) is new
    assert fixture.events == ["+a", "+a", "-a"]
    await settled(fixture.loader.models[0].closed.is_set)


async def test_a_replacement_that_fails_leaves_the_old_copy(fixture: Fixture) -> None:
    (old,) = await fixture.loaded("a")
    fixture.loader.errors["a"] = LoadFailed("corrupt")
    with pytest.raises(LoadFailed):
        await fixture.cache.replace("a", "1", fixture.origin)
    assert await fixture.load("a") is old
    assert not fixture.loader.models[0].closed.is_set()


async def test_a_replacement_waits_for_the_load_under_way(fixture: Fixture) -> None:
    gate = fixture.loader.gate("a")
    first = fixture.load("a")
    replacing = asyncio.create_task(fixture.cache.replace("a", "1", fixture.origin))
    await settled(fixture.loader.entered["a"].is_set)
    gate.set()
    old = await first
    assert await replacing is not old
    assert fixture.loader.loads == ["a", "a"]


async def test_dropped_loads_answer_at_once_and_their_model_is_closed(fixture: Fixture) -> None:
    gate = fixture.loader.gate("a")
    waiter = fixture.load("a")
    await settled(fixture.loader.entered["a"].is_set)
    fixture.cache.drop_loads("a", NotFound("gone"))
    with pytest.raises(NotFound, match="gone"):
        await waiter
    gate.set()
    await settled(lambda: fixture.loader.models and fixture.loader.models[0].closed.is_set())
    assert fixture.events == []
    await settled(lambda: fixture.cache.used_bytes == 0)
    assert fixture.cache.state("a", "1") is None


async def test_closing_ends_what_waits_and_unloads_the_rest() -> None:
    fixture = Fixture()
    (copy,) = await fixture.loaded("a")
    gate = fixture.loader.gate("b")
    waiter = fixture.load("b")
    await settled(fixture.loader.entered["b"].is_set)
    closing = asyncio.create_task(fixture.cache.close())
    with pytest.raises(Unavailable, match="shutting down"):
        await waiter
    gate.set()
    await closing
    await settled(lambda: all(model.closed.is_set() for model in fixture.loader.models))
    assert len(fixture.loader.models) == 2
    assert copy.state is CopyState.UNLOADING


async def test_an_instance_ends_although_a_load_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mmcore.cache.cache.CLOSE_WAIT_S", 0.01)
    fixture = Fixture()
    (copy,) = await fixture.loaded("a")
    copy.acquire()
    gate = fixture.loader.gate("b")
    waiter = fixture.load("b")
    await settled(fixture.loader.entered["b"].is_set)
    await fixture.cache.close()
    with pytest.raises(Unavailable):
        await waiter
    assert "2 models are still being loaded, used or unloaded" in caplog.text
    gate.set()
    copy.release()
    await settled(lambda: len(fixture.loader.models) == 2 and all(one.closed.is_set() for one in fixture.loader.models))


async def test_unloaded_models_are_let_go_of(fixture: Fixture) -> None:
    (copy,) = await fixture.loaded("a")
    watched = weakref.ref(fixture.loader.models.pop())
    fixture.cache.unload(copy)
    await settled(lambda: fixture.cache.used_bytes == 0)
    await asyncio.sleep(0)
    gc.collect()
    assert watched() is None


async def test_an_error_while_closing_is_logged_and_frees_the_space(
    fixture: Fixture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: FakeModel) -> None:
        raise RuntimeError("cannot close")

    (copy,) = await fixture.loaded("a")
    monkeypatch.setattr(FakeModel, "close", refuse)
    fixture.cache.unload(copy)
    await settled(lambda: fixture.cache.used_bytes == 0)
    assert "cannot close" in caplog.text


async def test_many_cycles_through_more_models_than_fit_keep_the_sum_right(fixture: Fixture) -> None:
    fixture.origin.settings = ModelSettings(size_bytes=30)
    for round_number in range(60):
        await fixture.load(f"m{round_number % 7}")
        assert fixture.cache.used_bytes <= 100
    await settled(lambda: fixture.cache.used_bytes == fixture.cache.lru.total)
    open_models = [model for model in fixture.loader.models if not model.closed.is_set()]
    assert len(open_models) == len(fixture.cache.lru)


def load_ahead(fixture: Fixture, name: str, idle_s: float = 100.0) -> asyncio.Future[Copy]:
    return fixture.cache.load(name, "1", fixture.origin, priority=Priority.PRELOAD, idle_s=idle_s)


async def test_a_load_into_free_room_has_its_place_by_its_last_use_and_evicts_nothing(fixture: Fixture) -> None:
    await fixture.loaded("a")
    fixture.clock.now += 200
    await fixture.loaded("b")
    await load_ahead(fixture, "c")
    assert fixture.names() == ["a", "c", "b"]
    assert fixture.cache.oldest_idle_s == 200
    await fixture.loaded(*(f"m{n}" for n in range(7)))
    with pytest.raises(Cancelled, match="evicted"):
        await load_ahead(fixture, "d")
    assert len(fixture.names()) == 10
    assert fixture.cache.failures.last("d", "1") == ""
    # For one that is wanted there is room.
    await fixture.loaded("d")
    assert "a" not in fixture.names()


async def test_a_load_into_free_room_that_turns_out_larger_is_let_go_of(fixture: Fixture) -> None:
    fixture.origin.settings = ModelSettings()
    fixture.loader.sizes = {"a": 60, "b": 60}
    await fixture.loaded("a")
    # Nothing is known of its size before it is loaded, so that it may be taken to fit.
    fixture.cache.room.capacity = fixture.cache.room.capacity._replace(host=2**30)
    gate = fixture.loader.gate("b")
    load = load_ahead(fixture, "b")
    await settled(fixture.loader.entered["b"].is_set)
    fixture.cache.room.capacity = fixture.cache.room.capacity._replace(host=100)
    gate.set()
    with pytest.raises(Cancelled, match="60 bytes"):
        await load
    assert fixture.names() == ["a"]
    await settled(lambda: fixture.cache.used_bytes == 60)


async def test_a_request_makes_a_load_into_free_room_one_that_evicts(fixture: Fixture) -> None:
    await fixture.loaded(*(f"m{n}" for n in range(10)))
    first, second = fixture.loader.gate("x"), fixture.loader.gate("y")
    fixture.cache.unload(fixture.cache.lru.get(("m0", "1")))  # type: ignore[arg-type]  # a copy
    fixture.cache.unload(fixture.cache.lru.get(("m1", "1")))  # type: ignore[arg-type]
    await settled(lambda: fixture.cache.used_bytes == 80)
    busy = [fixture.load("x"), fixture.load("y")]
    await settled(lambda: fixture.loader.entered["x"].is_set() and fixture.loader.entered["y"].is_set())
    ahead, wanted = load_ahead(fixture, "z"), fixture.load("z")
    first.set()
    second.set()
    assert await wanted is await ahead
    await asyncio.gather(*busy)
    assert fixture.names()[-1] == "z"


async def test_what_would_be_unloaded_for_being_idle_is_not_loaded_ahead() -> None:
    fixture = Fixture(idle_timeout_s=60.0)
    with pytest.raises(Cancelled, match="not been used for 61 s"):
        await load_ahead(fixture, "a", 61)
    await load_ahead(fixture, "a", 59)
    await fixture.cache.close()
