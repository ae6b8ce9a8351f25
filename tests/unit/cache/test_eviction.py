"""The policies choose well on small lists that can be followed by hand, and on the traces of bench/sim/cache."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sim.cache import simulate
from mmcore._ext.lru import Entry, Lru
from mmcore.cache.eviction import POLICIES, TICKS_PER_S, Eviction


class Shelf:
    """A list of entries of a few bytes, and time that passes with each use."""

    def __init__(self, policy: str, capacity: int, *, residency_s: float = 0.0) -> None:
        self.lru = Lru()
        self.eviction: Eviction = POLICIES[policy](self.lru)
        self.capacity = capacity
        self.residency_s = residency_s
        self.loads = 0

    def use(self, key: str, size: int = 1, reload_s: float = 1.0, seconds: float = 1.0) -> None:
        self.lru.now += int(seconds * TICKS_PER_S)
        entry = self.lru.get(key)
        if entry is not None:
            self.lru.touch(entry)
            return
        self.loads += 1
        while self.lru.total + size > self.capacity:
            victim = self.eviction.victim(lambda entry: True)
            assert victim is not None
            self.drop(victim)
        entry = Entry(key, size)
        self.lru.add(entry)
        self.eviction.added(entry, reload_s, self.residency_s)

    def drop(self, entry: Entry) -> None:
        self.eviction.removed(entry)
        self.lru.remove(entry)

    def held(self) -> set[str]:
        return {str(entry.key) for entry in self.lru}


def test_lru_evicts_the_least_recently_used_of_those_that_help() -> None:
    shelf = Shelf("lru", 3)
    for key in ("a", "b", "c", "a", "d"):
        shelf.use(key)
    assert shelf.held() == {"c", "a", "d"}
    victim = shelf.eviction.victim(lambda entry: entry.key != "c")
    assert victim is not None
    assert victim.key == "a"


def test_a_sweep_over_more_than_fits_leaves_most_where_they_are() -> None:
    loads = {}
    for policy in POLICIES:
        shelf = Shelf(policy, 80)
        for _ in range(20):
            for number in range(100):
                shelf.use(f"m{number}")
        loads[policy] = shelf.loads
    assert loads["lru"] == 2000
    # The least is 100 + 19 * 20.
    assert loads["cost"] < 700


def test_a_scan_does_not_drive_out_what_is_used_steadily() -> None:
    shelf = Shelf("cost", 20)
    for number in range(3000):
        shelf.use(f"steady{number % 10}")
        shelf.use(f"once{number}")
    assert {f"steady{number}" for number in range(10)} <= shelf.held()


def test_what_was_steady_once_goes_in_time() -> None:
    shelf = Shelf("cost", 10)
    for number in range(500):
        shelf.use(f"old{number % 10}")
    for number in range(2000):
        shelf.use(f"new{number % 10}")
    assert shelf.held() == {f"new{number}" for number in range(10)}


def test_what_takes_long_to_load_stays_longer() -> None:
    shelf = Shelf("cost", 10)
    for _ in range(20):
        for number in range(5):
            shelf.use(f"slow{number}", reload_s=50.0)
        for number in range(10):
            shelf.use(f"quick{number}", reload_s=0.01)
    assert {f"slow{number}" for number in range(5)} <= shelf.held()


def test_large_ones_give_way_to_many_small_ones_that_load_as_slowly() -> None:
    shelf = Shelf("cost", 20)
    for _ in range(20):
        shelf.use("large", size=15)
        for number in range(18):
            shelf.use(f"small{number}")
    assert "large" not in shelf.held()


def test_within_its_residency_an_entry_goes_only_after_those_that_came_later() -> None:
    shelf = Shelf("cost", 3, residency_s=1000.0)
    for key in "abcdef":
        shelf.use(key)
    assert shelf.held() == {"a", "b", "f"}
    for _ in range(5):
        shelf.use("a", seconds=400.0)
    # Now the others may go, and of those the one that is used stays.
    shelf.use("g")
    assert shelf.held() in ({"a", "b", "g"}, {"a", "f", "g"})


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_entries_and_those_that_do_not_help_stay(policy: str) -> None:
    shelf = Shelf(policy, 100)
    for number in range(100):
        shelf.use(f"m{number}")
    for number in range(99):
        entry = shelf.lru.get(f"m{number}")
        assert entry is not None
        entry.pin()
    victim = shelf.eviction.victim(lambda entry: True)
    assert victim is not None
    assert victim.key == "m99"
    assert shelf.eviction.victim(lambda entry: entry.key != "m99") is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), max_size=200), st.sampled_from(sorted(POLICIES)))
def test_any_sequence_fits_and_remembers_a_bounded_past(steps: list[tuple[int, int]], policy: str) -> None:
    shelf = Shelf(policy, 100)
    for key, size in steps:
        shelf.use(str(key), size)
        assert shelf.lru.total <= 100
    for entry in list(shelf.lru):
        shelf.drop(entry)
    assert shelf.eviction.victim(lambda entry: True) is None


def test_the_simulation_shows_fewer_bytes_than_lru_where_that_is_promised() -> None:
    outcomes = simulate(12_000, (0.6,))
    assert {one.trace for one in outcomes} >= {"zipf", "daily-sweep", "bursts", "scans-and-zipf"}
    for one in outcomes:
        assert one.bound.loaded_bytes <= min(one.ours.loaded_bytes, one.lru.loaded_bytes)
        assert one.bound.miss_ratio <= min(one.ours.miss_ratio, one.lru.miss_ratio)
        assert one.bytes_ratio < (0.8 if one.aim == "better" else 1.08), one
