"""The instances that may host one kind of model, on hash rings, with the sums that decisions need."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

from mmcore.placement.instances import POINTS, Member


class Ring:
    """Members in hash order. A model's candidates are those that follow its own point.

    Every decider finds the same ones in the same order without asking anybody, other models find others, and one
    instance more or less changes few of them: a model that comes back finds its files where it was.
    """

    __slots__ = ("_owners", "_points")

    def __init__(self) -> None:
        self._points: list[int] = []
        self._owners: list[Member] = []

    def __len__(self) -> int:
        return len(self._points) // POINTS

    def add(self, member: Member) -> None:
        """Put a member in; O(log n) and a move of memory."""
        for point in member.points:
            at = bisect_left(self._points, point)
            self._points.insert(at, point)
            self._owners.insert(at, member)

    def remove(self, member: Member) -> None:
        """Take a member out that is in."""
        for point in member.points:
            at = bisect_left(self._points, point)
            while self._owners[at] is not member:
                at += 1
            del self._points[at], self._owners[at]

    def after(self, point: int, count: int) -> dict[Member, None]:
        """About ``count`` members that follow ``point``, in this order; all where there are no more."""
        owners = self._owners
        at = bisect_left(self._points, point)
        if len(owners) <= count * POINTS:
            found = dict.fromkeys(owners[at:])
            found.update(dict.fromkeys(owners[:at]))
            return found
        found = dict.fromkeys(owners[at : at + count])
        if at + count > len(owners):
            found.update(dict.fromkeys(owners[: at + count - len(owners)]))
        return found


class Pool:
    """The members that fulfil one constraint and take new copies: draining ones are in none.

    Attributes:
        rings: (preferred, zone) to ring; the zone None stands for all.
        free_bytes: what is free in all, negative members counting as full.
        capacity_bytes, requests_per_minute, queue: sums over the members.
        oldest_used_ms, holding: the sum of the times of what each would evict first, over so many members.
        by_capacity: (capacity, id, member) ascending.
    """

    __slots__ = (
        *("by_capacity", "capacity_bytes", "free_bytes", "holding", "members", "oldest_used_ms", "queue"),
        *("requests_per_minute", "rings", "zones"),
    )

    def __init__(self) -> None:
        self.members: Final[dict[Member, bool]] = {}
        self.rings: Final[dict[tuple[bool, str | None], Ring]] = {}
        self.zones: Final[dict[str, int]] = {}
        self.by_capacity: Final[list[tuple[int, str, Member]]] = []
        self.free_bytes = 0
        self.capacity_bytes = 0
        self.requests_per_minute = 0.0
        self.queue = 0.0
        self.oldest_used_ms = 0
        self.holding = 0

    def __len__(self) -> int:
        return len(self.members)

    @property
    def mean_rate(self) -> float:
        """Requests per minute of its average member."""
        return max(0.0, self.requests_per_minute) / max(1, len(self.members))

    def add(self, member: Member, preferred: bool) -> None:
        """Take a member in."""
        zone = member.instance.zone
        self.members[member] = preferred
        self.zones[zone] = self.zones.get(zone, 0) + 1
        for key in ((preferred, None), (preferred, zone)):
            self.rings.setdefault(key, Ring()).add(member)
        insort(self.by_capacity, (member.capacity_bytes, member.id, member))
        self.note(member, 1)
        member.pools.append(self)

    def remove(self, member: Member) -> None:
        """Let a member go, before anything of it changes."""
        zone = member.instance.zone
        preferred = self.members.pop(member)
        self.zones[zone] -= 1
        if not self.zones[zone]:
            del self.zones[zone]
        for key in ((preferred, None), (preferred, zone)):
            self.rings[key].remove(member)
            if not self.rings[key]:
                del self.rings[key]
        del self.by_capacity[bisect_left(self.by_capacity, (member.capacity_bytes, member.id))]
        self.note(member, -1)
        member.pools.remove(self)

    def note(self, member: Member, sign: int) -> None:
        """Add a member's figures to the sums; with the sign -1, before they change, take them out."""
        self.capacity_bytes += sign * member.capacity_bytes
        self.free_bytes += sign * max(0, member.free_bytes)
        self.requests_per_minute += sign * member.requests_per_minute
        self.queue += sign * member.queue
        if member.oldest_used_ms is not None:
            self.oldest_used_ms += sign * member.oldest_used_ms
            self.holding += sign
