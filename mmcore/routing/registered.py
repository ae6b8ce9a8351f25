"""The models of the registry as this instance serves them, and what it writes into their records.

A model that is only registered costs its record in the registry's table. The router is given a registration of it when
it is asked for, which goes again with its last copy or with the failure of its load.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any, Final, Protocol

from mmcore._ext.router import Registration
from mmcore.cache import Copy, CopyState, Priority
from mmcore.errors import AlreadyExists, Conflict, InvalidRequest, LoadFailed, MmcoreError, NotFound, Overloaded
from mmcore.log import event
from mmcore.model import ModelInfo
from mmcore.registry import ModelRecord, Registry
from mmcore.routing.actions import Haste
from mmcore.routing.catalog import Catalog
from mmcore.routing.copies_wanted import copies_wanted, same_model
from mmcore.routing.replica import catch_up
from mmcore.routing.reports import Reports
from mmcore.routing.router import Router
from mmcore.routing.status import ABSENT, ModelState, ModelStatus, loaded_copies, status_of
from mmcore.routing.vmodel_changes import AGE_WHEN_LOADED_NOW_MS, AGE_WHEN_REGISTERED_MS, info_of, new_record
from mmcore.storage import Origin

log = logging.getLogger(__name__)

#: The version of a registered model until its files have been seen.
FIRST_VERSION: Final = "1"
#: A last use is written when the one that is written is so much older.
LAST_USED_STALE_MS: Final = 3_600_000
#: How often failures and last uses are looked through.
SWEEP_S: Final = 60.0
#: Copies looked at between two looks at the loop's other work.
_SWEPT_AT_ONCE: Final = 500


def wall_ms() -> int:
    """Milliseconds of the epoch."""
    return time.time_ns() // 1_000_000


class Loads(Protocol):
    """Has models loaded: in this instance, or wherever the mesh finds best."""

    async def ensure(self, model: str, copies: int = 1, *, anew: bool = False) -> None:
        """Have so many copies of a registered model loaded, or as many as there can be; return when they are.

        ``anew``: whatever has failed before, but for the last moments.

        Raises:
            LoadFailed, Overloaded: it could not be loaded.
            NotFound: it is not registered any more.
            Unavailable: an instance stops, or the files are being changed.
        """


class LocalLoads:
    """Loads into this instance, which is all there is for an instance on its own."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def ensure(self, model: str, copies: int = 1, *, anew: bool = False) -> None:
        """One copy here, whatever number is asked for; see :class:`Loads`."""
        if anew:
            self._router.cache.failures.forgive(model)
        await self._router.load(model)


