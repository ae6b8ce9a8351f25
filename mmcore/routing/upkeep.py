"""What each instance does for the mesh every few seconds: copies that follow use, hot spots, the copies of the dead.

All decisions are placement's; this feeds them with what this instance knows and carries them out. About the number of
a model's copies one of its holders decides; about what is nobody's alone, the leader.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Final

from mmcore import placement
from mmcore.errors import MmcoreError
from mmcore.placement.leaving import MISSING_MS
from mmcore.registry import ModelRecord, Registry
from mmcore.routing.actions import Actions, Haste
from mmcore.routing.losses import Losses
from mmcore.routing.members import model_of
from mmcore.routing.registered import wall_ms
from mmcore.routing.router import Router
from mmcore.routing.usage import Usage

log = logging.getLogger(__name__)

#: Between two looks at the copies here.
INTERVAL_S: Final = 10.0
#: Models that nobody uses are looked at once in so many looks.
IDLE_LOOKS: Final = 30
#: Loads and drops that one look may begin, and how many of them run at once.
MOST_ACTIONS: Final = 64
AT_ONCE: Final = 8
#: Records of models looked at between two looks at the loop's other work.
_AT_ONCE: Final = 200


class Upkeep:
    """The periodic work of one instance.

    Attributes:
        usage: how the copies here are used.
    """

    def __init__(
        self,
        registry: Registry,
        router: Router,
        actions: Actions,
        cluster: placement.Cluster,
        losses: Losses,
        *,
        policy: placement.Policy = placement.DEFAULT_POLICY,
        interval_s: float = INTERVAL_S,
        clock_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self.usage: Final = Usage()
        self._registry = registry
        self._router = router
        self._actions = actions
        self._cluster = cluster
        self._losses = losses
        self._policy = policy
        self._interval_s = interval_s
        self._clock_ms = clock_ms
        self._look = 0
        self._running: asyncio.Task[None] | None = None
        #: By model and instance.
        self._acting: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        #: Since when (ms) instances are missing whose copies may still stand in records.
        self._missing: dict[str, int] = {}
        self._present: set[str] = set()
        #: Models held here whose records have changed since the last look; and whether all are due, as an instance came
        #: or went.
        self._changed: set[str] = set()
        self._all_due = False
        registry.models.listen(self._model_changed)
        registry.instances.listen(self._instance_changed)

    def start(self) -> None:
        """Look every few seconds from now on."""
        self._running = asyncio.get_running_loop().create_task(self._run(), name="upkeep of the mesh")

    async def close(self) -> None:
        """Stop, and let go of what is under way."""
        tasks = [task for task in (self._running, *self._acting.values()) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.look()
            except Exception:
                log.exception("upkeep of the mesh; it goes on")

    async def look(self) -> None:
        """One look at the copies here, and what follows from it."""
        self._look += 1
        copies = self._router.copies()
        used = set(await self.usage.look(copies))
        cluster = self._cluster
        cluster.expire(self._clock_ms())
        due = used | self._changed
        all_due, self._all_due = self._all_due, False
        self._changed.clear()
        busy: list[placement.Model] = []
        for number, copy in enumerate(copies):
            if not all_due and copy.name not in due and number % IDLE_LOOKS != self._look % IDLE_LOOKS:
                continue
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
            record = self._registry.models.get(copy.name)
            if record is None or self._registry.instance not in record.copies:
                continue
            if len(record.copies) < (len(cluster) if record.everywhere else record.min_copies):
                # Until it has them; what is on its way may come to nothing.
                self._changed.add(copy.name)
            model = self._view(copy.name, record, copy.name in used)
            busy.append(model)
            if placement.decider(cluster, model) == self._registry.instance:
                self._act(placement.scale(cluster, model, self._clock_ms(), self._policy))
        self._act(placement.relieve(cluster, self._registry.instance, busy, self._clock_ms()))
        if self._registry.leader:
            await self._prune()

    def held(self) -> list[placement.Model]:
        """The registered models that this instance holds copies of, with their use."""
        found = []
        for copy in self._router.copies():
            record = self._registry.models.get(copy.name)
            if record is not None and self._registry.instance in record.copies:
                found.append(self._view(copy.name, record, copy.uses > 0))
        return found

    def _view(self, name: str, record: ModelRecord, used: bool) -> placement.Model:
        model = model_of(name, record, self._clock_ms(), self.usage.demand(name, len(record.copies)))
        return replace(model, last_used_ms=self._clock_ms()) if used else model

    # Carrying out.

    def _act(self, actions: Iterable[placement.Load | placement.Drop | placement.Move]) -> None:
        """Begin a plan, but for models about which an earlier one is being carried out."""
        under_way = {model for model, _ in self._acting}
        for action in actions:
            if action.model in under_way or len(self._acting) >= MOST_ACTIONS:
                self._cluster.release(action.instance, action.model)
                continue
            log.info("%s", _told(action))
            task = asyncio.get_running_loop().create_task(self._carry_out(action), name=f"upkeep of {action.model}")
            key = (action.model, action.instance)
            self._acting[key] = task
            task.add_done_callback(partial(self._acted, key))

    def _acted(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._acting[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("upkeep of model %s", key[0], exc_info=error)

    async def _carry_out(self, action: placement.Load | placement.Drop | placement.Move) -> None:
        async with self._slots:
            try:
                await self._steps(action)
            except MmcoreError as error:
                log.info("%s: %s", _told(action), error)
                self._cluster.release(action.instance, action.model)

    def _steps(self, action: placement.Load | placement.Drop | placement.Move) -> Coroutine[Any, Any, None]:
        match action:
            case placement.Drop():
                return self._actions.drop_at(action.instance, action.model)
            case placement.Move():
                return self._actions.move(action.model, action.source, action.instance)
            case placement.Load():
                return self._actions.load_at(action.instance, action.model, Haste.AHEAD)

    def _model_changed(self, name: str) -> None:
        if self._router.table.get(name) is not None:
            self._changed.add(name)

    # Instances that are gone.

    def _instance_changed(self, name: str) -> None:
        here = name in self._registry.instances
        self._all_due |= here != (name in self._present)
        if here:
            self._present.add(name)
            self._missing.pop(name, None)
        elif name in self._present:
            self._present.discard(name)
            self._missing[name] = self._clock_ms()

    async def _prune(self) -> None:
        """Take the copies of instances that are gone out of the records; the leader's work."""
        cluster, now_ms = self._cluster, self._clock_ms()
        if not self._missing or min(self._missing.values()) > now_ms - MISSING_MS:
            return
        table = self._registry.models
        for number, name in enumerate(list(table)):
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
            if not any(table.mentions(name, gone.encode()) for gone in self._missing):
                continue
            record = table.get(name)
            if record is None:
                continue
            drops = placement.prune(cluster, model_of(name, record, now_ms), self._missing.get, now_ms)
            if drops:
                change = partial(self._without, instances={drop.instance for drop in drops})
                await self._registry.commit([(table, name)], change, fenced=True)
        for name in [name for name, since in self._missing.items() if now_ms - since >= MISSING_MS]:
            del self._missing[name]

    def _without(self, records: list[ModelRecord | None], instances: set[str]) -> list[ModelRecord | None]:
        """A model's record, as the only one, without what it says of some instances."""
        (record,) = records
        if record is None:
            return [None]
        copies = {name: copy for name, copy in record.copies.items() if name not in instances}
        failures = {name: failure for name, failure in record.failures.items() if name not in instances}
        losses = {**self._losses.loading_at(record, instances.__contains__), **record.losses}
        return [replace(record, copies=copies, failures=failures, losses=losses)]


def _told(action: placement.Load | placement.Drop | placement.Move) -> str:
    verb = {placement.Load: "load", placement.Drop: "drop", placement.Move: "move"}[type(action)]
    return f"{verb} model {action.model} at {action.instance} ({action.reason})"
