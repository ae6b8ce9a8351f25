"""Which copy goes when space is needed: plain least recent use, or what is least worth keeping.

Both are pure: the time is the list's ``now``, which its holder moves on, and what touches an entry writes nothing for
them but that. So the same code runs in the cache and in ``bench/sim/cache``.

What is worth keeping is estimated as in the literature on caches of unequal things (GreedyDual-Size-Frequency, Cao and
Irani 1997; hyperbolic caching, Blankstein, Sen and Freedman 2017; LIRS' reuse distances, Jiang and Zhang 2002): the
time that its reload would take, for each byte and for the time until it is used again. That time is the mean gap
between its uses, remembered for a while after it has gone, so that a model swept over once a day is known by its day;
one that has been idle for longer than its gap is taken to stay idle. One that has been used once is taken for what is
evicted these days, so that a scan passes through little space. Equals are told by who came last: while more models are
swept over than fit, those that are here stay, and the others pass through the place of one.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Protocol

from mmcore._ext.lru import Entry, Lru

#: Units of ``Lru.now`` in a second.
TICKS_PER_S: Final = 10

#: The entries compared for one eviction: the least recently used, and some drawn at random.
OLDEST: Final = 16
DRAWN: Final = 32
#: What a new gap counts for.
_WEIGHT: Final = 0.3
#: What the last victim's idle time counts for in the guess for entries used once.
_GUESS_WEIGHT: Final = 0.05
#: How many entries that have gone are remembered, beside twice as many as are here.
_FEWEST_REMEMBERED: Final = 4096

Helps = Callable[[Entry], bool]


class Eviction(Protocol):
    """Chooses victims in one :class:`Lru`."""

    def added(self, entry: Entry, reload_s: float, residency_s: float) -> None:
        """An entry is in the list: what bringing it back would take, and how long it should stay at least."""

    def removed(self, entry: Entry) -> None:
        """An entry is about to be taken out of the list."""

    def victim(self, helps: Helps) -> Entry | None:
        """The entry to go next, of those that nobody has pinned and that would help; None where there is none."""


class LeastRecentlyUsed:
    """Plain LRU; a residency is not looked at."""

    def __init__(self, lru: Lru) -> None:
        self._lru = lru

    def added(self, entry: Entry, reload_s: float, residency_s: float) -> None:
        """Nothing is kept."""

    def removed(self, entry: Entry) -> None:
        """Nothing was kept."""

    def victim(self, helps: Helps) -> Entry | None:
        """See :class:`Eviction`."""
        oldest = self._lru.oldest()
        if oldest is None or helps(oldest):
            return oldest
        return next((entry for entry in self._lru.oldest_of(len(self._lru)) if helps(entry)), None)


class _Standing:
    """What is known of one entry in the list: its place in the list to draw from, and its life so far, in ticks."""

    __slots__ = ("entry", "gap", "place", "reload_s", "since", "stays_until")

    def __init__(self, entry: Entry, place: int, since: int, gap: float, reload_s: float, stays_until: float) -> None:
        self.entry = entry
        self.place = place
        self.since = since
        #: Between uses in earlier stays; 0: not known.
        self.gap = gap
        self.reload_s = reload_s
        self.stays_until = stays_until

    def mean_gap(self) -> float:
        """Between its uses, in ticks; 0 where there has been one."""
        uses = self.entry.uses
        if uses == 0:
            return self.gap
        own = (self.entry.used_at - self.since) / uses
        if self.gap == 0:
            return max(own, 1.0)
        return self.gap + (own - self.gap) * min(1.0, uses * _WEIGHT)


class CostAware:
    """Evicts what saves the least loading time by staying, of a fixed number of candidates.

    An entry within its residency goes only when no other can, and then the one that came last: so the others keep
    theirs while the newest still gets its turn.
    """

    def __init__(self, lru: Lru) -> None:
        self._lru = lru
        self._random = random.Random(0)  # noqa: S311  # a sample, not a secret
        #: In the order they came.
        self._standings: dict[Hashable, _Standing] = {}
        self._all: list[_Standing] = []
        #: Gap and last use of entries that have gone, the latest last.
        self._gone: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()
        self._guess = 1.0

    def added(self, entry: Entry, reload_s: float, residency_s: float) -> None:
        """See :class:`Eviction`."""
        now = self._lru.now
        gap = 0.0
        known = self._gone.pop(entry.key, None)
        if known is not None:
            before, used_at = known
            latest = float(max(1, now - used_at))
            gap = latest if before == 0 else before + (latest - before) * _WEIGHT
        standing = _Standing(entry, len(self._all), now, gap, reload_s, now + residency_s * TICKS_PER_S)
        self._standings[entry.key] = standing
        self._all.append(standing)

    def removed(self, entry: Entry) -> None:
        """See :class:`Eviction`."""
        standing = self._standings.pop(entry.key)
        last = self._all.pop()
        if last is not standing:
            last.place = standing.place
            self._all[last.place] = last
        self._gone[entry.key] = (standing.mean_gap(), entry.used_at)
        while len(self._gone) > _FEWEST_REMEMBERED + 2 * len(self._all):
            self._gone.popitem(last=False)

    def victim(self, helps: Helps) -> Entry | None:
        """See :class:`Eviction`."""
        now = self._lru.now
        best: _Standing | None = None
        best_rank: tuple[float, int, int] | None = None
        for standing in self._candidates():
            entry = standing.entry
            if standing.stays_until > now or entry.pins or not helps(entry):
                continue
            rank = (self._worth(standing, now), entry.uses, -standing.since)
            if best_rank is None or rank < best_rank:
                best, best_rank = standing, rank
        if best is None:
            return self._otherwise(now, helps)
        self._guess += (self._idle(best, now) - self._guess) * _GUESS_WEIGHT
        return best.entry

    def _candidates(self) -> list[_Standing]:
        found = {entry.key: self._standings[entry.key] for entry in self._lru.oldest_of(OLDEST)}
        if len(self._all) <= OLDEST + DRAWN:
            return self._all
        for _ in range(DRAWN):
            standing = self._all[int(self._random.random() * len(self._all))]
            found[standing.entry.key] = standing
        return list(found.values())

    def _worth(self, standing: _Standing, now: int) -> float:
        return standing.reload_s / (max(1, standing.entry.weight) * self._idle(standing, now))

    def _idle(self, standing: _Standing, now: int) -> float:
        """How long it is expected to be idle from now on, in ticks."""
        return max(standing.mean_gap() or self._guess, float(now - standing.entry.used_at), 1.0)

    def _otherwise(self, now: int, helps: Helps) -> Entry | None:
        """Where none of the candidates may go: any other that may, else the last of those that should stay."""
        youngest = None
        for standing in reversed(self._standings.values()):
            entry = standing.entry
            if entry.pins or not helps(entry):
                continue
            if standing.stays_until <= now:
                return entry
            youngest = youngest or entry
        return youngest


#: By the names of ``config.EVICTIONS``.
POLICIES: Final[dict[str, Callable[[Lru], Eviction]]] = {"cost": CostAware, "lru": LeastRecentlyUsed}
