"""The copies held by this instance: loads, one at a time for each version, eviction when capacity is reached, unloads.

Everything happens on the event loop; only the work itself (finding or pulling the files, loading, closing) is done in
threads, a few for each of the three, never in those that serve.

Space is counted in bytes by :class:`mmcore.cache.room.Room`: what is loaded, what is being loaded (as predicted,
corrected when it is there and again after its first inferences) and what is being unloaded. A copy with a lease out is
not evicted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from mmcore._ext.lru import Lru
from mmcore._ext.v2codec import Signature
from mmcore.cache.copies import Copy, CopyState
from mmcore.cache.counters import Counters
from mmcore.cache.eviction import POLICIES, TICKS_PER_S
from mmcore.cache.failures import Failures
from mmcore.cache.loads import Load, LoadQueue, Priority
from mmcore.cache.room import NOTHING, Footprint, Room
from mmcore.cache.sizes import Files, Sizes
from mmcore.cache.threads import LoaderThreads
from mmcore.errors import Cancelled, LoadFailed, MmcoreError, Overloaded, Unavailable, no_thread
from mmcore.log import event
from mmcore.model import ModelSource
from mmcore.runtimes import LoadedModel, load_model
from mmcore.runtimes.isolation import IsolatedModel
from mmcore.runtimes.size import give_back_freed
from mmcore.runtimes.warmup import warm_up
from mmcore.storage import Cancellation, Origin
from mmcore.storage.signature import signature

log = logging.getLogger(__name__)

LOADER_THREADS: Final = 2
#: Threads that find or pull files: they wait for a network, mostly.
FINDER_THREADS: Final = 8
#: How long a load waits for space that is in use before it gives up.
ROOM_WAIT_S: Final = 30.0
#: How long the instance waits for loads and unloads that run when it ends.
CLOSE_WAIT_S: Final = 10.0
#: How long a model stays given up that has made its worker processes crash again and again.
BROKEN_EXPIRY_S: Final = 60.0
#: A new copy is not evicted so soon: the request that waited for it must find it.
RESIDENCY_S: Final = 0.05
#: A new copy stays so long while others can go.
MIN_RESIDENCY_S: Final = 2.0
_TICK_S: Final = 0.5
#: How far back a last use before the start can be told.
_PAST_S: Final = 86_400.0
#: Copies that may be unloaded in one tick since they are idle.
_EXPIRED_AT_ONCE: Final = 64


def bind_signature(model: LoadedModel) -> Signature:
    """What checks the requests of a loaded model."""
    return Signature(model.inputs, any_name=model.any_input_name, accepts=model.accepts)


class Cache:
    """Loads, keeps and unloads copies.

    Attributes:
        lru: the loaded copies, least recently used first.
        room: the books of the space they take.
        failures: why loads failed.
        counted: what metrics tell of loads.
        sizes: what versions took in memory when they were loaded before.
        on_loaded: called with each copy that may be given requests from now on.
        on_gone: called with each copy that may not any more.
        on_state: called with a model's name and the state of its load when one begins, and with None and the error when
            it has ended without a copy.
        on_changed: called with name, version and state, as :meth:`state` gives it, whenever that has changed.
        on_evicted: what is called with each copy that is about to be unloaded to make room.
        on_failed: called with name, version and error of each failure that is remembered.

    ``capacity_bytes`` and ``device_bytes`` are what copies may take together, of the host's memory and of a device's.
    ``eviction`` is one of :data:`mmcore.cache.eviction.POLICIES`. A new copy stays for ``min_residency_s`` while others
    can go, and one that is not used for ``idle_timeout_s`` (0: never) is unloaded; a model's settings may say otherwise
    for it. ``sizes_file`` keeps what was learned of sizes from one start to the next; ``predict``, called in a thread,
    tells what a model will take that was not loaded before, None where it cannot. ``warm`` has a loaded model answer
    what its settings say before it serves.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        device_bytes: int = 0,
        load: Callable[[ModelSource], LoadedModel] = load_model,
        bind: Callable[[LoadedModel], Signature] = bind_signature,
        loader_threads: int = LOADER_THREADS,
        eviction: str = "cost",
        room_wait_s: float = ROOM_WAIT_S,
        residency_s: float = RESIDENCY_S,
        min_residency_s: float = MIN_RESIDENCY_S,
        idle_timeout_s: float = 0.0,
        sizes_file: Path | None = None,
        predict: Callable[[ModelSource], int | None] = lambda source: None,
        warm: Callable[[ModelSource, LoadedModel, Signature], None] = warm_up,
        unloader_threads: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lru: Final = Lru()
        self.failures: Final = Failures(clock)
        self.sizes: Final = Sizes(sizes_file)
        self._eviction = POLICIES[eviction](self.lru)
        self.room: Final = Room(self.lru, Footprint(capacity_bytes, device_bytes), self._eviction, self._evict)
        self.on_loaded: Callable[[Copy], None] = lambda copy: None
        self.on_gone: Callable[[Copy], None] = lambda copy: None
        self.on_state: Callable[[str, CopyState | None, MmcoreError | None], None] = lambda name, state, error: None
        self.on_changed: Callable[[str, str, CopyState | None], None] = lambda name, version, state: None
        self.on_evicted: Final[list[Callable[[Copy], None]]] = []
        self.on_failed: Callable[[str, str, MmcoreError], None] = lambda name, version, error: None
        self.counted: Final = Counters()
        self._load_model = load
        self._bind = bind
        self._warm = warm
        self.loader_threads = loader_threads
        self._most_loads = loader_threads
        self._predict = predict
        self._finders = LoaderThreads(FINDER_THREADS, "mmcore-find")
        self._loaders = LoaderThreads(loader_threads, "mmcore-load")
        # Its own, so that space is given back although all others are at long loads.
        self._unloaders = LoaderThreads(unloader_threads, "mmcore-unload")
        self._finding = LoadQueue(FINDER_THREADS)
        self._opening = LoadQueue(loader_threads)
        self._room_wait_s = room_wait_s
        self._residency_s = residency_s
        self._min_residency_s = min_residency_s
        self._idle_timeout_s = idle_timeout_s
        self._clock = clock
        self._began = clock() - _PAST_S
        self._ticking: asyncio.TimerHandle | None = None
        #: Copies whose settings say how long they may be idle.
        self._own_timeouts: set[Copy] = set()
        self._loads: dict[tuple[str, str], Load] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unloading: set[Copy] = set()
        self._closing: set[asyncio.Future[None]] = set()
        #: By model: loads that run, given up or not, and copies and models that are being unloaded.
        self._under_way: Counter[str] = Counter()
        self._settled: asyncio.Future[None] | None = None
        self._closed = False

    def resize(self, capacity_bytes: int, loads_at_once: int) -> None:
        """Take what a runtime has told of itself: it is known only when the runtime is there.

        At most as many loads are made at once as there are loader threads.
        """
        self.room.capacity = self.room.capacity._replace(host=capacity_bytes)
        loads_at_once = min(loads_at_once, self._most_loads)
        self._opening.resize(loads_at_once - self.loader_threads)
        self.loader_threads = loads_at_once
        self.room.wake()

    # What is there.

    @property
    def capacity_bytes(self) -> int:
        """What copies may take of the host's memory together."""
        return self.room.capacity.host

    @property
    def used_bytes(self) -> int:
        """Loaded, being loaded and being unloaded together, of the host's memory."""
        return self.room.used.host

    @property
    def oldest_idle_s(self) -> float | None:
        """For how long the least recently used copy has not been used; None without copies."""
        oldest = self.lru.oldest()
        return self._idle_s(oldest) if isinstance(oldest, Copy) else None

    @property
    def loading(self) -> int:
        """Loads under way, those that wait for their turn included."""
        return len(self._loads)

    def state(self, name: str, version: str) -> CopyState | None:
        """The state of a version; None where it is neither here nor on its way, nor has failed.

        A copy that serves while its successor is loaded is LOADED.
        """
        key = (name, version)
        if key in self.lru:
            return CopyState.LOADED
        if key in self._loads:
            return self._loads[key].state
        if any(copy.key == key for copy in self._unloading):
            return CopyState.UNLOADING
        return CopyState.FAILED if self.failures.last(name, version) else None

    def unloading(self, name: str) -> list[Copy]:
        """The copies of a model that finish their requests or are being closed."""
        return [copy for copy in self._unloading if copy.name == name]

    async def settled(self, *names: str) -> None:
        """Wait until no load of these models runs, dropped ones included, and none of their copies is being unloaded.

        The memory of a model that has been unloaded, or whose load was given up, has been given back by then. Without
        names it is that of all models.
        """
        while any(self._under_way[name] for name in names) if names else self._under_way:
            if self._settled is None:
                self._settled = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._settled)

    def _began_one(self, name: str) -> None:
        self._under_way[name] += 1

    def _ended_one(self, name: str) -> None:
        self._under_way[name] -= 1
        if not self._under_way[name]:
            del self._under_way[name]
            if self._settled is not None:
                self._settled.set_result(None)
                self._settled = None

    async def predict(self, name: str, version: str, origin: Origin) -> int:
        """What a version will take of the host's memory, in bytes, by what is known of it before it is loaded.

        Raises:
            LoadFailed, NotFound, Unavailable: its files are not to be had.
        """
        source, _, files = await self._finders.run(_find, name, version, origin, self._predict)
        return self.sizes.predict(source, files)

    # Loading.

    def load(
        self,
        name: str,
        version: str,
        origin: Origin,
        *,
        priority: Priority = Priority.REQUEST,
        idle_s: float | None = None,
    ) -> asyncio.Future[Copy]:
        """The version's copy, loaded if need be: joins the load under way, answers a failure that has not expired.

        A load of more urgent ``priority`` makes the one it joins as urgent. The future is the caller's own, to be
        cancelled at its deadline; that leaves the load to the other waiters. A load that nobody waits for is given up,
        its download too, before the framework is at it; then it is finished, so that callers who try again find the
        copy. It ends with
        LoadFailed, NotFound (the version is gone), Overloaded (no room) or Unavailable (the files are being changed, or
        the instance stops).

        With ``idle_s``, for how long the model has not been used, it is loaded into free room alone and takes its place
        among the copies by that; it ends with Cancelled where that is not to be had. A load without it that joins makes
        an end of that.
        """
        load = self._loads.get((name, version))
        if load is None:
            waiter: asyncio.Future[Copy] = asyncio.get_running_loop().create_future()
            copy = self.lru.get((name, version))
            error = self.failures.current(name, version)
            if copy is not None:
                assert isinstance(copy, Copy)
                waiter.set_result(copy)
                return waiter
            if error is not None:
                waiter.set_exception(error)
                return waiter
            load = self._start(name, version, origin, priority, replacing=False, idle_s=idle_s)
        joined = load.wait()
        joined.add_done_callback(partial(self._left, load))
        if idle_s is None:
            load.idle_s = None
        if priority < load.priority:
            load.priority = priority
            self._reconsider(load)
        return joined

    def _left(self, load: Load, waiter: asyncio.Future[Copy]) -> None:
        if waiter.cancelled() and load.unwanted:
            self._reconsider(load)

    def _reconsider(self, load: Load) -> None:
        """Its place among those that wait has changed, or nobody waits for it any more."""
        if load.unwanted:
            load.given_up.set()
        self._finding.moved(load)
        self._opening.moved(load)
        self.room.wake()

    async def replace(self, name: str, version: str, origin: Origin) -> Copy:
        """Load the version afresh from ``origin``; the copy that is here serves until the new one is ready.

        The errors are those of :meth:`load`; the old copy stays after any of them.
        """
        while (load := self._loads.get((name, version))) is not None:
            # One load at a time; what it ends with is its own waiters' business.
            await asyncio.wait([load.wait()])
        return await self._start(name, version, origin, Priority.PRELOAD, replacing=True).wait()

    def drop_loads(self, name: str, error: MmcoreError) -> None:
        """Answer all who wait for loads of a model with ``error`` and let go of what is being loaded."""
        for load in [load for load in self._loads.values() if load.name == name]:
            load.drop(error)
            # A later load of the same version starts anew.
            del self._loads[load.name, load.version]
            self._reconsider(load)
            self._tell(load.name, load.version)

    def _start(
        self,
        name: str,
        version: str,
        origin: Origin,
        priority: Priority,
        *,
        replacing: bool,
        idle_s: float | None = None,
    ) -> Load:
        load = Load(name, version, origin, priority, replacing=replacing, idle_s=idle_s)
        self._loads[name, version] = load
        task = asyncio.get_running_loop().create_task(self._run(load), name=f"load {name}/{version}")
        self._tasks.add(task)
        self._began_one(name)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._ended_one(name)

        task.add_done_callback(ended)
        log.info("loading model %s version %s", name, version, extra=event("loading", model=name, version=version))
        self.on_state(name, load.state, None)
        self._tell(name, version)
        return load

    async def _run(self, load: Load) -> None:
        copy, error = None, None
        try:
            copy = await self._bring(load)
        except MmcoreError as failure:
            error = failure
            if isinstance(failure, LoadFailed) and load.dropped is None:
                log.warning(
                    "model %s version %s was not loaded: %s", load.name, load.version, failure,
                    extra=event("load_failed", model=load.name, version=load.version, reason=str(failure)),
                )  # fmt: skip
                self._failed(load.name, load.version, failure)
        except asyncio.CancelledError:
            error = Unavailable("this instance is shutting down")
            raise
        except Exception as failure:
            log.exception("loading model %s version %s", load.name, load.version)
            error = no_thread(failure)
            if error is None:
                error = LoadFailed(f"{type(failure).__name__}: {failure}")
                self._failed(load.name, load.version, error)
        finally:
            if self._loads.get((load.name, load.version)) is load:
                del self._loads[load.name, load.version]
                self._tell(load.name, load.version)
                if error is not None:
                    self.on_state(load.name, None, error)
            load.settle(copy, error)

    def _failed(self, name: str, version: str, error: MmcoreError, **expiry: float) -> None:
        self.counted.failures += 1
        self.failures.remember(name, version, error, **expiry)
        self.on_failed(name, version, error)

    def _tell(self, name: str, version: str) -> None:
        self.on_changed(name, version, self.state(name, version))

    def _enter(self, load: Load, state: CopyState) -> None:
        load.state = state
        if self._loads.get((load.name, load.version)) is load:
            self._tell(load.name, load.version)

    async def _bring(self, load: Load) -> Copy:
        """The loaded copy, published."""
        async with self._finding.turn(load):
            if self._closed:
                raise Unavailable("this instance is shutting down")
            load.spent("queue_s")
            self._enter(load, CopyState.PULLING)
            source, stamp, files = await self._found(load)
        load.spent("find_s")
        load.check_wanted()
        serving = self.lru.get((load.name, load.version))
        if isinstance(serving, Copy) and stamp and (serving.files, serving.source) == (stamp, source):
            # Something else changed in the model's folder.
            return serving
        self._check_idle(load, source)
        self._enter(load, CopyState.LOADING)
        predicted = self.sizes.predict(source, files)
        if source.settings.size_bytes is None:
            # A guess refuses nobody: whether it is too large is found out.
            predicted = min(predicted, self.capacity_bytes)
        needed = Footprint(predicted, source.settings.device_bytes)
        self.room.check(load.name, needed)
        opened = await self._open_in_turn(load, source, needed)
        if opened is None:
            # It waits for room without a turn, so that it is in nobody's way.
            await self.room.reserve(load, needed, self._room_wait_s)
            load.spent("room_s")
            opened = await self._open_in_turn(load, source, needed, reserved=True)
            assert opened is not None
        model, bound = opened
        took = Footprint(max(0, model.size_bytes), needed.device)
        try:
            load.check_dropped()
            self.sizes.learn(source, files, took.host)
            self.room.check(load.name, took)
            self.room.check_free(load, took)
        except MmcoreError as error:
            if isinstance(error, Overloaded):
                # Learnt only by loading it, so it is remembered like any other cause.
                self._failed(load.name, load.version, error)
            self._discard(load.name, model, took)
            raise
        copy = Copy(
            source, model, bound,
            files=stamp, weight=took.host, device_bytes=took.device, on_idle=self._idle, on_grown=self._grown,
        )  # fmt: skip
        self._publish(copy, load)
        return copy

    async def _found(self, load: Load) -> tuple[ModelSource, bytes, Files]:
        """What :func:`_find` gives; it looks again where somebody came after all others had left."""
        while True:
            try:
                return await self._finders.run(
                    _find, load.name, load.version, load.origin, self._predict, load.given_up
                )
            except Cancelled:
                load.check_wanted()
                load.given_up = Cancellation()

    def _check_idle(self, load: Load, source: ModelSource) -> None:
        """Raise Cancelled where a model loaded ahead would be unloaded at once, being idle for so long."""
        own_s = source.settings.idle_timeout_s
        timeout_s = self._idle_timeout_s if own_s is None else own_s
        if load.idle_s is not None and 0 < timeout_s <= load.idle_s and not source.settings.pinned:
            raise Cancelled(f"model '{load.name}' has not been used for {load.idle_s:.0f} s, it would be unloaded")

    async def _open_in_turn(
        self, load: Load, source: ModelSource, needed: Footprint, *, reserved: bool = False
    ) -> tuple[LoadedModel, Signature] | None:
        """The model, opened in a loader thread; None where there is no room at once. Space is made in the turn alone.

        A reservation has ended when this does.
        """
        try:
            async with self._opening.turn(load):
                load.spent("queue_s")
                reserved = reserved or self.room.take(load, needed)
                opened = await self._loaders.run(self._open, load, source) if reserved else None
                load.spent("open_s" if reserved else "room_s")
                return opened
        finally:
            if reserved:
                self.room.give_back(needed)

    def _open(self, load: Load, source: ModelSource) -> tuple[LoadedModel, Signature]:
        """In a loader thread: the model, checked to come from files that stayed as they were."""
        try:
            model = self._load_model(source)
        except SystemExit as error:
            raise LoadFailed(f"model '{source.name}' ended with SystemExit: {error}") from error
        try:
            load.origin.confirm(load.name)
            bound = self._bind(model)
            self._warm(source, model, bound)
            return model, bound
        except BaseException:
            model.close()
            raise

    def _publish(self, copy: Copy, load: Load) -> None:
        """Put a copy in the place of the one that served before, in one step of the loop."""
        self.failures.clear(copy.name, copy.version)
        before = self.lru.get(copy.key)
        if before is not None:
            assert isinstance(before, Copy)
            self._retire(before)
        self._tick()
        # What it takes beyond the prediction is taken already: room is made without waiting.
        self.room.evict(Footprint(copy.weight, copy.device_bytes))
        settings = copy.source.settings
        residency_s = self._min_residency_s if settings.min_residency_s is None else settings.min_residency_s
        if load.idle_s is None:
            self.lru.add(copy)
        else:
            residency_s = 0.0
            self.lru.add(copy, self.lru.now - int(min(load.idle_s, _PAST_S) * TICKS_PER_S))
        self.room.device_loaded += copy.device_bytes
        self._eviction.added(copy, load.times.work_s, residency_s)
        if settings.idle_timeout_s is not None:
            self._own_timeouts.add(copy)
        copy.resident = True
        copy.pin()
        asyncio.get_running_loop().call_later(self._residency_s, self._end_residency, copy)
        if isinstance(copy.model, IsolatedModel):
            loop = asyncio.get_running_loop()
            copy.model.watch_broken(partial(_call_soon, loop, self._broken, copy))
        self.on_loaded(copy)
        if before is not None:
            self._let_go(before)
        load.spent("publish_s")
        copy.times = load.times
        self.counted.loaded(copy)
        log.info(
            "loaded model %s version %s, %d bytes; seconds: %s",
            copy.name, copy.version, copy.weight,
            ", ".join(f"{stage.removesuffix('_s')} {spent:.4f}" for stage, spent in copy.times._asdict().items()),
            extra=event("loaded", model=copy.name, version=copy.version, bytes=copy.weight, **copy.times._asdict()),
        )  # fmt: skip

    def _broken(self, copy: Copy, error: LoadFailed) -> None:
        """A copy's worker process cannot be kept: the copy goes, and its loads are answered with that for a while."""
        if copy.state is CopyState.LOADED:
            log.warning(
                "model %s version %s is given up: %s", copy.name, copy.version, error,
                extra=event("given_up", model=copy.name, version=copy.version, reason=str(error)),
            )  # fmt: skip
            self._failed(copy.name, copy.version, error, first_s=BROKEN_EXPIRY_S)
            self.unload(copy)

    def _end_residency(self, copy: Copy) -> None:
        if copy.resident:
            copy.resident = False
            copy.release()

    def _grown(self, copy: Copy, growth: int) -> None:
        """A copy takes more since it has answered its first requests."""
        if copy.state is CopyState.LOADED and copy.source.settings.size_bytes is None:
            self.lru.reweigh(copy, copy.weight + growth)
            self.room.evict(Footprint(0), spared=copy)

    # Time.

    def _tick(self) -> None:
        """Move the list's time on, again and again while there are copies, and unload those that have been idle."""
        self.lru.now = int((self._clock() - self._began) * TICKS_PER_S)
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        if not self._closed:
            self._expire()
            # A load took more than it was predicted to while all others were in use.
            self.room.evict(NOTHING)
            self._ticking = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _expire(self) -> None:
        for copy in [copy for copy in self._own_timeouts if not copy.pins]:
            timeout_s = copy.source.settings.idle_timeout_s
            if timeout_s and self._idle_s(copy) >= timeout_s:
                self._unload_idle(copy)
        if not self._idle_timeout_s:
            return
        for oldest in self.lru.oldest_of(_EXPIRED_AT_ONCE + len(self._own_timeouts)):
            assert isinstance(oldest, Copy)
            if self._idle_s(oldest) < self._idle_timeout_s:
                break
            if oldest.source.settings.idle_timeout_s is None and not oldest.source.settings.pinned:
                self._unload_idle(oldest)

    def _idle_s(self, copy: Copy) -> float:
        return (self.lru.now - copy.used_at) / TICKS_PER_S

    def _unload_idle(self, copy: Copy) -> None:
        log.info(
            "unloading model %s version %s, idle for %.0f s", copy.name, copy.version, self._idle_s(copy),
            extra=event("idle", model=copy.name, version=copy.version),
        )  # fmt: skip
        self.unload(copy)

    # Unloading.

    def _evict(self, copy: Copy) -> None:
        self.counted.evicted_idle_seconds.observe(self._idle_s(copy))
        for tell in self.on_evicted:
            tell(copy)
        self.unload(copy)

    def unload(self, copy: Copy) -> None:
        """Give the copy no more requests, and close it when its last lease is returned."""
        if copy.state is CopyState.LOADED:
            self._retire(copy)
            self._let_go(copy)
            self._tell(copy.name, copy.version)

    def _retire(self, copy: Copy) -> None:
        copy.state = CopyState.UNLOADING
        self._eviction.removed(copy)
        self.lru.remove(copy)
        self._own_timeouts.discard(copy)
        self._unloading.add(copy)
        self._began_one(copy.name)
        self.room.device_loaded -= copy.device_bytes
        self.room.leaves(Footprint(copy.weight, copy.device_bytes))

    def _let_go(self, copy: Copy) -> None:
        self.on_gone(copy)
        if copy.pins == 0:
            self._close_copy(copy)

    def _idle(self, copy: Copy) -> None:
        """A copy's last lease is back."""
        if copy.state is CopyState.UNLOADING:
            self._close_copy(copy)
        else:
            self.room.wake()

    def _close_copy(self, copy: Copy) -> None:
        model = copy.model
        # Both would keep the model alive as long as anybody keeps the copy.
        del copy.model
        copy.prepared = None
        self._close(model, Footprint(copy.weight, copy.device_bytes), copy.name, copy)

    def _discard(self, name: str, model: LoadedModel, size: Footprint) -> None:
        """Close a model that was never published."""
        self._began_one(name)
        self.room.leaves(size)
        self._close(model, size, name)

    def _close(self, model: LoadedModel, size: Footprint, name: str, copy: Copy | None = None) -> None:
        """Close a model in a thread; its space, counted as being unloaded, is free when that is done."""
        closing = self._unloaders.run(_close, model, size.host, self.counted)
        self._closing.add(closing)

        def closed(_: object) -> None:
            self._closing.discard(closing)
            if copy is not None:
                self._unloading.discard(copy)
                log.info(
                    "unloaded model %s version %s, %d bytes", copy.name, copy.version, copy.weight,
                    extra=event("unloaded", model=copy.name, version=copy.version, bytes=copy.weight),
                )  # fmt: skip
                self._tell(name, copy.version)
            self.room.left(size)
            self._ended_one(name)

        closing.add_done_callback(closed)

    async def close(self) -> None:
        """Give up queued loads, wait for those that run, and unload every copy that nobody uses.

        What has not ended after some seconds is left to its thread.
        """
        self._closed = True
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        for load in list(self._loads.values()):
            load.drop(Unavailable("this instance is shutting down"))
            self._reconsider(load)
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=CLOSE_WAIT_S)
        for copy in list(self.lru):
            assert isinstance(copy, Copy)
            self.unload(copy)
            self._end_residency(copy)
        if self._closing:
            await asyncio.wait(list(self._closing), timeout=CLOSE_WAIT_S)
        left = len(self._tasks) + len(self._unloading)
        if left:
            log.warning("%d models are still being loaded, used or unloaded; leaving them behind", left)
        else:
            for threads in (self._finders, self._loaders, self._unloaders):
                threads.stop()
        await asyncio.to_thread(self.sizes.save)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: object) -> None:
    """From another thread: have ``call`` made on the loop, unless that is closed and nothing is left to be told."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)


def _find(
    name: str,
    version: str,
    origin: Origin,
    predict: Callable[[ModelSource], int | None],
    given_up: Cancellation | None = None,
) -> tuple[ModelSource, bytes, Files]:
    """In a finder thread: where the files are, their signature, and what their size in memory can be told by.

    The signature is empty where the version has no folder of its own, so that its files cannot be told from others.
    """
    source = origin.source(name, version, given_up)
    folder = next((parent for parent in (source.path, source.path.parent) if parent.name == version), None)
    stamp = signature(folder).digest if folder is not None else b""
    files = Files(source)
    files.predicted = predict(source)
    return source, stamp, files


def _close(model: LoadedModel, size: int, counted: Counters) -> None:
    """In a thread of its own: let the framework free its memory."""
    began = time.monotonic()
    try:
        model.close()
    except Exception:
        counted.unload_failures += 1
        log.exception("closing a model of platform %s", model.platform)
    counted.unload_seconds.observe(time.monotonic() - began)
    give_back_freed(size)
