"""The routing table: what a name and version lead to, and what a registered model costs."""

from __future__ import annotations

import sys
import tracemalloc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

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
    registration.prefer("2")
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
        registration.prefer("1")
    table.lookup("a")
    assert [entry.key[0] for entry in lru] == ["b", "c", "a"]
    table.lookup("b", "1")
    assert [entry.key[0] for entry in lru] == ["c", "a", "b"]
    table.get("c")
    assert lru.oldest() is copies[2]


def test_a_copy_takes_the_place_of_another_of_its_version() -> None:
    lru = Lru()
    table = Table(lru)
    registration = Registration("m", ("1",), None)
    table.add(registration)
    old, new = placed(lru, registration, "1"), Entry("new")
    registration.prefer("1")
    registration.place("1", new)
    assert table.lookup("m") is table.lookup("m", "1") is new
    registration.displace("1", old)
    assert table.lookup("m") is new
    registration.displace("1", new)
    assert table.lookup("m") is table.lookup("m", "1") is None
    assert registration.loaded() == {}
    registration.displace("1", new)
    with pytest.raises(KeyError, match="no copy of version '1'"):
        registration.prefer("1")


class TableMachine(RuleBasedStateMachine):
    """The table equals a dictionary whatever is registered and forgotten, while its slots collide and grow."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(Lru())
        self.model: dict[str, Registration] = {}
        self.aliases: dict[str, Registration] = {}

    @rule(number=st.integers(0, 400))
    def add(self, number: int) -> None:
        registration = Registration(f"m{number}", ("1",), None)
        copy = Entry(number)
        registration.place("1", copy)
        registration.prefer("1")
        self.table.add(registration)
        before = self.model.get(registration.name)
        self.aliases |= {alias: registration for alias, one in self.aliases.items() if one is before}
        self.model[registration.name] = registration

    @rule(number=st.integers(0, 400), model=st.integers(0, 400), count=st.integers(1, 30))
    def alias(self, number: int, model: int, count: int) -> None:
        registration = self.model.get(f"m{model}")
        if registration is not None:
            for one in range(number, number + count):
                self.table.alias(f"m{one}", registration)
                self.aliases[f"m{one}"] = registration

    @rule(number=st.integers(0, 400), count=st.integers(1, 30))
    def unalias(self, number: int, count: int) -> None:
        for one in range(number, number + count):
            self.table.unalias(f"m{one}")
            self.aliases.pop(f"m{one}", None)

    @rule(start=st.integers(0, 400), count=st.integers(1, 100))
    def add_many(self, start: int, count: int) -> None:
        for number in range(start, start + count):
            self.add(number)

    @rule(start=st.integers(0, 400), count=st.integers(1, 100))
    def discard_many(self, start: int, count: int) -> None:
        for number in range(start, start + count):
            self.table.discard(f"m{number}")
            gone = self.model.pop(f"m{number}", None)
            self.aliases = {alias: one for alias, one in self.aliases.items() if one is not gone}

    @invariant()
    def equals_the_model(self) -> None:
        assert len(self.table) == len(self.model)
        for number in range(0, 501, 7):
            known = self.model.get(f"m{number}")
            assert self.table.get(f"m{number}") is known
            answers = self.aliases.get(f"m{number}", known)
            assert self.table.aliased(f"m{number}") is self.aliases.get(f"m{number}")
            assert self.table.lookup(f"m{number}") is (answers.here if answers is not None else None)
            assert self.table.lookup_model(f"m{number}") is (known.here if known is not None else None)
        assert list(self.table) == list(self.model.values())


TableMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
test_the_table_equals_a_dictionary = TableMachine.TestCase


def test_an_alias_leads_to_another_models_copy_and_goes_with_it() -> None:
    lru = Lru()
    table = Table(lru)
    one, two = Registration("one", ("1",), None), Registration("two", ("1",), None)
    table.add(one)
    table.add(two)
    copy, other = placed(lru, one, "1"), placed(lru, two, "1")
    one.prefer("1")
    two.prefer("1")
    table.alias("latest", one)
    assert table.lookup("latest") is table.lookup("latest", "1") is copy
    assert ("latest" in table, table.get("latest"), table.lookup_model("latest")) == (False, None, None)
    table.alias("latest", two)
    table.alias("one", two)
    assert table.lookup("latest") is table.lookup("one") is other
    assert table.lookup_model("one") is copy
    table.discard("two")
    assert table.lookup("latest") is table.aliased("latest") is None
    assert table.lookup("one") is copy
    table.unalias("one")
    assert table.lookup("one") is copy


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


def test_the_peers_that_hold_a_model_are_kept_beside_it() -> None:
    table = Table(Lru())
    one, two = object(), object()
    assert table.holders("m") == ()
    table.hold("m", (one, two))
    table.add(Registration("n", ("1",), None))
    assert table.holders("m") == (one, two)
    assert (table.holders("n"), table.lookup("m"), len(table)) == ((), None, 1)
    table.hold("m", ())
    table.hold("unknown", ())
    assert table.holders("m") == ()
