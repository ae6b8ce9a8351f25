"""An instance as placement sees it: what its record says, and what has been promised to it since."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mmcore.placement.pools import Pool

#: Points of each instance on a ring: the arcs of 16 differ by about a quarter, which the costs make good.
POINTS: Final = 16
_POINTS_FORMAT: Final = struct.Struct(f">{POINTS}Q")


@dataclass(frozen=True, slots=True)
class Instance:
    """What an instance's record says; sizes in bytes, times in ms since 1970 by its own clock.

    ``used_bytes`` counts loaded and loading copies, ``fixed_bytes`` the part of it that cannot be evicted (loading,
    pinned, in use), ``unloading_bytes`` what is given up and not free yet. ``oldest_used_ms`` is the last use of what
    it would evict first, None where it holds nothing. ``loading`` counts loads that run or wait. ``published_ms`` is
    when the record was made; 0 where that is not known.
    """

    id: str
    capacity_bytes: int
    used_bytes: int = 0
    fixed_bytes: int = 0
    unloading_bytes: int = 0
    oldest_used_ms: int | None = None
    loading: int = 0
    loader_threads: int = 1
    zone: str = ""
    labels: frozenset[str] = frozenset()
    version: str = ""
    started_ms: int = 0
    draining: bool = False
    requests_per_minute: float = 0.0
    in_flight: int = 0
    published_ms: int = 0


@dataclass(slots=True)
class Reservation:
    """Room promised to a load: until its instance's record counts it, or until it expires.

    ``since_ms`` is the start of the load by the instance's clock once the model's record shows it, before that None.
    """

    size_bytes: int
    requests_per_minute: float
    until_ms: int
    since_ms: int | None = None


class Member:
    """An instance of the cluster with its reservations, and the sums that decisions read.

    Attributes:
        instance: its last record.
        free_bytes: neither used, nor being unloaded, nor reserved; may be negative.
        firm_bytes: what no eviction can free: loads, pins, unloads and reservations.
        loads: loads that run, wait or are reserved.
        requests_per_minute: what it serves, with the reserved copies' share.
        queue: loads for each of its loader threads.
        inverse: 1 / capacity.
    """

    __slots__ = (
        *("_reserved_bytes", "_reserved_rate", "capacity_bytes", "firm_bytes", "free_bytes", "id", "instance"),
        *("inverse", "loads", "oldest_used_ms", "points", "pools", "queue", "requests_per_minute", "reservations"),
        "version",
    )

    def __init__(self, instance: Instance) -> None:
        self.id: Final = instance.id
        self.points: Final[tuple[int, ...]] = _POINTS_FORMAT.unpack(
            hashlib.shake_128(instance.id.encode()).digest(_POINTS_FORMAT.size)
        )
        self.pools: list[Pool] = []
        self.reservations: Final[dict[str, Reservation]] = {}
        self._reserved_bytes = 0
        self._reserved_rate = 0.0
        self.take(instance)

    def take(self, instance: Instance) -> None:
        """A new record: the reservations that it counts end."""
        self.instance = instance
        counted = [
            model
            for model, reservation in self.reservations.items()
            if reservation.since_ms is not None and not 0 < instance.published_ms < reservation.since_ms
        ]
        for model in counted:
            self._end(model)
        self._count()

    def reserve(self, model_id: str, reservation: Reservation) -> None:
        """Make a promise, in place of the one before for that model."""
        self._end(model_id)
        self.reservations[model_id] = reservation
        self._reserved_bytes += reservation.size_bytes
        self._reserved_rate += reservation.requests_per_minute
        self._count()

    def release(self, model_id: str) -> None:
        """End the promise to a model, if there is one."""
        self._end(model_id)
        self._count()

    def expire(self, now_ms: int) -> None:
        """End the promises that nothing came of."""
        for model in [model for model, made in self.reservations.items() if now_ms >= made.until_ms]:
            self._end(model)
        self._count()

    def _end(self, model_id: str) -> None:
        ended = self.reservations.pop(model_id, None)
        if ended is not None:
            self._reserved_bytes -= ended.size_bytes
            self._reserved_rate -= ended.requests_per_minute
            if not self.reservations:
                self._reserved_rate = 0.0

    def _count(self) -> None:
        """Compute the sums again, in all pools too."""
        for pool in self.pools:
            pool.note(self, -1)
        instance = self.instance
        capacity = instance.capacity_bytes
        self.free_bytes = capacity - instance.used_bytes - instance.unloading_bytes - self._reserved_bytes
        self.requests_per_minute = instance.requests_per_minute + self._reserved_rate
        self.firm_bytes = instance.fixed_bytes + instance.unloading_bytes + self._reserved_bytes
        self.loads = instance.loading + len(self.reservations)
        self.queue = self.loads / max(1, instance.loader_threads)
        self.capacity_bytes = capacity
        self.inverse = 1.0 / capacity if capacity > 0 else 1.0
        self.oldest_used_ms = instance.oldest_used_ms
        self.version = instance.version
        for pool in self.pools:
            pool.note(self, 1)

    def __repr__(self) -> str:
        return f"<Member {self.id} {self.free_bytes} of {self.capacity_bytes} bytes free, {self.loads} loads>"
