"""An instance that leaves: its models in use are loaded elsewhere before their copies here go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

from mmcore import placement
from mmcore.errors import MmcoreError
from mmcore.routing.actions import Actions
from mmcore.routing.members import Members
from mmcore.routing.registered import wall_ms

log = logging.getLogger(__name__)

#: Models that are handed over at the same time.
AT_ONCE: Final = 8


async def hand_over(
    actions: Actions, members: Members, models: Iterable[placement.Model], instance: str, timeout_s: float
) -> int:
    """Hand over those of ``models`` that are used, the busiest first, within so many seconds; how many could not be.

    The instance must say in its record already that it drains. A copy here answers until its successor does.
    """
    members.refresh()
    moves = placement.drain(members.cluster, instance, models, wall_ms())
    left = len(moves)
    waiting = iter(moves)

    async def worker() -> None:
        nonlocal left
        for move in waiting:
            try:
                await actions.move(move.model, move.source, move.instance)
                left -= 1
            except MmcoreError as error:
                log.warning("model %s was not handed over to %s: %s", move.model, move.instance, error)

    if moves:
        log.info("handing over %d models", len(moves))
        workers = [asyncio.create_task(worker(), name="hand models over") for _ in range(AT_ONCE)]
        _, late = await asyncio.wait(workers, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
    return left
