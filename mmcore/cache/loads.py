"""Loads under way and who waits for them, and the order in which they get their turns at the threads."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import IntEnum

from mmcore.cache.copies import Copy, CopyState, LoadTimes
from mmcore.errors import Cancelled, MmcoreError
from mmcore.storage import Cancellation, Origin

_order = itertools.count()


class Priority(IntEnum):
    """Who a load is for; the smaller goes first."""

    REQUEST = 0
    PRELOAD = 1
    PREFETCH = 2


class Load:
    """One load under way and those who wait for it.

    Attributes:
        idle_s: None where the model is wanted here; else for how long nobody has used it: it is loaded into free room
            alone, evicts nothing, and has its place among the others by that.
    """

    __slots__ = (
        *("_since", "dropped", "given_up", "idle_s", "name", "order", "origin", "priority", "replacing", "state"),
        *("times", "version", "waiters"),
    )

    def __init__(
        self,
        name: str,
        version: str,
        origin: Origin,
        priority: Priority,
        *,
        replacing: bool,
        idle_s: float | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.origin = origin
        self.priority = priority
        self.replacing = replacing
        self.idle_s = idle_s
        #: Among loads of one priority the first come goes first.
        self.order = next(_order)
        self.state = CopyState.QUEUED
        self.waiters: list[asyncio.Future[Copy]] = []
        #: Why its result is not wanted any more.
        self.dropped: MmcoreError | None = None
        #: Ends the work that is done for it, in a thread.
        self.given_up = Cancellation()
        self.times = LoadTimes()
        self._since = time.monotonic()

    @property
    def rank(self) -> tuple[int, int]:
        """What goes first has the smallest."""
        return self.priority, self.order

    @property
    def unwanted(self) -> bool:
        """Whether it was dropped, or all who waited for it have left."""
        left = bool(self.waiters) and all(waiter.done() for waiter in self.waiters)
        return left or self.dropped is not None

    def spent(self, stage: str) -> None:
        """What has passed since the last call went into ``stage``, a field of :class:`LoadTimes`."""
        now = time.monotonic()
        self.times = self.times._replace(**{stage: getattr(self.times, stage) + now - self._since})
        self._since = now

    def wait(self) -> asyncio.Future[Copy]:
        """A future of one waiter's own: cancelling it touches nobody else."""
        waiter: asyncio.Future[Copy] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        return waiter

    def settle(self, copy: Copy | None, error: MmcoreError | None) -> None:
        """Tell the waiters that are still there."""
        for waiter in self.waiters:
            if waiter.done():
                continue
            if error is not None:
                waiter.set_exception(type(error)(str(error)))
            else:
                assert copy is not None
                waiter.set_result(copy)
        self.waiters.clear()

    def drop(self, error: MmcoreError) -> None:
        """Answer the waiters with ``error`` now and let go of the result when it comes."""
        self.dropped = error
        self.settle(None, error)

    def check_dropped(self) -> None:
        """Raise what it was dropped with."""
        if self.dropped is not None:
            raise type(self.dropped)(str(self.dropped))

    def check_wanted(self) -> None:
        """Raise what it was dropped with, or Cancelled where all who waited for it have left."""
        self.check_dropped()
        if self.unwanted:
            raise Cancelled("nobody waits for this load any more")


class LoadQueue:
    """So many loads at work at once; the others wait for a turn, the most urgent first."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._line: list[tuple[tuple[int, int], Load, asyncio.Future[None]]] = []
        self._waiting: dict[Load, asyncio.Future[None]] = {}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def resize(self, more: int) -> None:
        """Have so many more slots, or fewer."""
        self._free += more - 1
        self._release()

    @asynccontextmanager
    async def turn(self, load: Load) -> AsyncIterator[None]:
        """Hold a slot inside the block.

        Raises:
            MmcoreError: what :meth:`Load.check_wanted` raises, if it has been given up before its turn.
        """
        if self._free > 0:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[load] = turn
            heapq.heappush(self._line, (load.rank, load, turn))
            try:
                await turn
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._release()
                raise
            finally:
                self._waiting.pop(load, None)
        try:
            load.check_wanted()
            yield
        finally:
            self._release()

    def moved(self, load: Load) -> None:
        """Its priority has changed, or nobody wants it any more: it is let go at once, to find that out."""
        turn = self._waiting.get(load)
        if turn is None or turn.done():
            return
        if load.unwanted:
            # It takes no slot from anybody: it gives back the one it is handed here.
            self._free -= 1
            turn.set_result(None)
        else:
            heapq.heappush(self._line, (load.rank, load, turn))

    def _release(self) -> None:
        self._free += 1
        while self._free > 0 and self._line:
            rank, load, turn = heapq.heappop(self._line)
            # An entry of an older rank, or of a load that has gone.
            if turn.done() or rank != load.rank:
                continue
            self._free -= 1
            turn.set_result(None)
