"""1,000 routing decisions with 1e3 to 1e6 models: name and version to the copy, with the touch of the LRU.

A figure in µs is ns for each decision. Of the models registered, 20,000 at most are loaded, and those are asked for;
half of the requests name a version. The peer does the same with Python's dictionaries: name to version to key, then
``OrderedDict.move_to_end``. ``zipf`` and ``uniform`` are those of bench_lru. From 1e5 models on, what is measured is
memory: one ``dict.get`` with a new key takes as long there as the whole decision.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.bench_lru import ROUNDS, SIZES, picks
from mmcore._ext.lru import Entry, Lru
from mmcore._ext.router import Registration, Table

VERSIONS: Final = ("1",)
#: The design's number of models resident in one instance.
LOADED: Final = 20_000
Lookup = Callable[[str, str], Any]


def name(number: int) -> str:
    """A model's name, a new string as it comes from a request."""
    return f"a-model-of-usual-length-{number:07}"


def loaded(size: int) -> NDArray[np.int64]:
    """The numbers of the models that are loaded."""
    return np.random.default_rng(3).permutation(size)[:LOADED]


@lru_cache(1)
def ours(size: int) -> Lookup:
    """A routing table with so many models."""
    lru = Lru()
    table = Table(lru)
    here = set(loaded(size).tolist())
    for number in range(size):
        registration = Registration(name(number), VERSIONS, None)
        if number in here:
            copy = Entry(number, 1)
            lru.add(copy)
            registration.place("1", copy)
            registration.prefer("1")
        table.add(registration)
    return table.lookup


@lru_cache(1)
def dictionaries(size: int) -> Lookup:
    """The same in plain Python."""
    here = set(loaded(size).tolist())
    table = {name(number): {"": number, "1": number} if number in here else None for number in range(size)}
    order = OrderedDict((number, object()) for number in range(size) if number in here)

    def lookup(name: str, version: str) -> object:
        versions = table.get(name)
        if versions is None:
            return None
        key = versions.get(version)
        if key is None:
            return None
        order.move_to_end(key)
        return order[key]

    return lookup


@pytest.mark.parametrize("side", ["mmcore", "dict"])
@pytest.mark.parametrize("pattern", ["zipf", "uniform"])
@pytest.mark.parametrize("size", SIZES)
def test_lookup(benchmark: BenchmarkFixture, size: int, pattern: str, side: str) -> None:
    """A thousand decisions."""
    benchmark.group = f"router {pattern} {size:,}"
    lookup = {"mmcore": ours, "dict": dictionaries}[side](size)
    chosen = loaded(size)[picks(min(size, LOADED), pattern)].tolist()
    turn = iter(range(10**9))

    def requests() -> tuple[tuple[list[str], list[str]], dict[str, Any]]:
        row = chosen[next(turn) % ROUNDS]
        return ([name(number) for number in row], ["" if number % 2 else "1" for number in row]), {}

    benchmark.pedantic(
        lambda names, versions: deque(map(lookup, names, versions), maxlen=0), setup=requests, rounds=ROUNDS
    )
    assert lookup("unknown", "") is None


def test_lookup_of_what_is_held_elsewhere(benchmark: BenchmarkFixture) -> None:
    """A thousand decisions for a peer, of 1e5 models that all have a copy elsewhere."""
    benchmark.group = "router elsewhere 100,000"
    table = Table(Lru())
    holders = (object(), object())
    for number in range(10**5):
        table.add(Registration(name(number), VERSIONS, None))
        table.hold(name(number), holders)
    names = [name(number) for number in picks(10**5, "uniform")[0].tolist()]

    def decide() -> None:
        deque(map(table.lookup, names), maxlen=0)
        deque(map(table.holders, names), maxlen=0)

    benchmark(decide)


@pytest.mark.parametrize("asked", ["model", "alias"])
def test_lookup_beside_aliases(benchmark: BenchmarkFixture, asked: str) -> None:
    """A thousand decisions by names of models, or of as many vmodels, of 2e4 that are loaded."""
    benchmark.group = "router with 20,000 aliases"
    lru = Lru()
    table = Table(lru)
    for number in range(LOADED):
        registration = Registration(name(number), VERSIONS, None)
        copy = Entry(number, 1)
        lru.add(copy)
        registration.place("1", copy)
        registration.prefer("1")
        table.add(registration)
        table.alias(f"v{name(number)}", registration)
    prefix = "v" if asked == "alias" else ""
    rows = picks(LOADED, "uniform").tolist()
    turn = iter(range(10**9))

    def requests() -> tuple[tuple[list[str]], dict[str, Any]]:
        return ([f"{prefix}{name(number)}" for number in rows[next(turn) % ROUNDS]],), {}

    benchmark.pedantic(lambda names: deque(map(table.lookup, names), maxlen=0), setup=requests, rounds=ROUNDS)


def test_lookup_of_what_is_not_loaded(benchmark: BenchmarkFixture) -> None:
    """A thousand decisions about models that are registered alone, of 1e5."""
    benchmark.group = "router not loaded 100,000"
    table = Table(Lru())
    for number in range(10**5):
        table.add(Registration(name(number), VERSIONS, None))
    names = [name(number) for number in picks(10**5, "uniform")[0].tolist()]
    benchmark(lambda: deque(map(table.lookup, names), maxlen=0))
