"""What becomes of an exception that a model raised while answering."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

from mmcore.errors import InferenceFailed

log = logging.getLogger(__name__)

#: One traceback per model in this many seconds: a client can send bad rows faster than a disk takes lines.
_LOG_INTERVAL_S: Final = 10.0

#: Longer texts are cut: they travel in a trailer, which clients bound (8 KiB of header list by default in gRPC).
_TEXT_LIMIT: Final = 2000


class FailureReport:
    """Turns a model's exceptions into errors for the caller and, at a bounded rate, log lines with the traceback."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._next_at = 0.0
        self._unlogged = 0

    def failed(self, error: BaseException, text: str | None = None) -> InferenceFailed:
        """The error to raise for ``error``; ``text`` where the exception's own text holds more than a caller needs."""
        now = time.monotonic()
        with self._lock:
            due = now >= self._next_at
            unlogged = self._unlogged
            if due:
                self._next_at = now + _LOG_INTERVAL_S
                self._unlogged = 0
            else:
                self._unlogged += 1
        if due:
            log.warning(
                "model %r failed to answer (%d failures not logged before this one)",
                self._model,
                unlogged,
                exc_info=error,
            )
        return InferenceFailed(f"model {self._model!r}: {text or describe(error)}")


def describe(error: BaseException) -> str:
    """Type and text of an exception on few characters, without a traceback."""
    text = str(error).strip()
    name = type(error).__name__
    return (f"{name}: {text}" if text else name)[:_TEXT_LIMIT]
