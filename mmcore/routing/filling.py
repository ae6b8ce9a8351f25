"""Models that were used lately and that no instance holds are loaded ahead, wherever there is room for them.

That is the leader's work, whenever an instance has joined or left: a new one comes empty, and what a lost one held has
to be loaded before it is asked for. Nothing is evicted for it, neither by the plan (:func:`mmcore.placement.fill`) nor
at the instance that loads. Models that were registered and never used are none of them.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Callable
from typing import Final

from mmcore import placement
from mmcore.errors import MmcoreError
from mmcore.registry import ModelRecord, Registry
from mmcore.routing.actions import Actions, Haste
from mmcore.routing.members import Members, model_of
from mmcore.routing.registered import wall_ms

log = logging.getLogger(__name__)

#: A model that has not been used for longer is left to whoever asks for it.
USED_WITHIN_MS: Final = 4 * 3_600_000
#: Instances join and leave together; the last of them is waited for so long, so often at most.
SETTLE_S: Final = 1.0
MOST_SETTLES: Final = 10
#: Models considered at one time, and loads under way.
MOST_MODELS: Final = 5_000
MOST_LOADS: Final = 128
#: Of those considered, how many for each decision.
CONSIDERED: Final = 64
#: Between two looks of a new instance at what is still to come, and after how long without any of it nothing will.
LOOK_S: Final = 0.2
STALLED_S: Final = 5.0
#: Records looked at between two looks at the loop's other work.
_AT_ONCE: Final = 200


class Filling:
    """Loads ahead what is used and nowhere held, while this instance is the leader."""

    def __init__(
        self,
        registry: Registry,
        members: Members,
        actions: Actions,
        *,
        settle_s: float = SETTLE_S,
        clock_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self._registry = registry
        self._members = members
        self._cluster = members.cluster
        self._actions = actions
        self._settle_s = settle_s
        self._clock_ms = clock_ms
        self._due = asyncio.Event()
        #: The instances that take copies.
        self._taking: set[str] = set()
        self._running: asyncio.Task[None] | None = None
        registry.instances.listen(self._instance_changed)
        registry.listen_leader(self._leader_changed)

    def start(self) -> None:
        """Fill whenever there is cause to, from now on."""
        for name in list(self._registry.instances):
            self._instance_changed(name)
        self._due.set()
        self._running = asyncio.get_running_loop().create_task(self._run(), name="fill instances that have room")

    async def close(self) -> None:
        """Stop; loads that other instances have begun go on there."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def fill(self) -> None:
        """Load what waits until all is loaded or no room is left; each model is tried once."""
        waiting = await self.waiting()
        running: set[asyncio.Task[None]] = set()
        begun = 0
        try:
            while (waiting or running) and self._registry.leader:
                self._members.refresh()
                considered = [model for name in waiting[:CONSIDERED] if (model := self._still(name)) is not None]
                most = MOST_LOADS - len(running)
                loads = placement.fill(self._cluster, considered, self._clock_ms(), most=most)
                planned = {load.model for load in loads}
                left = [model.id for model in considered if model.id not in planned]
                for load in loads:
                    running.add(asyncio.create_task(self._load(load), name=f"load {load.model} ahead"))
                begun += len(loads)
                # What finds no place while nothing is under way will find none.
                waiting = (left if running else []) + waiting[CONSIDERED:]
                if running:
                    _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(0)
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
        if begun:
            log.info("%d models that were used lately and held nowhere were loaded ahead", begun)

    async def waiting(self) -> list[str]:
        """The models that no instance has or loads: those that shall have copies in any case, then those used last."""
        since_ms = self._clock_ms() - USED_WITHIN_MS
        table = self._registry.models
        found: list[tuple[bool, int, str]] = []
        for number, name in enumerate(list(table)):
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
            record = table.get(name)
            if record is None or not self._is_nowhere(record):
                continue
            asked_for = record.everywhere or record.min_copies > 0
            if asked_for or record.last_used_ms > since_ms:
                found.append((asked_for, record.last_used_ms, name))
        return [name for _, _, name in heapq.nlargest(MOST_MODELS, found)]

    async def filled(self, timeout_s: float) -> bool:
        """Wait until this instance has what is loaded ahead into it, for so many seconds at most; whether it has.

        At once where it is the only one, so that somebody answers, or where nothing waits for a place.
        """
        instance = self._registry.instance
        if not any(member.id != instance and not member.instance.draining for member in self._cluster):
            return True
        waiting, moved_at = await self.waiting(), time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    self._members.refresh()
                    member = self._cluster.get(instance)
                    loads = member.loads if member is not None else 0
                    still = [name for name in waiting if self._still(name) is not None]
                    if loads or len(still) < len(waiting):
                        waiting, moved_at = still, time.monotonic()
                    if not loads and (not waiting or member is None or not placement.has_room(member)):
                        return True
                    if time.monotonic() - moved_at > STALLED_S:
                        return False
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            return False

    # What changes.

    def _instance_changed(self, name: str) -> None:
        record = self._registry.instances.get(name)
        takes = record is not None and not record.draining
        if takes != (name in self._taking):
            (self._taking.add if takes else self._taking.discard)(name)
            self._due.set()

    def _leader_changed(self, leader: bool) -> None:
        if leader:
            self._due.set()

    async def _run(self) -> None:
        while True:
            await self._due.wait()
            for _ in range(MOST_SETTLES):
                self._due.clear()
                await asyncio.sleep(self._settle_s)
                if not self._due.is_set():
                    break
            try:
                if self._registry.leader and self._registry.connected:
                    await self.fill()
            except Exception:
                log.exception("filling instances that have room; it goes on")

    # Filling.

    async def _load(self, load: placement.Load) -> None:
        log.debug("load model %s at %s ahead", load.model, load.instance)
        try:
            await self._actions.load_at(load.instance, load.model, Haste.IF_ROOM)
        except MmcoreError as error:
            log.info("model %s was not loaded ahead at %s: %s", load.model, load.instance, error)
        finally:
            # It is in the instance's record, or comes to nothing; the next may be planned.
            self._cluster.release(load.instance, load.model)

    def _still(self, name: str) -> placement.Model | None:
        """The model, if it still waits for a place."""
        record = self._registry.models.get(name)
        if record is None or not self._is_nowhere(record):
            return None
        model = model_of(name, record, self._clock_ms())
        return model if not model.failures else None

    def _is_nowhere(self, record: ModelRecord) -> bool:
        instances = self._registry.instances
        return not any(name in instances for name in record.copies)
