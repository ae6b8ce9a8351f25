"""A few threads that load and close models; an instance can end although a framework never returns from one of them.

That is why it is no ThreadPoolExecutor: the interpreter waits for those at its end, come what may.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


class LoaderThreads:
    """So many threads, started with the first work there is; work is begun in the order it comes."""

    def __init__(self, count: int, name: str = "mmcore-load") -> None:
        self._count = count
        self._name = name
        self._threads: list[threading.Thread] = []
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def run(self, work: Callable[..., ResultT], *args: object) -> asyncio.Future[ResultT]:
        """Call ``work`` in one of the threads; on the loop. Cancelling the future does not stop the work.

        Raises:
            RuntimeError: the system lets this process start no thread.
        """
        if not self._threads:
            self._start()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[ResultT] = loop.create_future()

        def call() -> None:
            result: Any = None
            error: Exception | None = None
            try:
                result = work(*args)
            except BaseException as raised:
                # Those that would end the loop, or that a future does not take, come as an ordinary error.
                if isinstance(raised, Exception) and not isinstance(raised, StopIteration):
                    error = raised
                else:
                    error = RuntimeError(f"{type(raised).__name__}: {raised}")
            # Once the loop is closed the instance is gone and nobody waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, result, error)
            # Its traceback refers to this frame, and the frame to the model.
            result = error = None

        def settle(result: ResultT, error: Exception | None) -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        self._work.put(call)
        return answer

    def _start(self) -> None:
        for number in range(self._count):
            thread = threading.Thread(target=self._serve, name=f"{self._name}-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    raise
                return  # those that there are do the work of all
            self._threads.append(thread)

    def stop(self) -> None:
        """End the threads when they have done what was given to them before; returns at once."""
        for _ in self._threads:
            self._work.put(None)

    def _serve(self) -> None:
        while (call := self._work.get()) is not None:
            call()
            # What it refers to, a model perhaps, is not to wait for the next work.
            del call
