"""What is to be looked at: each thing once however often it changes, failures with growing pauses of their own.

What has changed itself goes before what is only looked at because something else has.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, Generic, TypeVar

log = logging.getLogger(__name__)

KeyT = TypeVar("KeyT", bound=Hashable)

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 300.0


class WorkQueue(Generic[KeyT]):
    """Keys that are to be worked on; a key is never worked on twice at the same time.

    ``work`` answers in how many seconds the key is to be looked at again, None for not before it changes.
    """

    def __init__(self, work: Callable[[KeyT], Awaitable[float | None]]) -> None:
        self._work = work
        self._waiting: dict[KeyT, None] = {}
        #: Those that let the others go before.
        self._later: dict[KeyT, None] = {}
        self._running: set[KeyT] = set()
        self._timers: dict[KeyT, asyncio.TimerHandle] = {}
        self._failures: dict[KeyT, int] = {}
        self._arrived = asyncio.Event()
        #: Turns so far, and those of them that failed.
        self.turns = self.failed_turns = 0

    def __len__(self) -> int:
        """How many keys wait for a turn."""
        return len(self._waiting) + len(self._later)

    def add(self, key: KeyT) -> None:
        """Look at it as soon as possible."""
        self._later.pop(key, None)
        self._waiting[key] = None
        self._arrived.set()

    def add_later(self, key: KeyT) -> None:
        """Look at it when nothing else is to be looked at."""
        if key not in self._waiting:
            self._later[key] = None
            self._arrived.set()

    def add_after(self, key: KeyT, seconds: float) -> None:
        """Look at it in a while; the earlier of two such times counts."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        due = loop.time() + seconds
        if timer is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._due, key)

    @property
    def idle(self) -> bool:
        """Whether nothing is to be done now."""
        return not self._waiting and not self._later and not self._running

    async def run(self, workers: int) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._worker())

    def _due(self, key: KeyT) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def _worker(self) -> None:
        while True:
            key = self._next()
            if key is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            self._running.add(key)
            self.turns += 1
            try:
                again = await self._work(key)
            except Exception as error:  # one object's failure stops no other
                self.failed_turns += 1
                failures = self._failures[key] = self._failures.get(key, 0) + 1
                pause = min(_FIRST_PAUSE_S * 2**failures, _LONGEST_PAUSE_S) * random.uniform(0.8, 1.2)  # noqa: S311
                log.warning("%s: %s; again in %.1f s", key, error or type(error).__name__, pause)
                log.debug("%s", key, exc_info=True)
                self.add_after(key, pause)
            else:
                self._failures.pop(key, None)
                if again is not None:
                    self.add_after(key, again)
            finally:
                self._running.discard(key)
                self._arrived.set()
            # Where nothing differs a turn asks for nothing: ten thousand of them would keep the lease and the probes
            # waiting for seconds.
            await asyncio.sleep(0)

    def _next(self) -> KeyT | None:
        for waiting in (self._waiting, self._later):
            key = next((one for one in waiting if one not in self._running), None)
            if key is not None:
                del waiting[key]
                return key
        return None
