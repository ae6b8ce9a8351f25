"""A model as placement sees it: its copies, its size, its use and what its owner asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class CopyState(StrEnum):
    """What a model's record says of one of its copies."""

    LOADING = "LOADING"
    LOADED = "LOADED"


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy of a model: its state, and since when in ms by its instance's clock."""

    state: CopyState = CopyState.LOADED
    since_ms: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """The use of a model, all its copies together.

    ``in_flight`` is the mean number of requests being answered and ``queue_ms`` the mean wait of those before they are.
    Bit n of ``minutes`` tells whether it was used n minutes ago, the running minute being bit 0.
    """

    requests_per_minute: float = 0.0
    in_flight: float = 0.0
    queue_ms: float = 0.0
    minutes: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """What decisions about a model need.

    ``size_bytes`` is the measured size of a copy, or the prediction. ``copies`` and ``failures`` go by instance; the
    latter holds the times of the failures that have not expired. It never goes below ``min_copies`` copies;
    ``max_copies`` 0 sets no limit of its own; ``everywhere`` asks for a copy on each instance that may hold one.
    """

    id: str
    type: str = ""
    size_bytes: int = 0
    copies: Mapping[str, Copy] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    last_used_ms: int = 0
    demand: Demand = Demand()
    min_copies: int = 0
    max_copies: int = 0
    everywhere: bool = False

    @property
    def loading(self) -> bool:
        """Whether any of its copies is on its way."""
        return any(copy.state is CopyState.LOADING for copy in self.copies.values())


def point_of(model_id: str) -> int:
    """Where a model stands on every ring: the same in each process, unlike ``hash``."""
    return int.from_bytes(hashlib.blake2b(model_id.encode(), digest_size=8).digest(), "big")
