"""A runtime that was lost with its models gets back those it had, when it has returned."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from mmcore.cache import Priority
from mmcore.errors import MmcoreError
from mmcore.routing.router import Router

log = logging.getLogger(__name__)

#: Models that are loaded again at once; a request's own load goes before them in any case.
AT_ONCE: Final = 8


class Refilling:
    """Notes what a runtime had when it was lost, and loads it again, the model used last first."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._lost: list[str] = []
        self._filling: asyncio.Task[None] | None = None

    def lost(self) -> None:
        """The runtime is gone: no copy takes requests any more."""
        self._stop()
        copies = self._router.copies()
        self._lost = list(dict.fromkeys([*(copy.name for copy in reversed(copies)), *self._lost]))
        for copy in copies:
            self._router.cache.unload(copy)

    def back(self) -> None:
        """The runtime is ready again."""
        self._stop()
        names, self._lost = self._lost, []
        if names:
            self._filling = asyncio.get_running_loop().create_task(self._fill(names), name="refill the runtime")

    def _stop(self) -> None:
        if self._filling is not None:
            self._filling.cancel()
            self._filling = None

    async def close(self) -> None:
        """Stop loading."""
        filling = self._filling
        self._stop()
        if filling is not None:
            await asyncio.wait([filling])

    async def _fill(self, names: list[str]) -> None:
        turns = asyncio.Semaphore(AT_ONCE)

        async def load(name: str) -> None:
            async with turns:
                # What is in use already may need all the room.
                room = self._router.cache.room
                if room.used.host < room.capacity.host:
                    try:
                        await self._router.load(name, priority=Priority.PREFETCH)
                    except MmcoreError as error:
                        log.info("model %s was not loaded again: %s", name, error)

        await asyncio.gather(*map(load, names))
        log.info("the runtime has its models again")
