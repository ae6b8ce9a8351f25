"""How the copies here are used: requests per minute, requests in flight, waits, and in which minutes at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mmcore.cache import Copy
from mmcore.placement import Demand

_MINUTE_MS: Final = 60_000
#: Minutes that are remembered, the running one included.
_MINUTES: Final = 64
#: Copies looked at between two looks at the loop's other work.
_AT_ONCE: Final = 500
#: How much of a new rate is taken at a look.
_NEW_SHARE: Final = 0.5


@dataclass(slots=True)
class _Use:
    """One model's use, and its copy's counters at the last look; none has been had while it is ``new``."""

    copy: Copy
    new: bool = True
    uses: int = 0
    total_ns: int = 0
    queue_ns: int = 0
    requests: int = 0
    rate: float = 0.0
    in_flight: float = 0.0
    queue_ms: float = 0.0
    #: Bit n: used n minutes before ``minute``.
    minutes: int = 0
    minute: int = 0


def monotonic_ms() -> int:
    """Milliseconds by a clock that nobody sets: rates and minutes ago are not to follow one that is."""
    return time.monotonic_ns() // 1_000_000


class Usage:
    """The use of the copies that :meth:`look` is given, from one look to the next.

    Attributes:
        requests_per_minute: of all of them together.
    """

    def __init__(self, clock_ms: Callable[[], int] = monotonic_ms) -> None:
        self.requests_per_minute = 0.0
        self._clock_ms = clock_ms
        self._uses: dict[str, _Use] = {}
        self._looked_ms = clock_ms()

    async def look(self, copies: list[Copy]) -> list[str]:
        """Count what has happened since the last look; the models that were used, by name."""
        now_ms = self._clock_ms()
        elapsed_ms = max(1, now_ms - self._looked_ms)
        self._looked_ms = now_ms
        used = []
        total = 0.0
        known = self._uses
        self._uses = {}
        for number, copy in enumerate(copies):
            use = known.get(copy.name)
            if use is None or use.copy is not copy:
                use = _begun(copy, use)
            self._uses[copy.name] = use
            if _count(use, elapsed_ms, now_ms // _MINUTE_MS):
                used.append(copy.name)
            total += use.rate
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
        self.requests_per_minute = total
        return used

    def demand(self, name: str, copies: int) -> Demand:
        """The use of a model by all its copies, of which there are so many: the others' is taken to be like ours."""
        use = self._uses.get(name)
        if use is None:
            return Demand()
        shift = min(_MINUTES, self._clock_ms() // _MINUTE_MS - use.minute)
        factor = max(1, copies)
        return Demand(
            use.rate * factor, use.in_flight * factor, use.queue_ms, use.minutes << shift & (1 << _MINUTES) - 1
        )


def _begun(copy: Copy, before: _Use | None) -> _Use:
    """The use of a copy that is looked at for the first time; its model was used as ``before`` says."""
    use = _Use(copy)
    if before is not None:
        use.minutes, use.minute = before.minutes, before.minute
    return use


def _count(use: _Use, elapsed_ms: int, minute: int) -> bool:
    """Take in what the counters say; whether there was any use."""
    copy = use.copy
    uses = copy.uses - use.uses
    if uses == 0 and use.rate < 1.0:
        use.rate = use.in_flight = use.queue_ms = 0.0
        return False
    found = copy.statistics.snapshot()
    total_ns = found.success.ns + found.fail.ns
    requests = found.success.count + found.fail.count
    new = requests - use.requests
    # The first requests have waited for the copy to be loaded, which tells nothing of what it takes to answer them.
    if not use.new and new >= 0:
        rate, in_flight = new * _MINUTE_MS / elapsed_ms, (total_ns - use.total_ns) / (elapsed_ms * 1e6)
        use.rate += (rate - use.rate) * _NEW_SHARE
        use.in_flight += (in_flight - use.in_flight) * _NEW_SHARE
        use.queue_ms = (found.queue.ns - use.queue_ns) / 1e6 / new if new else 0.0
    use.new = False
    use.uses, use.total_ns, use.queue_ns, use.requests = copy.uses, total_ns, found.queue.ns, requests
    if uses:
        use.minutes = (use.minutes << min(_MINUTES, minute - use.minute) | 1) & (1 << _MINUTES) - 1
        use.minute = minute
    return uses > 0
