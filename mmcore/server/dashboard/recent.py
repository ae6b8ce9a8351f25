"""How this instance is used now: rates and latencies of all models together, always, and of each while somebody looks.

What is counted is counted anyway (``_ext.rates``). A look every few seconds tells what has come since the one before.
The looks at each copy stop a minute after the last question, so that an instance nobody watches does not pay for them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from mmcore._ext.rates import TIME_BOUNDS_NS, totals
from mmcore.cache import Copy

LOOK_S: Final = 5.0
#: Looks that are remembered: a quarter of an hour.
LOOKS_KEPT: Final = 180
WATCHED_S: Final = 60.0
#: Copies looked at between two turns of the loop.
_AT_ONCE: Final = 500
#: How much of what was known is kept at a look that tells something new.
_OLD_SHARE: Final = 0.5


class Look(NamedTuple):
    """What happened between two looks, each figure of all models; times are None where nothing was answered."""

    requests_per_s: float
    failures_per_s: float
    p50_ms: float | None
    p99_ms: float | None


@dataclass(slots=True)
class _Seen:
    """One copy at the last look: its uses, requests and times counted by bound, those of late weighing more."""

    copy: Copy
    uses: int
    requests: int
    counts: list[int]
    late: list[float]
    rate: float | None = None


class Recent:
    """Looks at ``copies()`` and at the counters of the process; :meth:`run` is to be a task of the instance."""

    def __init__(self, copies: Callable[[], Sequence[Copy]], clock: Callable[[], float] = time.monotonic) -> None:
        self.looks: deque[Look] = deque(maxlen=LOOKS_KEPT)
        self._copies = copies
        self._clock = clock
        self._watched_at = -WATCHED_S
        self._looked_at: float | None = None
        self._looked_at_all = clock()
        self._before = totals()
        self._seen: dict[tuple[str, str], _Seen] = {}

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look_at_all()
            if self._clock() - self._watched_at < WATCHED_S:
                await self.look_at_each()
            elif self._seen:
                self._seen.clear()
                self._looked_at = None

    def watch(self) -> None:
        """Somebody looks."""
        self._watched_at = self._clock()

    def look_at_all(self) -> None:
        """Take in what all models together have counted."""
        now, found = self._clock(), totals()
        elapsed_s = max(1e-3, now - self._looked_at_all)
        counts = [new - old for new, old in zip(found.total.counts, self._before.total.counts, strict=True)]
        answered = sum(counts) + found.hits - self._before.hits
        self.looks.append(
            Look(
                answered / elapsed_s,
                (found.failed - self._before.failed) / elapsed_s,
                quantile_ms(counts, 0.5),
                quantile_ms(counts, 0.99),
            )
        )
        self._looked_at_all, self._before = now, found

    async def look_at_each(self) -> None:
        """Take in what each copy has counted."""
        now = self._clock()
        elapsed_s = max(1e-3, now - self._looked_at) if self._looked_at is not None else None
        self._looked_at = now
        known, self._seen = self._seen, {}
        for number, copy in enumerate(self._copies()):
            before = known.get((copy.name, copy.version))
            if before is not None and before.copy is copy and before.uses == copy.uses:
                before.rate = _faded(before.rate)
                self._seen[copy.name, copy.version] = before
            elif copy.uses:
                self._seen[copy.name, copy.version] = _looked(copy, before, elapsed_s)
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)

    def rate(self, copy: Copy) -> float | None:
        """Requests per second of a copy; None while only one look has been had."""
        seen = self._seen.get((copy.name, copy.version))
        if seen is None or seen.copy is not copy:
            return 0.0 if self._looked_at is not None and not copy.uses else None
        return seen.rate

    def times_ms(self, copy: Copy) -> tuple[float | None, float | None]:
        """The median and the 99th percentile of a copy's times, those of late weighing more."""
        counts = self.late(copy)
        return quantile_ms(counts, 0.5), quantile_ms(counts, 0.99)

    def late(self, copy: Copy) -> Sequence[float]:
        """A copy's times counted by ``TIME_BOUNDS_NS``, those of late weighing more."""
        seen = self._seen.get((copy.name, copy.version))
        return seen.late if seen is not None and seen.copy is copy else copy.statistics.times_by_bound()


def _looked(copy: Copy, before: _Seen | None, elapsed_s: float | None) -> _Seen:
    found = copy.statistics.snapshot()
    counts = copy.statistics.times_by_bound()
    requests = found.success.count + found.fail.count
    if before is None or before.copy is not copy:
        # At the last look it was not there, or had not been used.
        rate = None if elapsed_s is None else requests / elapsed_s
        return _Seen(copy, copy.uses, requests, counts, [float(count) for count in counts], rate)
    new = [now - old for now, old in zip(counts, before.counts, strict=True)]
    late = [old * _OLD_SHARE + one for old, one in zip(before.late, new, strict=True)] if any(new) else before.late
    rate = (requests - before.requests) / elapsed_s if elapsed_s else 0.0
    if before.rate is not None:
        rate = before.rate * _OLD_SHARE + rate * (1 - _OLD_SHARE)
    return _Seen(copy, copy.uses, requests, counts, late, rate)


def _faded(rate: float | None) -> float:
    return 0.0 if rate is None or rate < 0.01 else rate * _OLD_SHARE


def quantile_ms(counts: Sequence[float], share: float) -> float | None:
    """The value in milliseconds that ``share`` of the counted are below, counts being by ``TIME_BOUNDS_NS``.

    Between two bounds it is taken to be spread evenly; above the last it is the last. None where nothing was counted.
    """
    wanted = sum(counts) * share
    if wanted <= 0:
        return None
    low = 0
    for bound, count in zip(TIME_BOUNDS_NS, counts, strict=False):
        if count >= wanted:
            return (low + (bound - low) * wanted / count) / 1e6
        wanted -= count
        low = bound
    return TIME_BOUNDS_NS[-1] / 1e6
