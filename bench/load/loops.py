"""The two ways to load a server: closed (a fixed number of callers) and open (a fixed arrival rate).

Both work on callbacks alone, since the generator has one core and every µs it spends is one the server is not loaded.
They must not know how a channel connects nor what the bodies mean.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

#: An open loop holds no more calls than this in flight; what it holds back is still timed from its intended time.
IN_FLIGHT_LIMIT: Final = 8192


class Answer(Protocol):
    """A finished call, as ``mmcore.transport.ClientCall``."""

    @property
    def status(self) -> int: ...  # noqa: D102
    @property
    def details(self) -> str: ...  # noqa: D102
    @property
    def message(self) -> bytes | None: ...  # noqa: D102


class Caller(Protocol):
    """What starts a call, as ``mmcore.transport.Channel``."""

    def start(self, path: str, message: bytes, on_done: Callable[[Answer], None]) -> object:
        """Send now, call ``on_done`` once from the loop."""


class Load:
    """Calls in flight and what became of them; the part that both loops share.

    ``exchanges`` gives each call its request body and the one right answer to it, and never ends.

    Attributes:
        latencies_ns: one entry for each right answer since the last ``clear``.
        error: the first wrong answer or failed call, empty when all were right. No call starts after it.
    """

    def __init__(self, callers: Sequence[Caller], path: str, exchanges: Iterator[tuple[bytes, bytes]]) -> None:
        self._callers = callers
        self._path = path
        self._exchanges = exchanges
        self._in_flight = 0
        self._idle: asyncio.Future[None] | None = None
        self.latencies_ns: list[int] = []
        self.error = ""
        self.stopped = False

    def stop(self) -> None:
        """Start no further call."""
        self.stopped = True

    async def drained(self) -> None:
        """Wait until no call is in flight, nor any left to send in an open loop."""
        if self._in_flight:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle

    def _fail(self, call: Answer, expected: bytes) -> None:
        self.stopped = True
        if not self.error:
            self.error = _difference(call, expected)

    def _left(self) -> None:
        self._in_flight -= 1
        if self._in_flight == 0 and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


class ClosedLoop(Load):
    """``streams`` callers on each channel, each with one call in flight."""

    def start(self, streams: int) -> None:
        """Send the first call of every caller."""
        for caller in self._callers:
            for _ in range(streams):
                self._in_flight += 1
                self._run_one(caller)

    def _run_one(self, caller: Caller) -> None:
        # Locals instead of attributes: this closure runs once for each request.
        start, path, exchanges = caller.start, self._path, self._exchanges
        now, latencies = time.perf_counter_ns, self.latencies_ns
        began_ns = 0
        body, expected = next(exchanges)

        def done(call: Answer) -> None:
            nonlocal began_ns, body, expected
            ended_ns = now()
            if call.status or call.message != expected:
                self._fail(call, expected)
            else:
                latencies.append(ended_ns - began_ns)
            if self.stopped:
                self._left()
                return
            began_ns = ended_ns
            body, expected = next(exchanges)
            start(path, body, done)

        began_ns = now()
        start(path, body, done)


class OpenLoop(Load):
    """Calls at fixed times, spread over the channels in turn, each timed from when it should have left."""

    def start(self, offsets_ns: NDArray[np.int64]) -> None:
        """Begin sending; ``offsets_ns`` count from now, ascending.

        The loop is kept awake between arrivals (the timers of uvloop tick in ms), so one core is taken whole.
        """
        self._due_ns: list[int] = (offsets_ns + time.perf_counter_ns()).tolist()
        self._next = 0
        self._loop = asyncio.get_running_loop()
        self._in_flight = 1  # the schedule itself, until its last call has left
        self._loop.call_soon(self._send_due)

    def _send_due(self) -> None:
        due_ns, callers = self._due_ns, self._callers
        while self._next < len(due_ns) and self._in_flight < IN_FLIGHT_LIMIT and not self.stopped:
            intended_ns = due_ns[self._next]
            if intended_ns > time.perf_counter_ns():
                break
            self._in_flight += 1
            body, expected = next(self._exchanges)
            callers[self._next % len(callers)].start(self._path, body, self._timed_from(intended_ns, expected))
            self._next += 1
        if self.stopped or self._next == len(due_ns):
            self._left()
        else:
            self._loop.call_soon(self._send_due)

    def _timed_from(self, intended_ns: int, expected: bytes) -> Callable[[Answer], None]:
        def done(call: Answer) -> None:
            if call.status or call.message != expected:
                self._fail(call, expected)
            else:
                self.latencies_ns.append(time.perf_counter_ns() - intended_ns)
            self._left()

        return done


def _difference(call: Answer, expected: bytes) -> str:
    """How an answer differs from the expected one, in a line."""
    if call.status:
        return f"status {call.status}: {call.details}"
    message = call.message
    if message is None:
        return "no message in the answer"
    if len(message) != len(expected):
        return f"answer of {len(message)} bytes, expected {len(expected)}"
    at = next(index for index, pair in enumerate(zip(message, expected, strict=True)) if pair[0] != pair[1])
    return f"answer differs at byte {at}: {message[at : at + 16].hex()}, expected {expected[at : at + 16].hex()}"
