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


async def test_a_process_that_may_start_no_thread_says_so_and_starts_them_when_it_may() -> None:
    threads = LoaderThreads(2)
    before = threading.stack_size(2**46)  # larger than all memory: the system refuses
    try:
        with pytest.raises(RuntimeError, match="new thread"):
            threads.run(divmod, 7, 2)
    finally:
        threading.stack_size(before)
    assert await threads.run(divmod, 7, 2) == (3, 1)
    threads.stop()


async def test_fewer_threads_than_asked_for_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = LoaderThreads(3)
    allowed = iter([threading.Thread.start])

    def start(thread: threading.Thread) -> None:
        if (really := next(allowed, None)) is None:
            raise RuntimeError("can't start new thread")
        really(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        work = [threads.run(divmod, number, 2) for number in range(4)]
    assert await asyncio.gather(*work) == [divmod(number, 2) for number in range(4)]
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
