"""How a long pull shows itself where nobody looks at a terminal: a log line now and then."""

from __future__ import annotations

import logging
import time
from typing import Final

log = logging.getLogger(__name__)

_EVERY_S: Final = 10.0


class LogProgress:
    """A line for every ten seconds that a pull lasts. Satisfies :class:`mmcore.storage.transfer.Progress`."""

    def __init__(self) -> None:
        self._what = ""
        self._total: int | None = None
        self._received = 0
        self._began = self._logged = time.monotonic()

    def started(self, what: str, files: int, total_bytes: int | None) -> None:
        """The files are known."""
        self._what = f"{what} ({files} files)" if files > 1 else what
        self._total = total_bytes

    def received(self, count: int) -> None:
        """So many bytes more have come; the count may miss some when threads meet here, as it is for people."""
        self._received += count
        now = time.monotonic()
        if now - self._logged >= _EVERY_S:
            self._logged = now
            rate = self._received / (now - self._began) / 1e6
            of = f" of {self._total / 1e6:.1f}" if self._total else ""
            log.info("pulling %s: %.1f%s MB, %.1f MB/s", self._what, self._received / 1e6, of, rate)

    def ended(self) -> None:
        """Nothing more to say: who pulls logs the outcome."""
