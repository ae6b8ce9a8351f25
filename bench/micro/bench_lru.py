"""1,000 touches in a list of 1e3 to 1e6 entries, beside ``OrderedDict.move_to_end``: a figure in µs is ns for each.

``zipf`` is what requests look like (few models take most of them, exponent 1.1), ``uniform`` the worst there is: at a
million entries nearly every touch waits for memory.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from mmcore._ext.lru import Entry, Lru

SIZES: Final = (10**3, 10**4, 10**5, 10**6)
TOUCHES: Final = 1000
#: Different ones in each round, so that the processor's caches do not learn them.
ROUNDS: Final = 200


def picks(size: int, pattern: str) -> NDArray[np.int64]:
    """Entries to touch, TOUCHES in each row; where they lie in memory has nothing to do with how often they come."""
    random = np.random.default_rng(7)
    if pattern == "uniform":
        return random.integers(0, size, (ROUNDS, TOUCHES))
    weights = 1.0 / np.arange(1, size + 1) ** 1.1
    return random.permutation(size)[random.choice(size, (ROUNDS, TOUCHES), p=weights / weights.sum())]


@lru_cache(1)
def filled(size: int) -> tuple[Lru, list[Entry]]:
    """A list of so many entries, made once."""
    lru = Lru()
    entries = [Entry(number, 1) for number in range(size)]
    for entry in entries:
        lru.add(entry)
    return lru, entries


def ours(size: int) -> tuple[Callable[[Any], None], Sequence[Hashable]]:
    """What touches, and what can be touched."""
    lru, entries = filled(size)
    return lru.touch, entries


def ordered_dict(size: int) -> tuple[Callable[[Any], None], Sequence[Hashable]]:
    """The same with the standard library's."""
    keys = [f"model-{number}" for number in range(size)]
    return OrderedDict.fromkeys(keys).move_to_end, keys


@pytest.mark.parametrize("side", ["mmcore", "OrderedDict"])
@pytest.mark.parametrize("pattern", ["zipf", "uniform"])
@pytest.mark.parametrize("size", SIZES)
def test_touch(benchmark: BenchmarkFixture, size: int, pattern: str, side: str) -> None:
    """A thousand touches."""
    benchmark.group = f"lru {pattern} {size:,}"
    touch, entries = {"mmcore": ours, "OrderedDict": ordered_dict}[side](size)
    rounds = [[entries[index] for index in row] for row in picks(size, pattern).tolist()]
    turn = iter(range(10**9))
    benchmark.pedantic(
        lambda chosen: deque(map(touch, chosen), maxlen=0),
        setup=lambda: ((rounds[next(turn) % ROUNDS],), {}),
        rounds=ROUNDS,
    )


def test_add_and_evict(benchmark: BenchmarkFixture) -> None:
    """1,000 times one entry more and the oldest one out, in a list of 1e5."""
    benchmark.group = "lru add and evict 100,000"
    lru, _ = filled(10**5)
    number = iter(range(10**6, 10**9))

    def cycle() -> None:
        for _ in range(TOUCHES):
            lru.add(Entry(next(number), 1))
            oldest = lru.oldest()
            assert oldest is not None
            lru.remove(oldest)

    benchmark(cycle)
    assert len(lru) == 10**5
