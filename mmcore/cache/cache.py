"""The copies held by this instance: loads, one at a time for each version, eviction when capacity is reached, unloads.

Everything happens on the event loop; only the framework's own work (finding the files, loading, closing) is done in a
small pool of loader threads, never in those that serve.

Space is counted in bytes: what is loaded, what is being loaded (as predicted from its files, corrected when it is
there) and what is being unloaded, which is not free before the model is closed. A copy with a lease out is not evicted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from mmcore._ext.lru import Lru
from mmcore._ext.v2codec import Signature
from mmcore.cache.copies import Copy, CopyState
from mmcore.cache.failures import Failures
from mmcore.cache.threads import LoaderThreads
from mmcore.errors import Cancelled, LoadFailed, MmcoreError, Overloaded, Unavailable
from mmcore.model import ModelSource
from mmcore.runtimes import LoadedModel, load_model
from mmcore.runtimes.isolation import Isolated, IsolatedGroup
from mmcore.runtimes.size import disk_size
from mmcore.runtimes.warmup import warm_up
from mmcore.storage import Origin
from mmcore.storage.signature import signature

log = logging.getLogger(__name__)

LOADER_THREADS: Final = 2
#: How long a load waits for space that is in use before it gives up.
ROOM_WAIT_S: Final = 30.0
#: How long the instance waits for loads and unloads that run when it ends.
CLOSE_WAIT_S: Final = 10.0
#: How long a model stays given up that has made its worker processes crash again and again.
BROKEN_EXPIRY_S: Final = 60.0
#: A new copy is not evicted so soon: the request that waited for it must find it.
RESIDENCY_S: Final = 0.05


def bind_signature(model: LoadedModel) -> Signature:
    """What checks the requests of a loaded model."""
    return Signature(model.inputs, any_name=model.any_input_name, accepts=model.accepts)


class _Load:
    """One load under way and those who wait for it."""

    __slots__ = ("dropped", "name", "origin", "replacing", "state", "version", "waiters")

    def __init__(self, name: str, version: str, origin: Origin, *, replacing: bool) -> None:
        self.name = name
        self.version = version
        self.origin = origin
        self.replacing = replacing
        self.state = CopyState.QUEUED
        self.waiters: list[asyncio.Future[Copy]] = []
        #: Why its result is not wanted any more.
        self.dropped: MmcoreError | None = None

    def wait(self) -> asyncio.Future[Copy]:
        """A future of one waiter's own: cancelling it touches nobody else."""
        waiter: asyncio.Future[Copy] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        return waiter

    def settle(self, copy: Copy | None, error: MmcoreError | None) -> None:
        """Tell the waiters that are still there."""
        for waiter in self.waiters:
            if waiter.done():
                continue
            if error is not None:
                waiter.set_exception(type(error)(str(error)))
            else:
                assert copy is not None
                waiter.set_result(copy)
        self.waiters.clear()

    def drop(self, error: MmcoreError) -> None:
        """Answer the waiters with ``error`` now and let go of the result when it comes."""
        self.dropped = error
        self.settle(None, error)


