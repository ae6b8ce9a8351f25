"""Who is asked for how often: many models, few of them popular, and not the same ones for long."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

#: Zipf's exponent: of a million models the most popular gets a third of all requests, the last 800,000 get 0.3 %.
EXPONENT: Final = 1.4
#: Sizes are log-normal about this median, within bounds, in bytes.
MEDIAN_SIZE: Final = 16e6
SIZE_SPREAD: Final = 0.8
SIZE_BOUNDS: Final = (1e6, 400e6)
#: Each minute this share of the models exchange their popularity with any other's, and so many of the thousand most
#: popular with one that was not.
DRIFT: Final = 0.001
TRENDS: Final = 2


class Workload:
    """The popularity of each model and its last use.

    Attributes:
        sizes: bytes of a loaded copy.
        rates: requests per minute.
        last_used_ms: before the start as if it had gone on forever.
    """

    def __init__(self, models: int, requests_per_minute: float, seed: int) -> None:
        self._random: Final = np.random.default_rng(seed)
        popularity = np.arange(1, models + 1, dtype=np.float64) ** -EXPONENT
        popularity *= requests_per_minute / popularity.sum()
        self._by_rank: Final = self._random.permutation(models)
        self.rates: Final = np.empty(models)
        self.rates[self._by_rank] = popularity
        spread = np.exp(self._random.normal(0.0, SIZE_SPREAD, models))
        self.sizes: Final = np.clip(MEDIAN_SIZE * spread, *SIZE_BOUNDS).astype(np.int64)
        idle_ms = np.minimum(self._random.exponential(60_000 / self.rates), 7 * 86_400_000.0)
        self.last_used_ms: NDArray[np.int64] = (-idle_ms).astype(np.int64)

    def used(self, now_ms: int, lasting_ms: int) -> NDArray[np.int64]:
        """The models that were asked for in the time up to now, in any order."""
        chance = 1.0 - np.exp(self.rates * (-lasting_ms / 60_000))
        asked = np.flatnonzero(self._random.random(len(chance)) < chance)
        self.last_used_ms[asked] = now_ms
        self._random.shuffle(asked)
        return asked

    def drift(self) -> None:
        """A minute's change of taste."""
        count = len(self.rates)
        ranks = self._random.integers(0, count, (max(1, int(count * DRIFT)), 2))
        trends = np.stack(
            [self._random.integers(0, min(1000, count), TRENDS), self._random.integers(0, count, TRENDS)], axis=1
        )
        for one, other in (*ranks.tolist(), *trends.tolist()):
            first, second = self._by_rank[one], self._by_rank[other]
            self._by_rank[one], self._by_rank[other] = second, first
            self.rates[first], self.rates[second] = self.rates[second], self.rates[first]
