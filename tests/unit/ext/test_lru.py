"""The LRU equals a naive list under any sequence of operations, and survives being torn down in any order."""

from __future__ import annotations

import gc
import weakref

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mmcore._ext.lru import Entry, Lru


class Weak(Entry):
    __slots__ = ("__weakref__", "other")


class LruMachine(RuleBasedStateMachine):
    """The model: a list of keys from least to most recently used, with weights and pins beside."""

    def __init__(self) -> None:
        super().__init__()
        self.lru = Lru()
        self.order: list[int] = []
        self.entries: dict[int, Entry] = {}
        self.weights: dict[int, int] = {}
        self.pins: dict[int, int] = {}
        self.uses: dict[int, tuple[int, int]] = {}

    def choose(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.order))

    @rule(key=st.integers(0, 20), weight=st.integers(0, 1000))
    def add(self, key: int, weight: int) -> None:
        if key in self.order:
            with pytest.raises(KeyError, match=f"{key} is taken"):
                self.lru.add(Entry(key, weight))
            with pytest.raises(ValueError, match="in a list already"):
                self.lru.add(self.entries[key])
            return
        self.entries[key] = Entry(key, weight)
        self.lru.add(self.entries[key])
        self.order.append(key)
        self.weights[key], self.pins[key] = weight, 0
        self.uses[key] = (0, self.lru.now)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        key = self.choose(data)
        self.lru.touch(self.entries[key])
        self.order.remove(key)
        self.order.append(key)
        self.uses[key] = (self.uses[key][0] + 1, self.lru.now)

    @rule(seconds=st.integers(1, 100))
    def pass_time(self, seconds: int) -> None:
        self.lru.now += seconds

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = self.choose(data)
        entry = self.entries.pop(key)
        self.lru.remove(entry)
        self.order.remove(key)
        assert not entry.linked
        for refused in (self.lru.remove, self.lru.touch):
            with pytest.raises(KeyError):
                refused(entry)

    @precondition(lambda self: self.order)
    @rule(data=st.data(), weight=st.integers(0, 1000))
    def reweigh(self, data: st.DataObject, weight: int) -> None:
        key = self.choose(data)
        self.lru.reweigh(self.entries[key], weight)
        self.weights[key] = weight

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        key = self.choose(data)
        self.entries[key].pin()
        self.pins[key] += 1

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = self.choose(data)
        if self.pins[key] == 0:
            with pytest.raises(ValueError, match="no pin"):
                self.entries[key].unpin()
        else:
            self.pins[key] -= 1
            assert self.entries[key].unpin() == self.pins[key]

    @invariant()
    def equals_the_model(self) -> None:
        assert [entry.key for entry in self.lru] == self.order
        assert len(self.lru) == len(self.order)
        assert self.lru.total == sum(self.weights[key] for key in self.order)
        assert self.lru.pinned == sum(self.weights[key] for key in self.order if self.pins[key])
        assert {key: (self.entries[key].uses, self.entries[key].used_at) for key in self.order} == {
            key: self.uses[key] for key in self.order
        }
        free = [key for key in self.order if not self.pins[key]]
        assert [entry.key for entry in self.lru.oldest_of(3)] == free[:3]
        oldest = self.lru.oldest()
        expected = next((key for key in self.order if self.pins[key] == 0), None)
        assert (oldest.key if oldest is not None else None) == expected
        for key in range(21):
            assert (key in self.lru) == (key in self.order)
            assert self.lru.get(key) is self.entries.get(key)


LruMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
test_lru_equals_a_naive_model = LruMachine.TestCase


def test_a_list_keeps_its_entries_and_lets_go_of_them_when_it_dies() -> None:
    lru = Lru()
    entries = [Weak(number) for number in range(3)]
    for entry in entries:
        lru.add(entry)
    survivor = entries[1]
    watched = [weakref.ref(entry) for entry in entries]
    del entries, entry
    assert all(one() is not None for one in watched)
    del lru
    gc.collect()
    assert [one() is None for one in watched] == [True, False, True]
    assert not survivor.linked
    again = Lru()
    again.add(survivor)
    assert again.oldest() is survivor


def test_entries_that_refer_to_their_list_are_collected_with_it() -> None:
    lru = Lru()
    watched = []
    for number in range(5):
        entry = Weak(number)
        entry.other = lru
        lru.add(entry)
        watched.append(weakref.ref(entry))
    del lru, entry
    gc.collect()
    assert all(one() is None for one in watched)


def test_an_entry_of_another_list_is_refused() -> None:
    one, other = Lru(), Lru()
    entry = Entry("a", 1)
    one.add(entry)
    for refused in (other.touch, other.remove):
        with pytest.raises(KeyError):
            refused(entry)
    with pytest.raises(KeyError):
        other.reweigh(entry, 2)
    assert one.total == 1


def test_weights_are_checked_and_kept_outside_a_list() -> None:
    with pytest.raises(ValueError, match="negative"):
        Entry("a", -1)
    entry = Entry("a", 1)
    lru = Lru()
    lru.reweigh(entry, 7)
    assert (entry.weight, lru.total) == (7, 0)
    lru.add(entry)
    assert lru.total == 7
    with pytest.raises(ValueError, match="negative"):
        lru.reweigh(entry, -1)
    with pytest.raises(ValueError, match="anew"):
        entry.__init__("b")  # type: ignore[misc]  # what a subclass might do


def test_an_entry_that_was_used_before_it_came_has_its_place_by_that() -> None:
    lru = Lru()
    lru.now = 100
    for key, used_at in (("a", 50), ("b", None), ("c", 40), ("d", 50), ("e", 100), ("f", 0)):
        lru.add(Entry(key), used_at)
        lru.now += 1
    assert [(entry.key, entry.used_at) for entry in lru] == [
        ("f", 0), ("c", 40), ("a", 50), ("d", 50), ("e", 100), ("b", 101),
    ]  # fmt: skip
    lru.touch(lru.get("c"))
    assert [entry.key for entry in lru] == ["f", "a", "d", "e", "b", "c"]
    assert list(reversed([entry.key for entry in lru.oldest_of(2)])) == ["a", "f"]