class Cache:
    """Loads, keeps and unloads copies.

    Attributes:
        lru: the loaded copies, least recently used first.
        capacity_bytes: what they may take together.
        failures: why loads failed.
        on_loaded: called with each copy that may be given requests from now on.
        on_gone: called with each copy that may not any more.
        on_state: called with a model's name and the state of its load when one begins, and with None and the error when
            it has ended without a copy.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        load: Callable[[ModelSource], LoadedModel] = load_model,
        bind: Callable[[LoadedModel], Signature] = bind_signature,
        loader_threads: int = LOADER_THREADS,
        room_wait_s: float = ROOM_WAIT_S,
        residency_s: float = RESIDENCY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lru: Final = Lru()
        self.capacity_bytes = capacity_bytes
        self.failures: Final = Failures(clock)
        self.on_loaded: Callable[[Copy], None] = lambda copy: None
        self.on_gone: Callable[[Copy], None] = lambda copy: None
        self.on_state: Callable[[str, CopyState | None, MmcoreError | None], None] = lambda name, state, error: None
        self._load_model = load
        self._bind = bind
        self._threads = LoaderThreads(loader_threads)
        self._slots = asyncio.Semaphore(loader_threads)
        self._room_wait_s = room_wait_s
        self._residency_s = residency_s
        self._loads: dict[tuple[str, str], _Load] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unloading: set[Copy] = set()
        self._closing: set[asyncio.Future[None]] = set()
        self._reserved_bytes = 0
        self._unloading_bytes = 0
        # One load makes room at a time and in order: a large one is not starved by small ones.
        self._room_lock = asyncio.Lock()
        self._changed: asyncio.Future[None] | None = None
        self._closed = False

    # What is there.

    @property
    def used_bytes(self) -> int:
        """Loaded, being loaded and being unloaded together."""
        return self.lru.total + self._reserved_bytes + self._unloading_bytes

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

    # Loading.

    def load(self, name: str, version: str, origin: Origin) -> asyncio.Future[Copy]:
        """The version's copy, loaded if need be: joins the load under way, answers a failure that has not expired.

        The future is the caller's own; cancelling it leaves the load to the other waiters, and a load still queued is
        given up when nobody waits for it. It ends with LoadFailed, NotFound (the version is gone), Overloaded (no room)
        or Unavailable (the files are being changed, or the instance stops).
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
            load = self._start(name, version, origin, replacing=False)
        joined = load.wait()
        joined.add_done_callback(self._left)
        return joined

    def _left(self, waiter: asyncio.Future[Copy]) -> None:
        if waiter.cancelled():
            # A load that waits for room looks whether anybody still waits for it.
            self._wake()

    async def replace(self, name: str, version: str, origin: Origin) -> Copy:
        """Load the version afresh from ``origin``; the copy that is here serves until the new one is ready.

        The errors are those of :meth:`load`; the old copy stays after any of them.
        """
        while (load := self._loads.get((name, version))) is not None:
            # One load at a time; what it ends with is its own waiters' business.
            await asyncio.wait([load.wait()])
        return await self._start(name, version, origin, replacing=True).wait()

    def drop_loads(self, name: str, error: MmcoreError) -> None:
        """Answer all who wait for loads of a model with ``error`` and let go of what is being loaded."""
        for load in [load for load in self._loads.values() if load.name == name]:
            load.drop(error)
            # A later load of the same version starts anew.
            del self._loads[load.name, load.version]

    def _start(self, name: str, version: str, origin: Origin, *, replacing: bool) -> _Load:
        load = _Load(name, version, origin, replacing=replacing)
        self._loads[name, version] = load
        self.on_state(name, load.state, None)
        task = asyncio.get_running_loop().create_task(self._run(load), name=f"load {name}/{version}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return load

    async def _run(self, load: _Load) -> None:
        copy, error = None, None
        try:
            copy = await self._bring(load)
        except MmcoreError as failure:
            error = failure
            if isinstance(failure, LoadFailed) and load.dropped is None:
                self.failures.remember(load.name, load.version, failure)
                log.warning("model %s version %s was not loaded: %s", load.name, load.version, failure)
        except asyncio.CancelledError:
            error = Unavailable("this instance is shutting down")
            raise
        except Exception as failure:
            log.exception("loading model %s version %s", load.name, load.version)
            error = LoadFailed(f"{type(failure).__name__}: {failure}")
            self.failures.remember(load.name, load.version, error)
        finally:
            if self._loads.get((load.name, load.version)) is load:
                del self._loads[load.name, load.version]
                if error is not None:
                    self.on_state(load.name, None, error)
            load.settle(copy, error)

    async def _bring(self, load: _Load) -> Copy:
        """The loaded copy, published."""
        async with self._slots:
            if self._closed:
                raise Unavailable("this instance is shutting down")
            self._check_wanted(load)
            load.state = CopyState.LOADING
            source, files, predicted = await self._threads.run(_prepare, load)
            self._check_wanted(load)
            serving = self.lru.get((load.name, load.version))
            if isinstance(serving, Copy) and files and (serving.files, serving.source) == (files, source):
                # Something else changed in the model's folder.
                return serving
            self._check_size(source, predicted)
            reserved = await self._reserve(load, predicted)
            try:
                model, bound = await self._threads.run(self._open, load, source)
            finally:
                self._reserved_bytes -= reserved
                self._wake()
        weight = max(0, model.size_bytes)
        try:
            self._check_dropped(load)
            self._check_size(source, weight)
        except Overloaded as error:
            # Learnt only by loading it, so it is remembered like any other cause.
            self.failures.remember(load.name, load.version, error)
            self._discard(model, weight)
            raise
        except MmcoreError:
            self._discard(model, weight)
            raise
        copy = Copy(source, model, bound, files=files, weight=weight, on_idle=self._idle)
        self._publish(copy)
        return copy

    def _open(self, load: _Load, source: ModelSource) -> tuple[LoadedModel, Signature]:
        """In a loader thread: the model, checked to come from files that stayed as they were."""
        try:
            model = self._load_model(source)
        except SystemExit as error:
            raise LoadFailed(f"model '{source.name}' ended with SystemExit: {error}") from error
        try:
            load.origin.confirm(load.name)
            bound = self._bind(model)
            for one in model.members if isinstance(model, IsolatedGroup) else (model,):
                warm_up(source, one, bound)
            return model, bound
        except BaseException:
            model.close()
            raise

    def _check_dropped(self, load: _Load) -> None:
        if load.dropped is not None:
            raise type(load.dropped)(str(load.dropped))

    def _check_wanted(self, load: _Load) -> None:
        self._check_dropped(load)
        if load.waiters and all(waiter.done() for waiter in load.waiters):
            raise Cancelled("nobody waits for this load any more")

    def _check_size(self, source: ModelSource, size: int) -> None:
        if size > self.capacity_bytes:
            raise Overloaded(
                f"model '{source.name}' takes {size} bytes, which is more than the capacity of "
                f"{self.capacity_bytes} bytes"
            )

    def _publish(self, copy: Copy) -> None:
        """Put a copy in the place of the one that served before, in one step of the loop."""
        self.failures.clear(copy.name, copy.version)
        before = self.lru.get(copy.key)
        if before is not None:
            assert isinstance(before, Copy)
            self._retire(before)
        # What it takes beyond the prediction is taken already: room is made without waiting.
        self._evict(copy.weight)
        self.lru.add(copy)
        copy.resident = True
        copy.pin()
        asyncio.get_running_loop().call_later(self._residency_s, self._end_residency, copy)
        log.info("loaded model %s version %s, %d bytes", copy.name, copy.version, copy.weight)
        if isinstance(copy.model, Isolated):
            loop = asyncio.get_running_loop()
            copy.model.watch_broken(partial(_call_soon, loop, self._broken, copy))
        self.on_loaded(copy)
        if before is not None:
            self._let_go(before)

    def _broken(self, copy: Copy, error: LoadFailed) -> None:
        """A copy's worker process cannot be kept: the copy goes, and its loads are answered with that for a while."""
        if copy.state is CopyState.LOADED:
            self.failures.remember(copy.name, copy.version, error, first_s=BROKEN_EXPIRY_S)
            log.warning("model %s version %s is given up: %s", copy.name, copy.version, error)
            self.unload(copy)

    def _end_residency(self, copy: Copy) -> None:
        if copy.resident:
            copy.resident = False
            copy.release()

    # Room.

    async def _reserve(self, load: _Load, size: int) -> int:
        """Wait until ``size`` bytes are free, count them as taken and return them.

        Raises:
            Overloaded: models in use hold the space for too long.
        """
        async with self._room_lock:
            if load.replacing and (serving := self.lru.get((load.name, load.version))) is not None:
                # It serves until the new one is there, unless nothing else can go.
                self.lru.touch(serving)
            try:
                async with asyncio.timeout(self._room_wait_s):
                    self._evict(size)
                    while self.used_bytes + size > self.capacity_bytes:
                        self._changed = asyncio.get_running_loop().create_future()
                        await self._changed
                        self._check_wanted(load)
                        self._evict(size)
            except TimeoutError:
                raise Overloaded(
                    f"no room for model '{load.name}': it needs {size} bytes, and of the capacity of "
                    f"{self.capacity_bytes} bytes {self.used_bytes} are taken by models in use"
                ) from None
            self._reserved_bytes += size
            return size

    def _evict(self, size: int) -> None:
        """Unload the least recently used copies that nobody uses, until ``size`` bytes will be free."""
        while self.lru.total + self._reserved_bytes + size > self.capacity_bytes:
            oldest = self.lru.oldest()
            if oldest is None:
                return
            assert isinstance(oldest, Copy)
            log.info("evicting model %s version %s, %d bytes", oldest.name, oldest.version, oldest.weight)
            self.unload(oldest)

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # Unloading.

    def unload(self, copy: Copy) -> None:
        """Give the copy no more requests, and close it when its last lease is returned."""
        if copy.state is CopyState.LOADED:
            self._retire(copy)
            self._let_go(copy)

    def _retire(self, copy: Copy) -> None:
        copy.state = CopyState.UNLOADING
        self.lru.remove(copy)
        self._unloading.add(copy)
        self._unloading_bytes += copy.weight

    def _let_go(self, copy: Copy) -> None:
        self.on_gone(copy)
        if copy.pins == 0:
            self._close_copy(copy)

    def _idle(self, copy: Copy) -> None:
        """A copy's last lease is back."""
        if copy.state is CopyState.UNLOADING:
            self._close_copy(copy)
        else:
            self._wake()

    def _close_copy(self, copy: Copy) -> None:
        model = copy.model
        # Both would keep the model alive as long as anybody keeps the copy.
        del copy.model
        copy.prepared = None
        copy.prepared = None
        self._close(model, copy.weight, copy)

    def _discard(self, model: LoadedModel, weight: int) -> None:
        """Close a model that was never published."""
        self._unloading_bytes += weight
        self._close(model, weight, None)

    def _close(self, model: LoadedModel, weight: int, copy: Copy | None) -> None:
        """Close a model in a loader thread; its space, counted as being unloaded, is free when that is done."""
        closing = self._threads.run(_close, model)
        self._closing.add(closing)

        def closed(_: object) -> None:
            self._closing.discard(closing)
            self._unloading_bytes -= weight
            if copy is not None:
                self._unloading.discard(copy)
            self._wake()

        closing.add_done_callback(closed)

    async def close(self) -> None:
        """Give up queued loads, wait for those that run, and unload every copy that nobody uses.

        What has not ended after some seconds is left to its thread.
        """
        self._closed = True
        for load in list(self._loads.values()):
            load.drop(Unavailable("this instance is shutting down"))
        self._wake()
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
            self._threads.stop()


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: object) -> None:
    """From another thread: have ``call`` made on the loop, unless that is closed and nothing is left to be told."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)


def _prepare(load: _Load) -> tuple[ModelSource, bytes, int]:
    """In a loader thread: where the files are, their signature, and how many bytes the model may take.

    The signature is empty where the version has no folder of its own, so that its files cannot be told from others.
    """
    source = load.origin.source(load.name, load.version)
    folder = next((parent for parent in (source.path, source.path.parent) if parent.name == load.version), None)
    files = signature(folder).digest if folder is not None else b""
    return source, files, source.settings.size_bytes or disk_size(source.path)


def _close(model: LoadedModel) -> None:
    """In a loader thread: let the framework free its memory."""
    try:
        model.close()
    except Exception:
        log.exception("closing a model of platform %s", model.platform)
