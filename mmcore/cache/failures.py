"""Remembers why loads failed, so that a broken model is not tried for every request; each failure expires."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from mmcore.errors import MmcoreError

FIRST_EXPIRY_S: Final = 10.0
LONGEST_EXPIRY_S: Final = 300.0


@dataclass(slots=True)
class _Failure:
    error: MmcoreError
    expires_at: float
    expiry_s: float


class Failures:
    """The last failure of each version; its expiry doubles while it keeps failing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[tuple[str, str], _Failure] = {}

    def remember(self, name: str, version: str, error: MmcoreError, *, first_s: float = FIRST_EXPIRY_S) -> None:
        """Keep ``error`` as the answer to the version's loads for ``first_s``, longer where it failed before."""
        before = self._failures.get((name, version))
        expiry_s = first_s if before is None else min(before.expiry_s * 2, LONGEST_EXPIRY_S)
        # Tracebacks hold the frames of the load, and with them the half-made model.
        kept = type(error)(str(error))
        self._failures[name, version] = _Failure(kept, self._clock() + expiry_s, expiry_s)

    def current(self, name: str, version: str) -> MmcoreError | None:
        """A new error of the kind that the version failed with, while that has not expired."""
        failure = self._failures.get((name, version))
        if failure is None or self._clock() >= failure.expires_at:
            return None
        return type(failure.error)(str(failure.error))

    def forgive(self, name: str) -> None:
        """Let the model's versions be loaded anew, unless they failed within the last :data:`FIRST_EXPIRY_S`."""
        now = self._clock()
        for key, failure in list(self._failures.items()):
            if key[0] == name and now - (failure.expires_at - failure.expiry_s) >= FIRST_EXPIRY_S:
                failure.expires_at = min(failure.expires_at, now)

    def last(self, name: str, version: str) -> str:
        """The text of the version's last failure, expired or not; empty where the last load succeeded."""
        failure = self._failures.get((name, version))
        return str(failure.error) if failure is not None else ""

    def __len__(self) -> int:
        return len(self._failures)

    def told(self, most: int) -> list[tuple[str, str, str]]:
        """Model, version and text of some of the last failures."""
        return [
            (name, version, str(failure.error)) for (name, version), failure in islice(self._failures.items(), most)
        ]

    def clear(self, name: str, version: str | None = None) -> None:
        """Forget the failures of a version, or of all versions of a model."""
        for key in [key for key in self._failures if key[0] == name and version in (None, key[1])]:
            del self._failures[key]
