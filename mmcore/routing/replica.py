"""Looks into the store where what this instance knows of the registry may not be the latest."""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

from mmcore.registry import Record, Table

#: How long a request waits for what the store has to arrive here.
ARRIVAL_WAIT_S: Final = 2.0

R = TypeVar("R", bound=Record)


async def catch_up(table: Table[R], name: str) -> None:
    """Wait until a record is known here as the store has it now, or for a moment if that does not come about.

    Raises:
        Unavailable: the store is away.
    """
    arrived = asyncio.get_running_loop().create_future()

    def changed(other: str) -> None:
        if other == name and not arrived.done():
            arrived.set_result(None)

    stop = table.listen(changed)
    try:
        if await table.read(name) != table.get(name):
            await asyncio.wait([arrived], timeout=ARRIVAL_WAIT_S)
    finally:
        stop()
        arrived.cancel()
