"""Work in the loader threads: results, errors, and an end that waits for nobody."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mmcore.cache.threads import LoaderThreads


async def test_results_and_errors_come_back_to_the_loop() -> None:
    threads = LoaderThreads(2)
    assert await threads.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ValueError, match="odd"):
        await threads.run(_raise, ValueError("odd"))
    for error in (SystemExit(3), KeyboardInterrupt(), StopIteration(1), asyncio.CancelledError()):
        with pytest.raises(RuntimeError, match=type(error).__name__):
            await threads.run(_raise, error)
    threads.stop()


async def test_work_that_nobody_waits_for_goes_on() -> None:
    threads = LoaderThreads(1)
    gate, done = threading.Event(), threading.Event()
    work = threads.run(gate.wait, 30)
    after = threads.run(done.set)
    work.cancel()
    gate.set()
    await after
    assert done.is_set()
    threads.stop()


def test_a_loop_may_end_before_its_work() -> None:
    threads = LoaderThreads(1)
    gate = threading.Event()

    async def leave() -> None:
        threads.run(gate.wait, 30)

    asyncio.run(leave())
    gate.set()
    threads.stop()
    for thread in threads._threads:
        assert thread.daemon
        thread.join(10)
        assert not thread.is_alive()


def _raise(error: BaseException) -> None:
    raise error
