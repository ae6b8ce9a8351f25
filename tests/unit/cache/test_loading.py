"""Loads in their order: who waits goes first, who leaves costs nothing, and every change of state is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from mmcore.cache import CopyState, Priority
from mmcore.errors import LoadFailed, NotFound, Overloaded
from mmcore.model import ModelSettings
from tests.unit.cache.test_cache import Fixture, settled


@pytest.fixture
async def one_loader() -> AsyncIterator[Fixture]:
    made = Fixture(loader_threads=1)
    yield made
    for gate in made.loader.gates.values():
        gate.set()
    await made.cache.close()


async def test_a_request_overtakes_what_is_only_to_be_there_in_advance(one_loader: Fixture) -> None:
    cache, origin = one_loader.cache, one_loader.origin
    gate = one_loader.loader.gate("first")
    waiting = [cache.load("first", "1", origin)]
    await settled(one_loader.loader.entered["first"].is_set)
    waiting += [cache.load(f"guess{number}", "1", origin, priority=Priority.PREFETCH) for number in range(3)]
    waiting += [cache.load("wanted-soon", "1", origin, priority=Priority.PRELOAD)]
    waiting += [cache.load("wanted", "1", origin)]
    # A request for what is on its way as a guess makes that as urgent.
    waiting += [cache.load("guess2", "1", origin)]
    await settled(lambda: len(cache._opening) == 5)
    gate.set()
    await asyncio.gather(*waiting)
    assert one_loader.loader.loads == ["first", "guess2", "wanted", "wanted-soon", "guess0", "guess1"]


async def test_queued_loads_that_nobody_waits_for_leave_the_line_at_once(one_loader: Fixture) -> None:
    cache, origin = one_loader.cache, one_loader.origin
    gate = one_loader.loader.gate("first")
    first = cache.load("first", "1", origin)
    await settled(one_loader.loader.entered["first"].is_set)
    leaving = [cache.load(f"m{number}", "1", origin) for number in range(20)]
    await settled(lambda: len(cache._opening) == 20)
    for waiter in leaving:
        waiter.cancel()
    await settled(lambda: cache.loading == 1)
    assert not first.done()
    gate.set()
    await first
    assert one_loader.loader.loads == ["first"]


async def test_each_waiter_has_its_own_deadline(one_loader: Fixture) -> None:
    gate = one_loader.loader.gate("a")
    patient = one_loader.load("a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await one_loader.load("a")
    assert not patient.done()
    gate.set()
    assert (await patient).name == "a"


async def test_a_pull_ends_with_its_last_waiter_and_begins_anew_for_who_comes_then(one_loader: Fixture) -> None:
    cache, origin = one_loader.cache, one_loader.origin
    origin.pulling = begun = threading.Semaphore(0)
    first, second = one_loader.load("a"), one_loader.load("a")
    assert await asyncio.to_thread(begun.acquire, timeout=10)
    first.cancel()
    await asyncio.sleep(0)
    assert cache.state("a", "1") is CopyState.PULLING
    second.cancel()
    await asyncio.sleep(0)
    # Joined before the pull has ended, most likely; what that ends with is of no use to this one.
    third = one_loader.load("a")
    assert await asyncio.to_thread(begun.acquire, timeout=10)
    third.cancel()
    await settled(lambda: cache.loading == 0)
    assert cache.failures.last("a", "1") == ""
    origin.pulling = None
    assert (await one_loader.load("a")).name == "a"


async def test_a_load_that_the_system_allows_no_thread_for_is_no_failure_of_the_model(one_loader: Fixture) -> None:
    before = threading.stack_size(2**46)  # larger than all memory: the system refuses
    try:
        with pytest.raises(Overloaded, match="no thread"):
            await one_loader.load("a")
    finally:
        threading.stack_size(before)
    assert one_loader.cache.failures.last("a", "1") == ""
    assert (await one_loader.load("a")).name == "a"


async def test_dropping_a_load_ends_its_pull(one_loader: Fixture) -> None:
    cache, origin = one_loader.cache, one_loader.origin
    origin.pulling = begun = threading.Semaphore(0)
    waiter = one_loader.load("a")
    assert await asyncio.to_thread(begun.acquire, timeout=10)
    cache.drop_loads("a", NotFound("model not found: a"))
    with pytest.raises(NotFound):
        await waiter
    await settled(lambda: not cache._tasks)


async def test_every_state_is_told_in_order(one_loader: Fixture) -> None:
    told: list[tuple[str, CopyState | None]] = []
    failed: list[str] = []
    cache = one_loader.cache
    cache.on_changed = lambda name, version, state: told.append((name, state))
    cache.on_failed = lambda name, version, error: failed.append(f"{name}: {error}")
    copy = await one_loader.load("a")
    cache.unload(copy)
    await settled(lambda: cache.used_bytes == 0 and told[-1] == ("a", None))
    assert [state for _, state in told] == [
        CopyState.QUEUED, CopyState.PULLING, CopyState.LOADING, CopyState.LOADED, CopyState.UNLOADING, None,
    ]  # fmt: skip
    told.clear()
    one_loader.loader.errors["b"] = LoadFailed("corrupt")
    with pytest.raises(LoadFailed):
        await one_loader.load("b")
    assert told[-1] == ("b", CopyState.FAILED)
    assert failed == ["b: corrupt"]


async def test_times_of_a_load_are_kept_with_its_copy(one_loader: Fixture) -> None:
    gate = one_loader.loader.gate("slow")
    began = time.monotonic()
    waiting = one_loader.load("slow")
    await settled(one_loader.loader.entered["slow"].is_set)
    entered = time.monotonic()
    await asyncio.sleep(0.03)
    opened = time.monotonic()
    gate.set()
    times = (await waiting).times
    ended = time.monotonic()
    assert times.open_s >= opened - entered >= 0.03
    assert times.work_s == times.find_s + times.open_s
    # Each is no longer than what it is the time of, however busy the machine is.
    assert times.queue_s + times.find_s + times.room_s <= entered - began
    assert times.publish_s <= ended - opened


async def test_a_long_load_does_not_keep_space_from_being_given_back(one_loader: Fixture) -> None:
    (copy,) = await one_loader.loaded("a")
    gate = one_loader.loader.gate("slow")
    waiting = one_loader.load("slow")
    await settled(one_loader.loader.entered["slow"].is_set)
    one_loader.cache.unload(copy)
    await settled(one_loader.loader.models[0].closed.is_set)
    await settled(lambda: one_loader.cache.used_bytes == 10)
    assert not waiting.done()
    gate.set()
    await waiting


async def test_many_files_are_found_while_one_is_loaded(one_loader: Fixture) -> None:
    gate = one_loader.loader.gate("slow")
    waiting = one_loader.load("slow")
    await settled(one_loader.loader.entered["slow"].is_set)
    one_loader.origin.gone.add("7")
    with pytest.raises(NotFound):
        await one_loader.load("other", "7")
    gate.set()
    await waiting


async def test_a_large_load_is_not_starved_by_small_ones(one_loader: Fixture) -> None:
    cache = one_loader.cache
    one_loader.origin.settings = ModelSettings(size_bytes=40)
    first, second = await one_loader.loaded("a", "b")
    first.acquire()
    second.acquire()
    one_loader.origin.settings = ModelSettings(size_bytes=90)
    large = one_loader.load("large")
    await settled(lambda: cache.state("large", "1") is CopyState.LOADING)
    one_loader.origin.settings = ModelSettings(size_bytes=5)
    small = [one_loader.load(f"small{number}") for number in range(20)]
    await asyncio.sleep(0.02)
    assert not any(waiter.done() for waiter in small)
    first.release()
    second.release()
    assert (await large).weight == 90
    await asyncio.gather(*small)


async def test_a_request_for_space_goes_before_a_guess_that_came_first(one_loader: Fixture) -> None:
    cache, origin = one_loader.cache, one_loader.origin
    origin.settings = ModelSettings(size_bytes=60)
    (held,) = await one_loader.loaded("a")
    held.acquire()
    guess = cache.load("guess", "1", origin, priority=Priority.PREFETCH)
    await settled(lambda: cache.state("guess", "1") is CopyState.LOADING)
    wanted = cache.load("wanted", "1", origin)
    await settled(lambda: cache.state("wanted", "1") is CopyState.LOADING)
    held.release()
    assert (await wanted).name == "wanted"
    assert (await guess).name == "guess"
    assert one_loader.loader.loads == ["a", "wanted", "guess"]


async def test_device_memory_has_a_limit_of_its_own() -> None:
    fixture = Fixture(device_bytes=100)
    on_device = ModelSettings(size_bytes=10, device_bytes=60)
    on_host = ModelSettings(size_bytes=10)
    fixture.origin.settings = on_host
    await fixture.loaded("host")
    fixture.origin.settings = on_device
    (first,) = await fixture.loaded("first")
    assert fixture.cache.room.used == (20, 60)
    # Only what holds device memory is unloaded for it, although the other was used before.
    await fixture.loaded("second")
    assert fixture.names() == ["host", "second"]
    assert first.state is CopyState.UNLOADING
    fixture.origin.settings = ModelSettings(size_bytes=10, device_bytes=101)
    with pytest.raises(Overloaded, match="takes 101 bytes of device memory, which is more than the capacity of 100"):
        await fixture.load("third")
    await fixture.cache.close()
    assert fixture.cache.room.used == (0, 0)


async def test_idle_copies_go_after_the_instances_time_or_their_own() -> None:
    fixture = Fixture(idle_timeout_s=60.0)
    cache = fixture.cache
    for name, settings in {
        "usual": ModelSettings(size_bytes=10),
        "kept": ModelSettings(size_bytes=10, idle_timeout_s=0.0),
        "pinned": ModelSettings(size_bytes=10, pinned=True),
        "short": ModelSettings(size_bytes=10, idle_timeout_s=5.0),
        "used": ModelSettings(size_bytes=10),
    }.items():
        fixture.origin.settings = settings
        await fixture.loaded(name)
    fixture.clock.now += 6
    cache._tick()
    assert fixture.names() == ["usual", "kept", "pinned", "used"]
    cache.lru.touch(cache.lru.get(("used", "1")))
    fixture.clock.now += 55
    cache._tick()
    assert fixture.names() == ["kept", "pinned", "used"]
    await cache.close()


async def test_a_pinned_model_is_never_evicted() -> None:
    fixture = Fixture(room_wait_s=0.01)
    fixture.origin.settings = ModelSettings(size_bytes=60, pinned=True)
    await fixture.loaded("pinned")
    fixture.origin.settings = ModelSettings(size_bytes=30)
    await fixture.loaded("a", "b", "c")
    assert fixture.names() == ["pinned", "c"]
    fixture.origin.settings = ModelSettings(size_bytes=50)
    with pytest.raises(Overloaded, match="no room"):
        await fixture.load("large")
    await fixture.cache.close()


async def test_a_copy_that_has_grown_with_its_first_requests_counts_for_more(one_loader: Fixture) -> None:
    one_loader.origin.settings = ModelSettings(size_bytes=None)
    one_loader.loader.sizes = {"a": 30, "b": 30, "c": 30}
    cache = one_loader.cache
    cache.sizes.predict = lambda source, files: 30  # type: ignore[method-assign]  # what its file says is no matter
    a, b, c = await one_loader.loaded("a", "b", "c")
    cache._grown(c, 25)
    assert (c.weight, cache.used_bytes) == (55, 115)
    assert a.state is CopyState.UNLOADING
    assert b.state is CopyState.LOADED
    await settled(lambda: cache.used_bytes == 85)
