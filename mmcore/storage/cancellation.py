"""Tells blocking work, in whatever threads it is done, that nobody wants it any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
