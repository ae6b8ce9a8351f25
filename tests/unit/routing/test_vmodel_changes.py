"""What a vmodel's change does to the records: who may, what is switched at once, and references that are exact."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mmcore.errors import AlreadyExists, Conflict, MmcoreError, NotFound
from mmcore.model import ModelInfo
from mmcore.registry import ModelRecord, VModelRecord
from mmcore.routing.vmodel_changes import Changes, Wanted, delete_vmodel, in_transition, set_vmodel, switch, touched

INFO = ModelInfo("sklearn", "/a")
NOW_MS = 100 * 3_600_000
HOUR_MS = 3_600_000

OLD = ModelRecord(type="sklearn", path="/old", references=1, last_used_ms=7)
NEW = ModelRecord(type="sklearn", path="/new")
V = VModelRecord(owner="me", active="old", target="old")


def assign(
    before: VModelRecord | None, wanted: Wanted, loaded: dict[str, int] | None = None, **models: ModelRecord
) -> Changes:
    found = {name: models.get(name) for name in {wanted.target, *touched(before)}}
    return set_vmodel(
        "v",
        before,
        found,
        wanted,
        loaded=lambda name, record: (loaded or {}).get(name, 0),
        default_owner="",
        now_ms=NOW_MS,
    )


def test_a_new_vmodel_stands_for_its_target_at_once() -> None:
    changes = assign(None, Wanted("new", owner="me"), new=NEW)
    assert changes.vmodel == VModelRecord(owner="me", active="new", target="new")
    assert changes.models == {"new": replace(NEW, references=1)}


def test_a_target_is_registered_with_it() -> None:
    changes = assign(None, Wanted("a", INFO, auto_delete=True))
    made = changes.models["a"]
    assert made is not None
    assert (made.type, made.path, made.references, made.auto_delete) == ("sklearn", "/a", 1, True)
    assert made.last_used_ms == NOW_MS - 6 * HOUR_MS
    (made,) = assign(None, Wanted("a", INFO, load_now=True)).models.values()
    assert made is not None and made.last_used_ms == NOW_MS - HOUR_MS
    # It takes the place of the one that has been used.
    made = assign(V, Wanted("a", INFO), old=OLD).models["a"]
    assert made is not None and made.last_used_ms == 7


def test_the_active_model_stays_while_it_serves_and_the_target_does_not_yet() -> None:
    changes = assign(V, Wanted("new"), {"old": 2, "new": 1}, old=OLD, new=NEW)
    assert changes.vmodel == replace(V, target="new")
    assert changes.models == {"new": replace(NEW, references=1)}


@pytest.mark.parametrize(
    ("loaded", "force"), [({}, False), ({"old": 1, "new": 1}, False), ({"old": 2, "new": 3}, False), ({"old": 1}, True)]
)
def test_it_is_switched_at_once_when_nothing_is_lost_or_it_is_forced(loaded: dict[str, int], force: bool) -> None:
    changes = assign(V, Wanted("new", force=force), loaded, old=replace(OLD, auto_delete=True), new=NEW)
    assert changes.vmodel == VModelRecord(owner="me", active="new", target="new")
    assert changes.models == {"old": None, "new": replace(NEW, references=1)}


def test_a_new_target_takes_the_place_of_one_not_reached() -> None:
    moving = replace(V, target="new", failed=True)
    other = ModelRecord(type="sklearn", path="/other")
    serving = {"old": 1}
    changes = assign(
        moving, Wanted("other"), serving, old=OLD, new=replace(NEW, references=1, auto_delete=True), other=other
    )
    assert changes.vmodel == replace(V, target="other")
    assert changes.models == {"new": None, "other": replace(other, references=1)}
    back = assign(moving, Wanted("old"), serving, old=OLD, new=replace(NEW, references=1))
    assert (back.vmodel, back.models) == (V, {"new": NEW})


def test_the_same_again_changes_nothing_but_when_forced_on_the_way() -> None:
    assert assign(V, Wanted("old"), old=OLD) == Changes(V, {})
    assert assign(V, Wanted("old", force=True), old=OLD) == Changes(V, {})
    moving = replace(V, target="new")
    there = {"old": OLD, "new": replace(NEW, references=1)}
    assert assign(moving, Wanted("new"), {"old": 1}, **there) == Changes(moving, {})
    forced = assign(moving, Wanted("new", force=True), {"old": 1}, **there)
    assert (forced.vmodel, forced.models) == (replace(moving, active="new"), {"old": replace(OLD, references=0)})


@pytest.mark.parametrize(
    ("before", "wanted", "error", "text"),
    [
        (None, Wanted("absent"), NotFound, "target model not found: absent"),
        (None, Wanted("new", update_only=True), NotFound, "vmodel not found: v"),
        (None, Wanted("new", expected="old"), Conflict, "vmodel v not found"),
        (V, Wanted("new", expected="another"), Conflict, "Existing target model old does not match expected another"),
        (V, Wanted("new", expected="new"), Conflict, "Existing target model old does not match expected new"),
        (V, Wanted("new", owner="you"), AlreadyExists, "vmodel v already exists with different owner 'me'"),
        (V, Wanted("new", INFO), AlreadyExists, "Target model new already exists with different attribute values"),
    ],
)
def test_what_is_refused(before: VModelRecord | None, wanted: Wanted, error: type[MmcoreError], text: str) -> None:
    with pytest.raises(error, match=text):
        assign(before, wanted, old=OLD, new=NEW)


@pytest.mark.parametrize(
    ("before", "wanted"),
    [
        (None, Wanted("old", expected="old")),
        (V, Wanted("old", expected="old")),
        (V, Wanted("old", expected="another")),
        (V, Wanted("new", expected="old", owner="me", update_only=True)),
    ],
)
def test_what_is_expected_is_done(before: VModelRecord | None, wanted: Wanted) -> None:
    changes = assign(before, wanted, old=OLD, new=NEW)
    assert changes.vmodel is not None
    assert changes.vmodel.target == wanted.target


NAMES = [f"m{number}" for number in range(5)]
VMODELS = [f"v{number}" for number in range(3)]


class VModelMachine(RuleBasedStateMachine):
    """Whatever is done in whatever order, every model has the references that there are, and goes with the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, ModelRecord] = {}
        self.vmodels: dict[str, VModelRecord] = {}
        #: Models that have been referred to since they were registered.
        self.referred: set[str] = set()

    def commit(self, name: str, changes: Changes) -> None:
        for model, record in changes.models.items():
            if record is None:
                del self.models[model]
                self.referred.discard(model)
            else:
                self.models[model] = record
                self.referred.add(model)
        if changes.vmodel is None:
            self.vmodels.pop(name, None)
        else:
            self.vmodels[name] = changes.vmodel

    @rule(
        name=st.sampled_from(VMODELS), model=st.sampled_from(NAMES), info=st.booleans(), auto=st.booleans(),
        force=st.booleans(), loaded=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 2)),
    )  # fmt: skip
    def assign(self, name: str, model: str, info: bool, auto: bool, force: bool, loaded: dict[str, int]) -> None:
        before = self.vmodels.get(name)
        wanted = Wanted(model, ModelInfo("fake", model) if info else None, auto_delete=auto, force=force)
        models = {one: self.models.get(one) for one in {model, *touched(before)}}
        try:
            changes = set_vmodel(name, before, models, wanted, loaded=lambda one, _: loaded.get(one, 0), now_ms=NOW_MS)
        except NotFound:
            assert model not in self.models and not info
            return
        assert changes.vmodel is not None and changes.vmodel.target == model
        self.commit(name, changes)

    @rule(name=st.sampled_from(NAMES))
    def register(self, name: str) -> None:
        self.models.setdefault(name, ModelRecord(type="fake", path=name))

    @rule(name=st.sampled_from(NAMES))
    def unregister(self, name: str) -> None:
        if name in self.models and not self.models[name].references:
            del self.models[name]
            self.referred.discard(name)

    @precondition(lambda self: any(map(in_transition, self.vmodels.values())))
    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        moving = [name for name, record in self.vmodels.items() if in_transition(record)]
        name = data.draw(st.sampled_from(moving))
        record = self.vmodels[name]
        self.commit(name, switch(record, {one: self.models.get(one) for one in touched(record)}))

    @precondition(lambda self: self.vmodels)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.vmodels)))
        record = self.vmodels[name]
        self.commit(name, delete_vmodel(record, {one: self.models.get(one) for one in touched(record)}))

    @invariant()
    def references_are_exact(self) -> None:
        counted = Counter(model for record in self.vmodels.values() for model in touched(record))
        assert {name: record.references for name, record in self.models.items() if record.references} == counted
        assert not any(
            record.auto_delete and not record.references and name in self.referred
            for name, record in self.models.items()
        )


VModelMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_references_are_exact_in_any_order = VModelMachine.TestCase
