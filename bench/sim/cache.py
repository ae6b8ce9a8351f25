"""SUITE=cache-sim: the eviction policies of mmcore/cache on made-up traces, beside the least that any could load.

Runs by itself too: ``python -m bench.sim.cache``. The bound is PFOO-L (Berger, Beckmann and Harchol-Balter 2018): the
stays between two uses of a model are granted from the cheapest in bytes × time on, until all the space there is over
the whole trace is used up. No policy loads less, not even one that knows the future.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.builds import FOLDER
from bench.comparison import Plan
from bench.rows import Row
from bench.sim.traces import TRACES, Floats, Trace, reload_s
from mmcore._ext.lru import Entry, Lru
from mmcore.cache.cache import MIN_RESIDENCY_S
from mmcore.cache.eviction import POLICIES, TICKS_PER_S

REQUESTS: Final = 120_000
QUICK_REQUESTS: Final = 12_000
SEED: Final = 5
#: Of all models together, what fits.
SHARES: Final = (0.3, 0.6)
#: The share at which the aims are stated: of a sweep with so much space even the bound is three fifths of LRU's bytes.
AIMED_SHARE: Final = 0.6


@dataclass(frozen=True, slots=True)
class Replay:
    """What a policy loaded: the share of requests that missed, bytes, and the seconds that callers waited for loads."""

    miss_ratio: float
    loaded_bytes: int
    loading_s: float


class Item(Entry):
    """A model in the list."""

    __slots__ = ()


def replay(trace: Trace, capacity: int, policy: str) -> Replay:
    """Run a trace through one of the cache's own policies."""
    lru = Lru()
    eviction = POLICIES[policy](lru)
    sizes: list[int] = trace.sizes.tolist()
    misses = loaded = 0
    loading_s = 0.0
    for model, at in zip(trace.models.tolist(), (trace.times * TICKS_PER_S).astype(np.int64).tolist(), strict=True):
        lru.now = at
        item = lru.get(model)
        if item is not None:
            lru.touch(item)
            continue
        size = sizes[model]
        misses, loaded, loading_s = misses + 1, loaded + size, loading_s + reload_s(size)
        if size > capacity:
            continue
        while lru.total + size > capacity:
            victim = eviction.victim(lambda entry: True)
            assert victim is not None
            eviction.removed(victim)
            lru.remove(victim)
        item = Item(model, size)
        lru.add(item)
        eviction.added(item, reload_s(size), MIN_RESIDENCY_S)
    return Replay(misses / len(trace.models), loaded, loading_s)


def bound(trace: Trace, capacity: int) -> Replay:
    """The least misses, bytes and seconds, each for itself: none can do better in one."""
    order = np.argsort(trace.models, kind="stable")
    same = trace.models[order][1:] == trace.models[order][:-1]
    lengths = (order[1:] - order[:-1])[same].astype(np.float64)
    sizes = trace.sizes[trace.models[order][1:][same]].astype(np.float64)
    total, space = trace.sizes[trace.models].astype(np.float64), float(capacity) * len(trace.models)

    def least(all_costs: Floats, costs: Floats) -> float:
        cheapest = np.argsort(lengths * sizes / costs)
        granted = int(np.searchsorted(np.cumsum((lengths * sizes)[cheapest]), space))
        return float(all_costs.sum() - costs[cheapest[:granted]].sum())

    seconds = np.vectorize(reload_s, otypes=[np.float64])
    ones = np.ones(len(total))
    return Replay(
        least(ones, np.ones(len(lengths))) / len(total), int(least(total, sizes)), least(seconds(total), seconds(sizes))
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trace with one share of space."""

    trace: str
    aim: str
    share: float
    lru: Replay
    ours: Replay
    bound: Replay

    @property
    def bytes_ratio(self) -> float:
        """Bytes that ours loaded, to LRU's."""
        return self.ours.loaded_bytes / self.lru.loaded_bytes

    @property
    def meets_aim(self) -> bool | None:
        """Whether the aim is met; None where none is stated."""
        if self.share != AIMED_SHARE:
            return None
        return self.bytes_ratio <= (0.75 if self.aim == "better" else 1.02)


def simulate(requests: int, shares: tuple[float, ...] = SHARES, names: frozenset[str] = frozenset()) -> list[Outcome]:
    """Every trace of so many requests with every share."""
    outcomes = []
    for name, (make, aim) in TRACES.items():
        if names and name not in names:
            continue
        trace = make(requests, np.random.default_rng(SEED))
        for share in shares:
            capacity = int(trace.footprint * share)
            lru, ours = replay(trace, capacity, "lru"), replay(trace, capacity, "cost")
            outcomes.append(Outcome(name, aim, share, lru, ours, bound(trace, capacity)))
    return outcomes


def show(console: Console, outcomes: list[Outcome]) -> None:
    """Misses and bytes of LRU, ours and the bound, and ours to LRU's."""
    table = Table(title="cache-sim (bound: PFOO-L, which no policy can beat)", title_justify="left")
    for column in ("trace", "space", "misses: LRU", "ours", "bound", "GB loaded: LRU", "ours", "bound"):
        table.add_column(column, justify="left" if column == "trace" else "right")
    for column in ("bytes to LRU's", "seconds to LRU's", "aim"):
        table.add_column(column, justify="right")
    for one in outcomes:
        table.add_row(
            one.trace,
            f"{one.share:.0%}",
            *(f"{replayed.miss_ratio:.2%}" for replayed in (one.lru, one.ours, one.bound)),
            *(f"{replayed.loaded_bytes / 1e9:.2f}" for replayed in (one.lru, one.ours, one.bound)),
            f"{one.bytes_ratio - 1:+.1%}",
            f"{one.ours.loading_s / one.lru.loading_s - 1:+.1%}",
            {None: "", True: f"{one.aim}: met", False: f"{one.aim}: missed"}[one.meets_aim],
        )
    console.print(table)


def run(console: Console, plan: Plan) -> list[Row]:
    """Simulate, show, write ``cache-sim.summary.json``, and give the bytes of ours beside LRU's and the bound's."""
    outcomes = simulate(REQUESTS if plan.duration_s >= 1 else QUICK_REQUESTS, names=plan.cases)
    show(console, outcomes)
    FOLDER.mkdir(parents=True, exist_ok=True)
    summary = [{**asdict(one), "bytes_ratio": one.bytes_ratio, "meets_aim": one.meets_aim} for one in outcomes]
    (FOLDER / "cache-sim.summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    rows = []
    for one in outcomes:
        ours = one.ours.loaded_bytes / 1e6
        for peer, other in (("lru", one.lru), ("bound", one.bound)):
            theirs = other.loaded_bytes / 1e6
            case = f"{one.trace}, space for {one.share:.0%}"
            rows.append(Row(case, "loaded", ours, peer, theirs, theirs / ours, "MB"))
    return rows


if __name__ == "__main__":
    found = simulate(REQUESTS)
    show(Console(width=None if sys.stdout.isatty() else 170), found)
    sys.exit(any(one.meets_aim is False for one in found))
