"""An instance that leaves: its models in use are loaded elsewhere before their copies here go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

from mmcore import placement
from mmcore.errors import MmcoreError, Unavailable
from mmcore.routing.actions import Actions
from mmcore.routing.members import Members
from mmcore.routing.registered import wall_ms

log = logging.getLogger(__name__)

#: Models that are handed over at the same time.
AT_ONCE: Final = 8
#: So many instances are asked to take a model; then whoever asks for it next has it loaded.
MOST_TARGETS: Final = 3


async def hand_over(
    actions: Actions,
    members: Members,
    models: Iterable[placement.Model],
    instance: str,
    timeout_s: float,
    gone: Iterable[str] = (),
) -> int:
    """Hand over those of ``models`` that are used, the busiest first, within so many seconds; how many could not be.

    The instance must say in its record already that it drains. A copy here answers until its successor does. Those that
    are ``gone``, though they are in the registry still, count for nothing; one that does not take a model is followed
    by the next.
    """
    members.refresh()
    by_name = {model.id: model for model in models}
    unreachable = set(gone)

    def plan(wanted: Iterable[placement.Model], tried: Iterable[str] = ()) -> list[placement.Move]:
        return placement.drain(members.cluster, instance, wanted, wall_ms(), gone=unreachable.union(tried))

    async def hand_one_over(move: placement.Move) -> bool:
        tried: list[str] = []
        ways = [move]
        while ways:
            target = ways[0].instance
            try:
                await actions.move(move.model, instance, target)
            except MmcoreError as error:
                log.warning("model %s was not handed over to %s: %s", move.model, target, error)
                members.cluster.release(target, move.model)
                tried.append(target)
                if isinstance(error, Unavailable):
                    unreachable.add(target)
                ways = plan([by_name[move.model]], tried) if len(tried) < MOST_TARGETS else []
            else:
                return True
        return False

    moves = plan(by_name.values())
    left = len(moves)
    waiting = iter(moves)

    async def worker() -> None:
        nonlocal left
        for move in waiting:
            left -= await hand_one_over(move)

    if moves:
        log.info("handing over %d models", len(moves))
        workers = [asyncio.create_task(worker(), name="hand models over") for _ in range(AT_ONCE)]
        _, late = await asyncio.wait(workers, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
    return left
