"""What a registered model's record says of its copies, as callers are told it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from mmcore.cache import CopyState
from mmcore.registry import ModelRecord


class ModelState(IntEnum):
    """Numbered as ``mmesh.ModelStatusInfo.ModelStatus``."""

    NOT_FOUND = 0
    NOT_LOADED = 1
    LOADING = 2
    LOADED = 3
    LOADING_FAILED = 4
    UNKNOWN = 5


@dataclass(frozen=True, slots=True)
class CopyStatus:
    """One instance's copy of a model, or its failure to make one, and since when in milliseconds of the epoch."""

    location: str
    state: ModelState
    since_ms: int


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model's state as a whole (that of its best copy), the errors of failed loads and its copies, newest first."""

    state: ModelState
    errors: tuple[str, ...] = ()
    copies: tuple[CopyStatus, ...] = ()


ABSENT: Final = ModelStatus(ModelState.NOT_FOUND)

_STATES: Final[dict[str, ModelState]] = {
    CopyState.QUEUED: ModelState.LOADING,
    CopyState.PULLING: ModelState.LOADING,
    CopyState.LOADING: ModelState.LOADING,
    CopyState.LOADED: ModelState.LOADED,
}


def status_of(record: ModelRecord | None, lives: Callable[[str], bool], barred: str | None = None) -> ModelStatus:
    """The status that a record tells, of the instances that ``lives`` says are there.

    ``barred`` tells why the model is loaded nowhere now, though it may have failed at none of them.
    """
    if record is None:
        return ABSENT
    copies = [
        CopyStatus(instance, state, copy.since_ms)
        for instance, copy in record.copies.items()
        # A newer version may know more states.
        if (state := _STATES.get(copy.state)) is not None and lives(instance)
    ]
    failures = [one for one in record.failures.items() if lives(one[0])]
    failures.sort(key=lambda one: one[1].at_ms, reverse=True)
    state = max((copy.state for copy in copies), default=ModelState.NOT_LOADED)
    if not copies and (failures or barred):
        state = ModelState.LOADING_FAILED
    failed = [CopyStatus(instance, ModelState.LOADING_FAILED, failure.at_ms) for instance, failure in failures]
    return ModelStatus(
        state,
        (*([barred] if barred else []), *(failure.message for _, failure in failures)),
        tuple(sorted([*copies, *failed], key=lambda copy: copy.since_ms, reverse=True)),
    )


def loaded_copies(record: ModelRecord | None, lives: Callable[[str], bool]) -> int:
    """How many copies answer requests."""
    copies = record.copies.items() if record is not None else ()
    return sum(copy.state == CopyState.LOADED and lives(instance) for instance, copy in copies)
