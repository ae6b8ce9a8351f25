"""Turns: whose is next, that others have theirs meanwhile, and what becomes of failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from mmcore.controller import work_queue
from mmcore.controller.work_queue import WorkQueue

pytestmark = pytest.mark.timeout(60)

Work = Callable[[str], Awaitable[float | None]]


@asynccontextmanager
async def running(queue: WorkQueue[str], workers: int = 4) -> AsyncIterator[None]:
    task = asyncio.ensure_future(queue.run(workers))
    try:
        async with asyncio.timeout(20):
            yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def rest(queue: WorkQueue[str]) -> None:
    while not queue.idle:
        await asyncio.sleep(0)


async def test_turns_that_ask_for_nothing_keep_nobody_waiting() -> None:
    done: list[str] = []

    async def work(key: str) -> None:
        done.append(key)

    queue = WorkQueue(work)
    for number in range(2000):
        queue.add_later(str(number))
    turns = 0
    async with running(queue, workers=16):
        while not queue.idle:
            await asyncio.sleep(0)
            turns += 1
    assert len(done) == queue.turns == 2000
    # Each worker has one turn before all others of the loop have theirs.
    assert turns >= 2000 / 16


async def test_what_has_changed_goes_before_what_is_only_looked_at() -> None:
    done: list[str] = []

    async def work(key: str) -> None:
        done.append(key)
        if key == "a":
            queue.add("changed")
            # Already waiting for a turn: it has one, and it is the sooner.
            queue.add("c")
            queue.add_later("c")

    queue = WorkQueue(work)
    for key in ("a", "b", "c", "d"):
        queue.add_later(key)
    assert len(queue) == 4
    async with running(queue, workers=1):
        await rest(queue)
    assert done == ["a", "changed", "c", "b", "d"]


async def test_a_key_is_worked_on_once_at_a_time_and_again_if_it_came_meanwhile() -> None:
    at_once, most, done = 0, 0, 0
    going_on = asyncio.Event()

    async def work(key: str) -> None:
        nonlocal at_once, most, done
        at_once += 1
        most = max(most, at_once)
        await going_on.wait()
        at_once -= 1
        done += 1

    queue = WorkQueue(work)
    queue.add("k")
    async with running(queue):
        while not at_once:
            await asyncio.sleep(0)
        for _ in range(3):
            queue.add("k")
        going_on.set()
        await rest(queue)
    assert (most, done) == (1, 2)


async def test_a_failure_is_tried_again_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_queue, "_FIRST_PAUSE_S", 0.001)
    tries = {"bad": 0, "good": 0}
    mended = asyncio.Event()

    async def work(key: str) -> None:
        tries[key] += 1
        if key == "bad" and tries[key] < 4:
            raise ValueError("not yet")
        if key == "bad":
            mended.set()

    queue = WorkQueue(work)
    async with running(queue, workers=1):
        queue.add("bad")
        queue.add("good")
        await mended.wait()
    assert tries == {"bad": 4, "good": 1}
    assert (queue.turns, queue.failed_turns) == (5, 3)
