"""What a plan consists of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """Load a copy of a model at an instance, and why."""

    model: str
    instance: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Give up an instance's copy of a model, and why."""

    model: str
    instance: str
    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    """Load a copy of a model at ``instance``, then drop the one at ``source``: never the other way round."""

    model: str
    instance: str
    source: str
    reason: str


class NoPlace(Exception):
    """No instance can host a copy; the text names the constraint, or the size against the capacity."""
