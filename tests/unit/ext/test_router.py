"""The routing table: what a name and version lead to, and what a registered model costs."""

from __future__ import annotations

import sys
import tracemalloc

from mmcore._ext.lru import Entry, Lru
from mmcore._ext.router import Registration, Table

#: The design's budget for a model that is registered and not loaded, in bytes.
BUDGET_BYTES = 500


def placed(lru: Lru, registration: Registration, version: str) -> Entry:
    copy = Entry((registration.name, version), 1)
    lru.add(copy)
    registration.place(version, copy)
    return copy


def test_a_name_leads_to_the_preferred_copy_and_a_version_to_its_own() -> None:
    lru = Lru()
    table = Table(lru)
    registration = Registration("m", ("1", "2"), None)
    table.add(registration)
    assert table.lookup("m") is None
    assert table.lookup("m", "1") is None
    one, two = placed(lru, registration, "1"), placed(lru, registration, "2")
    registration.prefer(two)
    assert table.lookup("m") is two
    assert table.lookup("m", "1") is one
    assert table.lookup("m", "2") is two
    assert table.lookup("m", "3") is None
    assert table.lookup("unknown") is None
    assert registration.loaded() == {"1": one, "2": two}


def test_a_lookup_counts_as_use() -> None:
    lru = Lru()
    table = Table(lru)
    copies = []
    for name in "abc":
        registration = Registration(name, ("1",), None)
        table.add(registration)
        copies.append(placed(lru, registration, "1"))
        registration.prefer(copies[-1])
    table.lookup("a")
    assert [entry.key[0] for entry in lru] == ["b", "c", "a"]
    table.lookup("b", "1")
    assert [entry.key[0] for entry in lru] == ["c", "a", "b"]
    table.get("c")
    assert lru.oldest() is copies[2]


def test_a_displaced_copy_is_asked_for_no_more() -> None:
    lru = Lru()
    table = Table(lru)
    registration = Registration("m", ("1",), None)
    table.add(registration)
    old, new = placed(lru, registration, "1"), Entry("new")
    registration.prefer(old)
    registration.place("1", new)
    registration.displace("1", old)
    assert table.lookup("m") is None
    assert table.lookup("m", "1") is new
    registration.displace("1", new)
    assert registration.loaded() == {}
    registration.displace("1", new)


def test_a_copy_that_left_the_lru_is_not_touched() -> None:
    lru = Lru()
    table = Table(lru)
    registration = Registration("m", ("1",), None)
    table.add(registration)
    copy = placed(lru, registration, "1")
    lru.remove(copy)
    assert table.lookup("m", "1") is copy
    assert len(lru) == 0


def test_models_are_listed_replaced_and_forgotten() -> None:
    table = Table(Lru())
    for name in ("b", "a"):
        table.add(Registration(name, (), None))
    again = Registration("b", ("2",), None)
    table.add(again)
    assert [one.name for one in table] == ["b", "a"]
    assert table.get("b") is again
    assert "a" in table
    table.discard("a")
    table.discard("a")
    assert ("a" in table, len(table)) == (False, 1)


def test_a_registered_model_costs_less_than_the_budget() -> None:
    count = 20_000
    versions = ("1",)
    origin = object()
    table = Table(Lru())
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            table.add(Registration(f"a-model-of-usual-name-length-{number:08}", versions, origin))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken / count < BUDGET_BYTES
    assert sys.getsizeof(next(iter(table))) < 200
