"""Made-up traces of many models: which is asked for when, and how large each is.

A model's size in memory is drawn from a log-normal distribution, from tens of KB to tens of MB with a median of 300 KB,
as folders of scikit-learn, boosted trees and small networks have. Its reload takes some milliseconds and as long as its
bytes take to be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_DAY_S: Final = 86_400.0
_MEDIAN_BYTES: Final = 300e3
_SPREAD: Final = 1.4
_SMALLEST_BYTES, _LARGEST_BYTES = 8e3, 60e6
#: A load takes so long and its bytes at this rate (measured with mixed models on a disk cache, see SUITE=cold-loads).
LOAD_S: Final = 2e-3
BYTES_PER_S: Final = 150e6

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests: the model of each (a number) and its time in seconds; and by model the bytes it takes."""

    models: Integers
    times: Floats
    sizes: Integers

    @property
    def footprint(self) -> int:
        """Bytes of all models that are asked for."""
        return int(self.sizes[np.unique(self.models)].sum())


def reload_s(size: int) -> float:
    """Seconds that a load of a model of ``size`` bytes takes."""
    return LOAD_S + size / BYTES_PER_S


def _steady(requests: int) -> Floats:
    """Ten requests a second."""
    return np.arange(requests, dtype=np.float64) / 10


def _sizes(count: int, random: np.random.Generator) -> Integers:
    drawn = np.exp(random.normal(math.log(_MEDIAN_BYTES), _SPREAD, count))
    return np.clip(drawn, _SMALLEST_BYTES, _LARGEST_BYTES).astype(np.int64)


def _ranks(models: int, requests: int, random: np.random.Generator, exponent: float = 0.9) -> Integers:
    weights = 1.0 / np.arange(1, models + 1) ** exponent
    return random.choice(models, requests, p=weights / weights.sum())


def zipf(requests: int, random: np.random.Generator) -> Trace:
    """Popularity that stays as it is."""
    models = max(50, requests // 30)
    chosen = random.permutation(models)[_ranks(models, requests, random)]
    return Trace(chosen, _steady(requests), _sizes(models, random))


def zipf_drift(requests: int, random: np.random.Generator) -> Trace:
    """Popularity that moves: all the time some models change places with others."""
    models = max(50, requests // 30)
    order, ranks = random.permutation(models), _ranks(models, requests, random)
    chosen = np.empty(requests, np.int64)
    step = 500
    for start in range(0, requests, step):
        chosen[start : start + step] = order[ranks[start : start + step]]
        one, other = random.integers(0, models, (2, max(1, models // 200)))
        order[one], order[other] = order[other].copy(), order[one].copy()
    return Trace(chosen, _steady(requests), _sizes(models, random))


def daily_sweep(requests: int, random: np.random.Generator) -> Trace:
    """Every model once a day within an hour, in about the same order: a batch job over more models than fit."""
    days = 30
    models = max(20, requests // days)
    order = [np.argsort(np.arange(models) + random.normal(0, models / 100, models)) for _ in range(days)]
    times = [day * _DAY_S + 3600.0 * np.arange(models) / models for day in range(days)]
    return Trace(np.concatenate(order), np.concatenate(times), _sizes(models, random))


def sweep_and_traffic(requests: int, random: np.random.Generator) -> Trace:
    """A daily sweep over most models, and all day long requests for some others."""
    days = 30
    swept = max(20, requests // days // 2)
    popular = max(10, swept // 5)
    nightly = np.tile(np.arange(swept) + popular, days)
    nightly_times = (np.arange(days)[:, None] * _DAY_S + 3600.0 * np.arange(swept)[None, :] / swept).ravel()
    traffic = random.permutation(popular)[_ranks(popular, swept * days, random)]
    traffic_times = np.sort(random.random(swept * days)) * days * _DAY_S
    times = np.concatenate([nightly_times, traffic_times])
    order = np.argsort(times, kind="stable")
    return Trace(np.concatenate([nightly, traffic])[order], times[order], _sizes(swept + popular, random))


def bursts(requests: int, random: np.random.Generator) -> Trace:
    """A few models for some time, then a few others."""
    models = max(50, requests // 30)
    chosen: list[Integers] = []
    left = requests
    while left > 0:
        active = random.integers(0, models, 8)
        length = min(left, int(random.integers(50, 400)))
        chosen.append(random.choice(active, length))
        left -= length
    return Trace(np.concatenate(chosen), _steady(requests), _sizes(models, random))


def scans_and_zipf(requests: int, random: np.random.Generator) -> Trace:
    """Steady popularity, and now and then a walk over models that are hardly asked for otherwise."""
    popular = max(50, requests // 60)
    rare = popular * 4
    steady = random.permutation(popular)[_ranks(popular, requests, random)]
    quiet, walk = popular * 3 // 2, popular * 3 // 4
    chosen: list[Integers] = []
    at = walked = total = 0
    while total < requests:
        chosen.append(steady[at : at + quiet])
        at += quiet
        scanned = popular + (walked + np.arange(walk)) % rare
        walked += walk
        beside = steady[at : at + walk]
        at += walk
        chosen.append(np.column_stack([scanned[: len(beside)], beside]).ravel())
        total += quiet + 2 * walk
    models = np.concatenate(chosen)[:requests]
    return Trace(models, _steady(len(models)), _sizes(popular + rare, random))


#: By name; the second says how the aim is stated: at least a quarter fewer bytes than LRU, or no more than 2 % more.
TRACES: Final[dict[str, tuple[Callable[[int, np.random.Generator], Trace], str]]] = {
    "zipf": (zipf, "no worse"),
    "zipf-drift": (zipf_drift, "no worse"),
    "daily-sweep": (daily_sweep, "better"),
    "sweep-and-traffic": (sweep_and_traffic, "better"),
    "bursts": (bursts, "no worse"),
    "scans-and-zipf": (scans_and_zipf, "better"),
}
