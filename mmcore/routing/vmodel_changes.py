"""What becomes of the records when a vmodel is set, switched or deleted: pure functions, for one transaction each.

A vmodel refers to its active model and to its target, once to a model that is both. Every function here gives all the
records that change with it, so that a model's ``references`` are always the number of vmodels that refer to it, and a
model to be deleted with its last reference is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from mmcore.errors import AlreadyExists, Conflict, NotFound
from mmcore.model import ModelInfo
from mmcore.registry import ModelRecord, VModelRecord
from mmcore.routing.copies_wanted import copies_wanted, same_model

#: How long ago a model that nobody has used yet counts as used: one to be loaded now, and one registered for later.
AGE_WHEN_LOADED_NOW_MS: Final = 3_600_000
AGE_WHEN_REGISTERED_MS: Final = 6 * 3_600_000

Models = Mapping[str, ModelRecord | None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a vmodel shall be.

    Attributes:
        target: the model it shall stand for.
        info: what to register that model as, if it is not registered; None: it must be.
        auto_delete: whether a model registered by this goes with its last vmodel.
        update_only: whether the vmodel must exist.
        load_now: whether the target shall be loaded even if the active model is not.
        force: whether it shall be the active model at once, loaded or not.
        expected: the target that the vmodel must have, unless it is the wanted one; empty for any.
        owner: who must own the vmodel; empty for anyone.
        static: the file of static models that says so; empty for anyone else.
    """

    target: str
    info: ModelInfo | None = None
    auto_delete: bool = False
    update_only: bool = False
    load_now: bool = False
    force: bool = False
    expected: str = ""
    owner: str = ""
    static: str = ""


@dataclass(frozen=True, slots=True)
class Changes:
    """A vmodel's new record and those of the models that change with it; None where a record goes."""

    vmodel: VModelRecord | None
    models: Models


def info_of(record: ModelRecord) -> ModelInfo:
    """What a record says was registered."""
    return ModelInfo(record.type, record.path, record.key)


def new_record(info: ModelInfo) -> ModelRecord:
    """The record of a model that is registered as that.

    Raises:
        InvalidRequest: its key asks for copies in a way that cannot be.
    """
    wanted = copies_wanted(info.key)
    return ModelRecord(
        type=info.type,
        path=info.path,
        key=info.key,
        min_copies=wanted.min_copies,
        max_copies=wanted.max_copies,
        everywhere=wanted.everywhere,
    )


def in_transition(record: VModelRecord) -> bool:
    """Whether the target is not the active model yet."""
    return record.active != record.target


def touched(record: VModelRecord | None) -> set[str]:
    """The models that a vmodel refers to."""
    return {record.active, record.target} if record is not None else set()


def set_vmodel(
    name: str,
    before: VModelRecord | None,
    models: Models,
    wanted: Wanted,
    *,
    loaded: Callable[[str, ModelRecord | None], int],
    default_owner: str = "",
    now_ms: int,
) -> Changes:
    """Give a vmodel its target. ``models`` are those it refers to and the target; ``loaded`` counts a model's copies.

    Raises:
        NotFound: the target is not registered and nothing says what it is, or a vmodel to be updated is not there.
        AlreadyExists: the vmodel has another owner, or the target is registered as something else.
        Conflict: the vmodel's target is not the expected one.
    """
    _check(name, before, wanted)
    target = models[wanted.target]
    if target is None:
        target = _new_model(wanted, models.get(before.active) if before is not None else None, now_ms)
    elif wanted.info is not None and not same_model(info_of(target), wanted.info):
        raise AlreadyExists(f"Target model {wanted.target} already exists with different attribute values")
    elif wanted.info is not None and not wanted.static:
        target = replace(target, static="")
    if before is None:
        owner = wanted.owner or default_owner
        after = VModelRecord(owner=owner, active=wanted.target, target=wanted.target, static=wanted.static)
    elif before.target == wanted.target and not (wanted.force and in_transition(before)):
        after = before if wanted.static else replace(before, static="")
    else:
        enough = loaded(wanted.target, target) >= loaded(before.active, models.get(before.active))
        active = wanted.target if wanted.force or enough else before.active
        static = before.static if wanted.static else ""
        after = replace(before, active=active, target=wanted.target, failed=False, static=static)
    return Changes(after, _referred(before, after, {**models, wanted.target: target}, models))


def switch(before: VModelRecord, models: Models) -> Changes:
    """Make a vmodel's target its active model."""
    after = replace(before, active=before.target, failed=False)
    return Changes(after, _referred(before, after, models, models))


def delete_vmodel(before: VModelRecord, models: Models) -> Changes:
    """Let a vmodel go."""
    return Changes(None, _referred(before, None, models, models))


def _check(name: str, before: VModelRecord | None, wanted: Wanted) -> None:
    if before is None:
        if wanted.expected not in ("", wanted.target):
            raise Conflict(f"vmodel {name} not found")
        if wanted.update_only:
            raise NotFound(f"vmodel not found: {name}")
        return
    if wanted.owner not in ("", before.owner):
        raise AlreadyExists(f"vmodel {name} already exists with different owner '{before.owner}'")
    if wanted.expected and before.target not in (wanted.expected, wanted.target):
        raise Conflict(f"Existing target model {before.target} does not match expected {wanted.expected}")


def _new_model(wanted: Wanted, active: ModelRecord | None, now_ms: int) -> ModelRecord:
    if wanted.info is None:
        raise NotFound(f"target model not found: {wanted.target}")
    age_ms = AGE_WHEN_LOADED_NOW_MS if wanted.load_now else AGE_WHEN_REGISTERED_MS
    last_used_ms = active.last_used_ms if active is not None else now_ms - age_ms
    record = new_record(wanted.info)
    return replace(record, auto_delete=wanted.auto_delete, last_used_ms=last_used_ms, static=wanted.static)


def _referred(before: VModelRecord | None, after: VModelRecord | None, models: Models, stored: Models) -> Models:
    """The models whose records differ from those stored, with their references counted anew."""
    changed: dict[str, ModelRecord | None] = {}
    for name in touched(before) | touched(after):
        record = models.get(name)
        if record is None:
            # Taken out of the registry by other means; there is nothing to count.
            continue
        references = record.references + (name in touched(after)) - (name in touched(before))
        new = replace(record, references=references)
        gone = references == 0 and record.auto_delete and name in touched(before)
        if gone or new != stored.get(name):
            changed[name] = None if gone else new
    return changed