class Registered(Catalog):
    """The registered models of one instance; the router's catalog.

    Attributes:
        origin: gives their files. ``make_origin`` makes it of :meth:`info`, which loader threads call.
        loads: what has them loaded.
        barred: tells why a model, with its record, is not to be loaded now; None where it may be.
    """

    def __init__(
        self,
        registry: Registry,
        router: Router,
        make_origin: Callable[[Callable[[str], ModelInfo | None]], Origin],
        *,
        loads: Loads | None = None,
        clock_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self.origin = make_origin(self.info)
        self.loads: Loads = loads or LocalLoads(router)
        self.barred: Callable[[str, ModelRecord], str | None] = lambda name, record: None
        self._registry = registry
        self._router = router
        self._clock_ms = clock_ms
        self._reports = Reports(registry, clock_ms)
        #: As it stands in the records.
        self._own_id = json.dumps(registry.instance, ensure_ascii=False).encode()
        #: What the models that the router holds were registered as.
        self._held: dict[str, ModelInfo] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.Task[None] | None = None
        registry.models.listen(self._changed)
        router.catalog = self

    def start(self) -> None:
        """Follow last uses and failures from now on."""
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep(), name="sweep the registered models")

    async def close(self) -> None:
        """Stop what runs, and write what has not been written, when the router has been closed."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._reports.give_up_loads()
        await self._reports.close()

    # What callers ask.

    async def register(
        self,
        name: str,
        info: ModelInfo,
        *,
        load_now: bool = False,
        sync: bool = False,
        last_used_ms: int = 0,
        static: str = "",
    ) -> ModelStatus:
        """Register a model; the same again changes nothing but the copies asked for and, after an hour, its last use.

        ``last_used_ms`` orders it among others before it is used; 0: a while ago, longer if it is not to be loaded.
        ``sync`` waits for its load. The status tells of a failed load; that is no error. ``static`` is the file of
        static models that registers it; a model that others register as well is the file's no more.

        Raises:
            InvalidRequest: the name or the type is empty, or the key asks for copies in a way that cannot be.
            AlreadyExists: it is registered as something else, or a folder has a model of that name.
            Unavailable: the registry is away.
        """
        _check_name(name)
        if not info.type:
            raise InvalidRequest("Must provide non-empty model type string")
        if self._router.in_folder(name):
            raise AlreadyExists(
                f"Model already exists with different attribute values: {name}, in the folder of models"
            )
        now_ms = self._clock_ms()
        if last_used_ms:
            used_ms = min(last_used_ms, now_ms)
        else:
            used_ms = now_ms - (AGE_WHEN_LOADED_NOW_MS if load_now else AGE_WHEN_REGISTERED_MS)

        new, wanted = False, copies_wanted(info.key)

        def change(record: ModelRecord | None) -> ModelRecord:
            nonlocal new
            new = record is None
            if record is None:
                return replace(new_record(info), last_used_ms=used_ms, static=static)
            if not same_model(info_of(record), info):
                raise AlreadyExists(f"Model already exists with different attribute values: {name}")
            record = replace(
                record,
                key=info.key,
                min_copies=wanted.min_copies,
                max_copies=wanted.max_copies,
                everywhere=wanted.everywhere,
                static=record.static if static else "",
            )
            if used_ms > record.last_used_ms + LAST_USED_STALE_MS:
                return replace(record, last_used_ms=used_ms)
            return record

        await self._registry.models.update(name, change)
        if new:
            log.info(
                "registered model %s, type %s, path %s", name, info.type, info.path,
                extra=event("registered", model=name, type=info.type, path=info.path),
            )  # fmt: skip
        if load_now:
            return await self.ensure_loaded(name, sync=sync)
        if wanted.at_once:
            self.in_background(self.loads.ensure(name, wanted.at_once), f"ensure copies of {name}")
        return self.status(name)

    async def unregister(self, name: str) -> None:
        """Take a model out of the registry; every instance lets its copies go. An unknown one is no error.

        Raises:
            InvalidRequest: the name is empty.
            Conflict: vmodels refer to it.
            Unavailable: the registry is away.
        """
        _check_name(name)

        def change(record: ModelRecord | None) -> None:
            if record is not None and record.references > 0:
                raise Conflict(f"Model {name} has referents")

        await self._registry.models.update(name, change)

    async def ensure_loaded(self, name: str, *, sync: bool = False, last_used_ms: int = 0) -> ModelStatus:
        """Have a model loaded if it is not, and count it as used then, 0 being now; ``sync`` waits for it.

        Raises:
            InvalidRequest: the name is empty.
            Unavailable: with ``sync``, the load ended without an outcome: an instance stops, or files are changing.
        """
        status = await self.find(name)
        if status.state is ModelState.NOT_FOUND:
            return status
        self._reports.used(name, min(last_used_ms, self._clock_ms()) or self._clock_ms())
        self._router.touch(name)
        if status.state is ModelState.LOADED:
            return status
        anew = status.state is ModelState.LOADING_FAILED
        load = self.in_background(self.loads.ensure(name, anew=anew), f"ensure that {name} is loaded")
        if not sync:
            await asyncio.sleep(0)
            status = self.status(name)
            if load.done() or status.state in (ModelState.LOADED, ModelState.NOT_FOUND):
                return status
            # Where it is loaded may not have been decided yet.
            return replace(status, state=ModelState.LOADING)
        try:
            await asyncio.shield(load)
        except (LoadFailed, Overloaded) as error:
            return _told(self.status(name), str(error))
        except NotFound:
            # Unregistered meanwhile, which the status tells.
            pass
        return self.status(name)

    async def load_here(self, name: str, haste: Haste) -> None:
        """Load a model into this instance.

        Raises:
            NotFound, LoadFailed, Overloaded, Unavailable: as for :meth:`mmcore.routing.Router.load`.
            Cancelled: it was to be loaded into free room, of which there is not enough.
        """
        if name not in self._registry.models:
            # Whoever asks may have heard of it before us.
            await catch_up(self._registry.models, name)
        priority = Priority.REQUEST if haste in (Haste.NOW, Haste.ANEW) else Priority.PRELOAD
        if haste is Haste.ANEW:
            self._router.cache.failures.forgive(name)
        idle_s = None
        if haste is Haste.IF_ROOM and (record := self._registry.models.get(name)) is not None:
            idle_s = max(0, self._clock_ms() - record.last_used_ms) / 1000
        await self._router.load(name, priority=priority, idle_s=idle_s)

    def status(self, name: str) -> ModelStatus:
        """The state of a model and its copies, by what this instance knows."""
        record = self._registry.models.get(name)
        if record is None:
            return ABSENT
        return status_of(self._reports.merge(name, record), self.lives, self.barred(name, record))

    async def find(self, name: str) -> ModelStatus:
        """The same, with a look into the store where this instance knows of none.

        Raises:
            InvalidRequest: the name is empty.
            Unavailable: it knows of none, and the registry is away.
        """
        _check_name(name)
        if name not in self._registry.models:
            await catch_up(self._registry.models, name)
        return self.status(name)

    def told(self, name: str, record: ModelRecord) -> ModelRecord:
        """A model's record with what this instance is to say in it, written or not."""
        return self._reports.merge(name, record)

    def loaded_copies(self, name: str, record: ModelRecord | None) -> int:
        """How many copies of a model answer requests, by its record and what is not written yet."""
        return loaded_copies(self._reports.merge(name, record) if record is not None else None, self.lives)

    def lives(self, instance: str) -> bool:
        """Whether an instance is there; the copies of others have gone with them."""
        return instance == self._registry.instance or instance in self._registry.instances

    def in_background(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        """Run ``work`` whoever waits for it; its error is the waiters' business."""
        task = asyncio.get_running_loop().create_task(work, name=what)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                if isinstance(error, MmcoreError):
                    log.info("%s: %s", what, error)
                else:
                    log.error("%s", what, exc_info=error)

        task.add_done_callback(ended)
        return task

    # What the router asks and tells; see :class:`mmcore.routing.router.Catalog`.

    def __contains__(self, name: object) -> bool:
        return name in self._registry.models

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry.models)

    def __len__(self) -> int:
        return len(self._registry.models)

    def registration(self, name: str) -> Registration | None:
        """What the router needs of a registered model, made anew; None where there is none of that name."""
        return Registration(name, (FIRST_VERSION,), self.origin) if name in self._registry.models else None

    def held(self, name: str) -> None:
        """The router holds a registration of that model from now on."""
        record = self._registry.models.get(name)
        if record is not None:
            self._held[name] = info_of(record)

    @property
    def held_models(self) -> int:
        """How many of the registry's models the router holds."""
        return len(self._held)

    def let_go(self, name: str) -> None:
        """The router holds it no longer."""
        self._held.pop(name, None)

    def changed_state(self, name: str, state: CopyState | None, error: MmcoreError | None) -> None:
        """The copy here is in that state, None for gone, or has failed with ``error``."""
        if error is not None:
            self._reports.failed(name, str(error))
        else:
            size = sum(copy.weight for copy in self._router.copies(name)) if state is CopyState.LOADED else 0
            self._reports.copy(name, state, size)

    def gone(self, copy: Copy) -> None:
        """A copy takes no more requests."""
        last_ms = copy.statistics.snapshot().last_inference_ms
        if last_ms:
            self._reports.used(copy.name, last_ms)

    # For the origin.

    def info(self, name: str) -> ModelInfo | None:
        """What a model is registered as; from any thread."""
        record = self._registry.models.get(name)
        return info_of(record) if record is not None else None

    # What the registry tells.

    def _changed(self, name: str) -> None:
        models, reports = self._registry.models, self._reports
        if name not in self._held and not reports.concerns(name) and not models.mentions(name, self._own_id):
            return
        record = self._registry.models.get(name)
        if record is None:
            self._reports.forget(name)
        else:
            self._reports.check(name, record)
        held = self._held.get(name)
        if held is not None and (record is None or not same_model(info_of(record), held)):
            what = "unregistered" if record is None else "registered as something else"
            log.info("model %s is %s", name, what, extra=event(what.replace(" ", "_"), model=name))
            self._router.remove(name)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._reports.expire_failures()
            for number, copy in enumerate(self._router.copies()):
                last_ms = copy.statistics.snapshot().last_inference_ms
                if copy.name in self._held and last_ms > self._reports.last_used_ms(copy.name) + LAST_USED_STALE_MS:
                    self._reports.used(copy.name, last_ms)
                if number % _SWEPT_AT_ONCE == 0:
                    await asyncio.sleep(0)


def _check_name(name: str) -> None:
    if not name:
        raise InvalidRequest("must provide non-empty modelId")


def _told(status: ModelStatus, error: str) -> ModelStatus:
    """The status with a load's error in it, which may have failed without being remembered."""
    if status.state is ModelState.NOT_FOUND:
        return ABSENT
    if error in status.errors:
        return status
    return ModelStatus(ModelState.LOADING_FAILED, (error, *status.errors), status.copies)
