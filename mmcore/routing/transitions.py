"""Carries out the transitions of vmodels: the leader's work.

A vmodel whose target is not its active model gets the target loaded in as many copies as the active one has, and is
then switched. A target that cannot be loaded is marked as failed and tried again when its record changes, or after a
while. Whoever becomes the leader takes up what is under way; every write is refused to one that is the leader no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from mmcore.errors import LoadFailed, NotFound, Overloaded, Unavailable
from mmcore.log import event
from mmcore.registry import NotLeader, Registry, VModelRecord
from mmcore.routing.registered import Loads
from mmcore.routing.vmodel_changes import in_transition
from mmcore.routing.vmodels import VModels

log = logging.getLogger(__name__)

#: How long after a failure a transition is tried again when nothing has changed.
RETRY_S: Final = 15.0
#: The same where the registry or an instance could not answer.
AWAY_RETRY_S: Final = 1.0


class Transitions:
    """The vmodels under way to their targets, each a task. ``loads`` is asked for the copies."""

    def __init__(self, registry: Registry, vmodels: VModels, loads: Loads, *, retry_s: float = RETRY_S) -> None:
        self._registry: Final = registry
        self._vmodels: Final = vmodels
        self._loads = loads
        self._retry_s = retry_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        #: By target: the transitions that wait for a change of its record.
        self._pausing: dict[str, set[asyncio.Event]] = {}
        registry.vmodels.listen(self._vmodel_changed)
        registry.models.listen(self._model_changed)
        registry.listen_leader(self._leader_changed)

    def start(self) -> None:
        """Take up what is under way, if this instance is the leader."""
        self._leader_changed(self._registry.leader)

    async def close(self) -> None:
        """Leave what is under way to the next leader."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _leader_changed(self, leader: bool) -> None:
        for name in list(self._registry.vmodels) if leader else list(self._tasks):
            self._vmodel_changed(name)

    def _vmodel_changed(self, name: str) -> None:
        """Begin anew with what the vmodel is now."""
        before = self._tasks.pop(name, None)
        if before is not None:
            before.cancel()
        record = self._registry.vmodels.get(name)
        if record is None or not in_transition(record) or not self._registry.leader:
            return
        task = asyncio.get_running_loop().create_task(self._carry_out(name, record), name=f"transition of {name}")
        self._tasks[name] = task
        task.add_done_callback(lambda task: self._ended(name, task))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the transition of vmodel %s", name, exc_info=error)

    def _model_changed(self, name: str) -> None:
        for pausing in self._pausing.get(name, ()):
            pausing.set()

    async def _carry_out(self, name: str, record: VModelRecord) -> None:
        pause_s = self._retry_s if record.failed else 0.0
        while True:
            await self._pause(record.target, pause_s)
            try:
                if await self._try(name, record):
                    return
                pause_s = self._retry_s
            except NotLeader:
                return
            except Unavailable as error:
                log.info("the transition of vmodel %s to %s waits: %s", name, record.target, error)
                pause_s = AWAY_RETRY_S

    async def _try(self, name: str, record: VModelRecord) -> bool:
        """Load the target and switch to it; whether that has been done."""
        copies = self._vmodels.copies(record.active)
        if copies:
            try:
                await self._loads.ensure(record.target, copies)
            except (LoadFailed, Overloaded, NotFound) as error:
                if not record.failed:
                    log.warning(
                        "vmodel %s stays with %s; %s: %s", name, record.active, record.target, error,
                        extra=event("switch_failed", vmodel=name, model=record.target, reason=str(error)),
                    )  # fmt: skip
                    # The change of the record begins this anew.
                    await self._vmodels.mark_failed(name, record)
                return False
        await self._vmodels.complete(name, record)
        log.info(
            "vmodel %s stands for %s now", name, record.target,
            extra=event("switched", vmodel=name, model=record.target),
        )  # fmt: skip
        return True

    async def _pause(self, target: str, pause_s: float) -> None:
        """Wait so long, or until the target's record changes."""
        if not pause_s:
            return
        woken = asyncio.Event()
        waiting = self._pausing.setdefault(target, set())
        waiting.add(woken)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await woken.wait()
        finally:
            waiting.discard(woken)
            if not waiting:
                self._pausing.pop(target, None)
