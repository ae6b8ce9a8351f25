"""Tells blocking work, in whatever threads it is done, that nobody wants it any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import NoReturn, TypeVar

from mmcore.errors import Cancelled

ResultT = TypeVar("ResultT")


class Cancellation:
    """Set once, from any thread, the event loop's included: nothing here waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []
        self._set = False

    @property
    def is_set(self) -> bool:
        """Whether the work is not wanted any more."""
        return self._set

    def set(self) -> None:
        """Say so, and make the calls that end what blocks."""
        with self._lock:
            self._set = True
            for call in self._calls:
                call()
            self._calls.clear()

    @contextmanager
    def calling(self, call: Callable[[], None]) -> Iterator[None]:
        """Have ``call`` made if this is set before the block ends, at once where it is set already; never after that.

        It must return soon and raise nothing.
        """
        with self._lock:
            if self._set:
                call()
            else:
                self._calls.append(call)
        try:
            yield
        finally:
            with self._lock:
                if call in self._calls:
                    self._calls.remove(call)


class _Heeded(threading.local):
    ones: tuple[Cancellation, ...] = ()


_heeded = _Heeded()


@contextmanager
def heeding(*ones: Cancellation) -> Iterator[None]:
    """Inside the block what this thread does, as far as it asks here, ends when one of these is set."""
    before, _heeded.ones = _heeded.ones, ones
    try:
        yield
    finally:
        _heeded.ones = before


@contextmanager
def ended_by(call: Callable[[], None]) -> Iterator[None]:
    """Inside the block ``call`` is made when this thread's work is to end; see :meth:`Cancellation.calling`."""
    with ExitStack() as calls:
        for one in _heeded.ones:
            calls.enter_context(one.calling(call))
        yield


def apart(call: Callable[[], ResultT]) -> ResultT:
    """The result of a ``call`` that nothing ends but its own time limits: made in a thread that is left to it.

    Raises:
        Cancelled: this thread's work is to end.
    """
    if not _heeded.ones:
        return call()
    answers: SimpleQueue[Callable[[], ResultT] | None] = SimpleQueue()

    def run() -> None:
        try:
            result = call()
            answers.put(lambda: result)
        except BaseException as error:
            answers.put(partial(_raise, error))

    with ended_by(partial(answers.put, None)):
        threading.Thread(target=run, name="mmcore-apart", daemon=True).start()
        answer = answers.get()
    if answer is None:
        raise Cancelled("the pull was cancelled")
    return answer()


def _raise(error: BaseException) -> NoReturn:
    raise error
