"""The loops keep the number of callers or the arrival rate, and refuse a wrong answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from bench.load.loops import Answer, ClosedLoop, OpenLoop


@dataclass
class Call:
    status: int
    details: str
    message: bytes | None


class Echo:
    """Answers what it was sent on the loop's next turn; after ``fails_at`` calls with ``wrong`` instead."""

    def __init__(self, wrong: Call | None = None, fails_at: int = 0) -> None:
        self.started = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self._wrong = wrong
        self._fails_at = fails_at

    def start(self, path: str, message: bytes, on_done: Callable[[Answer], None]) -> None:
        self.started += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        wrong = self._wrong is not None and self.started > self._fails_at
        answer = self._wrong if wrong and self._wrong else Call(0, "", message)
        asyncio.get_running_loop().call_soon(self._finish, on_done, answer)

    def _finish(self, on_done: Callable[[Answer], None], answer: Call) -> None:
        self.in_flight -= 1
        on_done(answer)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_closed_loop_keeps_every_caller_busy_and_drains() -> None:
    echoes = [Echo(), Echo()]
    load = ClosedLoop(echoes, "/a/b", repeat((b"x", b"x")))
    load.start(streams=3)
    await turns(20)
    load.stop()
    await load.drained()
    assert [echo.most_in_flight for echo in echoes] == [3, 3]
    assert [echo.in_flight for echo in echoes] == [0, 0]
    assert len(load.latencies_ns) == sum(echo.started for echo in echoes) > 60
    assert load.error == ""


async def test_a_wrong_answer_stops_the_loop_and_is_described() -> None:
    echo = Echo(wrong=Call(0, "", b"abXd"), fails_at=5)
    load = ClosedLoop([echo], "/a/b", repeat((b"abcd", b"abcd")))
    load.start(streams=2)
    await turns(20)
    await load.drained()
    assert "byte 2" in load.error
    assert len(load.latencies_ns) == 5
    assert echo.started <= 7


async def test_a_failed_call_names_its_status() -> None:
    load = ClosedLoop([Echo(wrong=Call(14, "gone", None))], "/a/b", repeat((b"", b"")))
    load.start(streams=1)
    await load.drained()
    assert load.error == "status 14: gone"


async def test_an_answer_of_another_length_is_refused() -> None:
    load = ClosedLoop([Echo(wrong=Call(0, "", b"abc"))], "/a/b", repeat((b"abcd", b"abcd")))
    load.start(streams=1)
    await load.drained()
    assert load.error == "answer of 3 bytes, expected 4"


async def test_an_open_loop_sends_everything_and_times_from_the_intended_moment() -> None:
    echo = Echo()
    load = OpenLoop([echo], "/a/b", repeat((b"x", b"x")))
    # All of these were due 5 ms before the loop began: the wait before sending counts.
    load.start(np.full(10, -5_000_000))
    await load.drained()
    assert echo.started == len(load.latencies_ns) == 10
    assert min(load.latencies_ns) >= 5_000_000


async def test_an_open_loop_stops_at_a_wrong_answer() -> None:
    load = OpenLoop([Echo(wrong=Call(0, "", b"y"))], "/a/b", repeat((b"x", b"x")))
    load.start(np.zeros(5, np.int64))
    await load.drained()
    assert "differs at byte 0" in load.error
