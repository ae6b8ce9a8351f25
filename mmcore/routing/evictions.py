"""A model that is evicted here although it is used goes on at another instance, where there is room for it.

Room is all that counts: nothing is evicted for it there, so that one eviction never leads to another
(:func:`mmcore.placement.evicted`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mmcore import placement
from mmcore.cache import Copy
from mmcore.errors import MmcoreError
from mmcore.registry import Registry
from mmcore.routing.actions import Actions, Haste
from mmcore.routing.members import Members, model_of
from mmcore.routing.registered import Registered, wall_ms

log = logging.getLogger(__name__)

#: A model that nobody has used for longer just goes.
USED_WITHIN_MS: Final = 3_600_000
#: Models on their way elsewhere; while there are so many, others just go.
MOST_MOVES: Final = 32


class Evictions:
    """Has models that this instance evicts loaded elsewhere."""

    def __init__(
        self,
        registry: Registry,
        registered: Registered,
        members: Members,
        actions: Actions,
        *,
        clock_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self._registry = registry
        self._registered = registered
        self._members = members
        self._actions = actions
        self._clock_ms = clock_ms
        self._moves: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for nothing that is under way."""
        for task in self._moves:
            task.cancel()
        if self._moves:
            await asyncio.wait(self._moves)

    def evicted(self, copy: Copy) -> None:
        """A copy is about to be unloaded to make room."""
        name, now_ms = copy.name, self._clock_ms()
        record = self._registry.models.get(name)
        if record is None or len(self._moves) >= MOST_MOVES or not self._members.joined:
            return
        used_ms = max(copy.statistics.snapshot().last_inference_ms, record.last_used_ms)
        if now_ms - used_ms > USED_WITHIN_MS:
            return
        instance = self._registry.instance
        model = model_of(name, self._registered.told(name, record), now_ms)
        here = model.copies.get(instance)
        if here is None:
            return
        others = {one: state for one, state in model.copies.items() if one != instance and self._registered.lives(one)}
        model = replace(model, copies=others, last_used_ms=used_ms)
        load = placement.evicted(self._members.cluster, model, instance, here.since_ms, now_ms)
        if load is not None:
            task = asyncio.get_running_loop().create_task(self._go_on(load), name=f"load {name} elsewhere")
            self._moves.add(task)
            task.add_done_callback(self._moves.discard)

    async def _go_on(self, load: placement.Load) -> None:
        log.info("model %s was evicted here, and is to be loaded at %s", load.model, load.instance)
        try:
            await self._actions.load_at(load.instance, load.model, Haste.IF_ROOM)
        except MmcoreError as error:
            log.info("model %s was not loaded at %s: %s", load.model, load.instance, error)
        finally:
            self._members.cluster.release(load.instance, load.model)
