"""The view of the cluster that decisions read: kept up to date record by record, never rebuilt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from mmcore.placement.constraints import TypeConstraints
from mmcore.placement.instances import Instance, Member, Reservation
from mmcore.placement.pools import Pool

#: How long a promise stands when neither the model's record nor the instance's shows anything of it.
RESERVATION_MS: Final = 30_000


class Cluster:
    """Instances by id with their reservations, grouped into pools by what they may host.

    A change of figures costs O(log n), a join or leave O(log n) and a move of memory for each type's constraint. Not
    synchronised: one loop's.
    """

    def __init__(self, instances: Iterable[Instance] = (), constraints: TypeConstraints | None = None) -> None:
        self._members: dict[str, Member] = {}
        self._pools: dict[str, Pool] = {}
        #: Model to the instances that may hold a reservation for it.
        self._reserved: dict[str, set[str]] = {}
        #: Version to the ids of its instances with the times they started.
        self._versions: dict[str, dict[str, int]] = {}
        self._newest: str | None = None
        self._constraints = constraints or TypeConstraints()
        for instance in instances:
            self.put(instance)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._members

    def get(self, instance_id: str) -> Member | None:
        """The member, or None."""
        return self._members.get(instance_id)

    @property
    def constraints(self) -> TypeConstraints:
        """By type of model. Setting other ones takes effect with the next decision."""
        return self._constraints

    @constraints.setter
    def constraints(self, constraints: TypeConstraints) -> None:
        if constraints == self._constraints:
            return
        self._constraints = constraints
        self._pools.clear()
        for member in self:
            member.pools.clear()

    @property
    def newest_version(self) -> str:
        """The version that appeared last: the one a rollout, or a roll back, leads to."""
        if self._newest is None:
            first = {version: min(started.values()) for version, started in self._versions.items()}
            self._newest = max(first, key=lambda version: (first[version], version), default="")
        return self._newest

    def put(self, instance: Instance) -> None:
        """An instance joined, or its record changed; reservations that the record counts end."""
        member = self._members.get(instance.id)
        before = member.instance if member is not None else None
        if member is None:
            member = self._members[instance.id] = Member(instance)
        if before is None or _traits(before) != _traits(instance):
            self._leave(member)
            member.take(instance)
            self._join(member)
        else:
            member.take(instance)

    def remove(self, instance_id: str) -> None:
        """An instance is gone; nothing happens where it was not there."""
        member = self._members.pop(instance_id, None)
        if member is not None:
            self._leave(member)

    def reserve(
        self,
        instance_id: str,
        model_id: str,
        size_bytes: int,
        now_ms: int,
        *,
        requests_per_minute: float = 0.0,
        lasting_ms: int = RESERVATION_MS,
    ) -> None:
        """Promise room and a load slot to a model, and expect its traffic there; again prolongs it."""
        member = self._members.get(instance_id)
        if member is not None:
            member.reserve(model_id, Reservation(size_bytes, requests_per_minute, now_ms + lasting_ms))
            self._reserved.setdefault(model_id, set()).add(instance_id)

    def reserved(self, model_id: str) -> list[str]:
        """The instances with room promised to a model that their records do not show yet."""
        return [
            instance_id
            for instance_id in self._reserved.get(model_id, ())
            if (member := self._members.get(instance_id)) is not None and model_id in member.reservations
        ]

    def started(self, instance_id: str, model_id: str, size_bytes: int, since_ms: int, now_ms: int) -> None:
        """A model's record shows a load, whoever decided it: it takes room until the instance's own record counts it.

        ``since_ms`` is the copy's, by the instance's clock. Records of models arrive at once and those of instances
        seconds later: this is what keeps deciders from piling onto one in between.
        """
        member = self._members.get(instance_id)
        if member is None or member.instance.published_ms >= since_ms > 0:
            self.release(instance_id, model_id)
            return
        known = member.reservations.get(model_id)
        rate = known.requests_per_minute if known is not None else 0.0
        member.reserve(model_id, Reservation(size_bytes, rate, now_ms + RESERVATION_MS, since_ms))
        self._reserved.setdefault(model_id, set()).add(instance_id)

    def shown(self, model_id: str, copies: Mapping[str, int]) -> None:
        """A model's record shows these copies, by instance and since when (ms): what was promised to them has begun.

        Promises that had begun elsewhere have ended.
        """
        for instance_id in self.reserved(model_id):
            promise = self._members[instance_id].reservations[model_id]
            if instance_id in copies:
                promise.since_ms = copies[instance_id]
            elif promise.since_ms is not None:
                self.release(instance_id, model_id)

    def release(self, instance_id: str, model_id: str) -> None:
        """A load was refused, failed or given up: its room is free again."""
        member = self._members.get(instance_id)
        if member is not None:
            member.release(model_id)

    def expire(self, now_ms: int) -> None:
        """End the reservations whose time is over; to be called every few seconds."""
        self._reserved.clear()
        for member in self:
            if member.reservations:
                member.expire(now_ms)
                for model_id in member.reservations:
                    self._reserved.setdefault(model_id, set()).add(member.id)

    def pool(self, model_type: str) -> Pool:
        """The instances that may host models of a type; made when a type is first asked for."""
        key = self._constraints.key(model_type)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = Pool()
            for member in self:
                self._enter(key, pool, member)
        return pool

    def _join(self, member: Member) -> None:
        instance = member.instance
        self._newest = None
        if not instance.draining:
            self._versions.setdefault(instance.version, {})[instance.id] = instance.started_ms
        for key, pool in self._pools.items():
            self._enter(key, pool, member)

    def _leave(self, member: Member) -> None:
        self._newest = None
        started = self._versions.get(member.version)
        if started is not None:
            started.pop(member.id, None)
            if not started:
                del self._versions[member.version]
        for pool in list(member.pools):
            pool.remove(member)

    def _enter(self, key: str, pool: Pool, member: Member) -> None:
        instance = member.instance
        if not instance.draining and self._constraints.allows(key, instance.labels):
            pool.add(member, self._constraints.prefers(key, instance.labels))


def _traits(instance: Instance) -> tuple[object, ...]:
    """What decides where a member stands in pools."""
    return (
        *(instance.zone, instance.labels, instance.version, instance.started_ms),
        *(instance.draining, instance.capacity_bytes),
    )
