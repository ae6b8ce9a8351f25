"""Where to load a copy."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from itertools import chain
from math import inf
from typing import Final

from mmcore.placement.actions import NoPlace
from mmcore.placement.cluster import Cluster
from mmcore.placement.instances import Member
from mmcore.placement.models import Model, point_of
from mmcore.placement.pools import Pool, Ring

#: Candidates looked at, and when none of them will do.
CANDIDATES: Final = 12
MORE_CANDIDATES: Final = 48
#: The cheapest candidates whose costs differ by less are alike: the first on the ring is taken, by every decider.
NEAR: Final = 0.05
#: A candidate may be this much dearer than the pool's mean: where all are alike, each is as good as the mean.
SLACK: Final = 0.02
#: A load for each loader thread counts as this share of memory in use while a thread is free, and
LOAD_COST: Final = 0.2
#: as a whole memory more for each that a further load has to wait for: rather evict elsewhere than wait for long.
WAIT_COST: Final = 1.0
#: Share of a pool that must be free for the average member to have room: what is less is for filling to find.
ROOMY: Final = 0.05
#: Serving the mean counts as this share of memory in use; more or less in proportion.
TRAFFIC_COST: Final = 0.25
#: Not the newest version: as this share of memory in use, so that a full or busy newer instance yields.
VERSION_COST: Final = 0.35
#: Something must be evicted: as twice a whole memory in use, and once more for what was used this moment.
EVICTION_COST: Final = 2.0
#: Not an instance that its type prefers: outweighs all that memory in use says, but yields to room.
PREFERENCE_COST: Final = 1.0
#: In a zone with more copies of the model than another has, for each more.
ZONE_COST: Final = 3.0
#: What would be evicted was used a moment ago: only where every other place is as bad.
CHURN_COST: Final = 4.0
CHURN_MS: Final = 10_000
#: Failures that have not expired after which no further instance is tried.
MOST_FAILURES: Final = 3

#: Keys of a pool's rings.
_Keys = list[tuple[bool, str | None]]


def place(
    cluster: Cluster,
    model: Model,
    now_ms: int,
    *,
    exclude: Collection[str] = (),
    evicts_before_ms: int | None = None,
    requests_per_minute: float | None = None,
    below_rate: float = inf,
    below_queue: float = inf,
) -> str:
    """The instance to load a further copy of a model at; NoPlace where there is none.

    Never one that drains, lacks a required label, is too small, holds the model, failed to load it lately or is in
    ``exclude``, nor one whose loads, pins, unloads and promises leave no room for it. Among the others the cheapest:

    - with room: the share of its memory that would be in use, so that memory fills evenly;
    - without: more than any with room, and more still the younger its oldest copy is among the candidates', so that the
      mesh evicts what has been idle longest anywhere; what was used a moment ago goes last of all;
    - the loads before it per loader thread, the traffic it serves, an older version, a label not preferred and a zone
      that holds more copies are added.

    The candidates follow the model's point on a hash ring, and the first that is no dearer than the pool's mean is
    taken, else the cheapest of them (consistent hashing with bounded loads). So deciders with views that are seconds
    apart choose the same instance for one model and others for other models, an instance that comes empty is not
    flooded, and a model that returns finds its files on the disk where it was.

    A load nobody waits for gives ``evicts_before_ms``: only copies last used before that may have to go for it, and
    where no candidate will do, nobody searches all others.
    Where a reservation for the model stands already, that is the place: asked twice, it does not load twice.
    ``requests_per_minute`` is what the copy will serve (an equal part of the model's unless given), and
    ``below_rate`` what its instance may serve with it. Where ``below_queue`` loads run or wait for each loader thread,
    or more, nothing is added.
    """
    if len(model.failures) >= MOST_FAILURES:
        raise NoPlace(f"loading {model.id!r} failed at {len(model.failures)} instances")
    for instance_id in cluster.reserved(model.id):
        if instance_id not in model.copies and instance_id not in model.failures and instance_id not in exclude:
            return instance_id
    search = _Search(cluster, model, now_ms, exclude, evicts_before_ms, requests_per_minute, below_rate, below_queue)
    best: Member | None = None
    lowest = 0.0
    for penalty, keys in _tiers(cluster, search.pool, model):
        if best is not None and (search.roomy or penalty >= lowest):
            break
        found, cost = search.best(keys)
        if found is not None and (best is None or cost + penalty < lowest):
            best, lowest = found, cost + penalty
    if best is None and evicts_before_ms is not None:
        raise NoPlace(
            f"no candidate has {model.size_bytes} bytes for model {model.id!r} that nothing used lately takes"
        )
    if best is None:
        best = search.anywhere()
    if best is None:
        raise NoPlace(_why_none(cluster, model, exclude))
    return best.id


class _Search:
    """One decision: what does not change between its candidates.

    Attributes:
        pool: where it looks.
        roomy: whether the last candidates had one with room.
    """

    __slots__ = (
        *(
            "_below_queue",
            "_below_rate",
            "_capable",
            "_evicts_before_ms",
            "_mean_age",
            "_mean_cost",
            "_newest",
            "_now_ms",
            "_point",
        ),
        *("_rate_cost", "_refused", "_share", "_size", "pool", "roomy"),
    )

    def __init__(
        self,
        cluster: Cluster,
        model: Model,
        now_ms: int,
        exclude: Collection[str],
        evicts_before_ms: int | None,
        requests_per_minute: float | None,
        below_rate: float,
        below_queue: float,
    ) -> None:
        self.pool = pool = cluster.pool(model.type)
        self.roomy = False
        self._point = point_of(model.id)
        self._size = model.size_bytes
        self._now_ms = now_ms
        self._evicts_before_ms = evicts_before_ms
        self._refused = {*model.copies, *model.failures, *exclude}
        self._newest = cluster.newest_version
        if requests_per_minute is None:
            requests_per_minute = model.demand.requests_per_minute / (len(model.copies) + 1)
        self._share = requests_per_minute
        self._below_rate = below_rate - requests_per_minute
        self._below_queue = below_queue
        rate = pool.mean_rate + requests_per_minute
        self._rate_cost = TRAFFIC_COST / rate if rate > 0 else 0.0
        count = max(1, len(pool))
        self._mean_age = max(1, now_ms - pool.oldest_used_ms // pool.holding) if pool.holding else 1
        self._mean_cost = pool.queue / count * LOAD_COST + rate * self._rate_cost + SLACK
        if pool.free_bytes >= max(self._size * count, ROOMY * pool.capacity_bytes):
            self._mean_cost += 1.0 - pool.free_bytes / max(1, pool.capacity_bytes)
        else:  # the average member must evict, what is of average age
            self._mean_cost += EVICTION_COST + 0.5
        #: The members large enough, where they are so few that probes of a ring could miss them.
        self._capable: list[Member] | None = None
        small = bisect_left(pool.by_capacity, (self._size,))
        if small and len(pool) - small <= MORE_CANDIDATES:
            capable = [member for _, _, member in pool.by_capacity[small:]]
            self._capable = sorted(capable, key=lambda member: member.points[0] ^ self._point)

    def best(self, keys: _Keys) -> tuple[Member | None, float]:
        """The best of the candidates on some rings, with its cost; (None, 0) where none will do."""
        pool = self.pool
        if self._capable is not None:
            members = pool.members
            return self._cheapest(
                member
                for member in self._capable
                if (members[member], None) in keys or (members[member], member.instance.zone) in keys
            )
        rings = [pool.rings[key] for key in keys]
        found, cost = self._cheapest(self._probed(rings, CANDIDATES))
        if found is None:
            return self._cheapest(self._probed(rings, MORE_CANDIDATES))
        return found, cost

    def anywhere(self) -> Member | None:
        """The best of all that are large enough, which takes longer: when no candidate will do."""
        return self._cheapest(self.pool.members)[0]

    def _probed(self, rings: list[Ring], count: int) -> Iterable[Member]:
        if len(rings) == 1:
            return rings[0].after(self._point, count)
        each = max(1, count // len(rings))
        return chain.from_iterable(ring.after(self._point, each) for ring in rings)

    def _cheapest(self, candidates: Iterable[Member]) -> tuple[Member | None, float]:
        """The first candidate no dearer than the mean, else the first of the cheapest."""
        size = self._size
        refused = self._refused
        newest = self._newest
        before = self._evicts_before_ms
        share = self._share
        below = self._below_rate
        below_queue = self._below_queue
        rate_cost = self._rate_cost
        mean_cost = self._mean_cost
        costs: list[tuple[float, Member]] = []
        self.roomy = False
        for member in candidates:
            if member.id in refused or member.firm_bytes + size > member.capacity_bytes:
                continue
            rate = member.requests_per_minute
            queue = member.queue
            if rate > below or queue >= below_queue:
                continue
            cost = queue * LOAD_COST + (rate + share) * rate_cost
            if queue >= 1.0:
                cost += queue * WAIT_COST
            if member.version != newest:
                cost += VERSION_COST
            free = member.free_bytes
            if free >= size:
                cost += 1.0 - free * member.inverse
                self.roomy = True
            else:
                oldest_ms = member.oldest_used_ms
                if before is not None and (oldest_ms is None or oldest_ms >= before):
                    continue
                cost += self._eviction_cost(oldest_ms)
            if cost <= mean_cost:
                return member, cost
            costs.append((cost, member))
        if not costs:
            return None, 0.0
        limit = min(costs, key=_cost)[0] + NEAR
        cost, member = next(choice for choice in costs if choice[0] <= limit)
        return member, cost

    def _eviction_cost(self, oldest_ms: int | None) -> float:
        age = 0 if oldest_ms is None else max(0, self._now_ms - oldest_ms)
        cost = EVICTION_COST + self._mean_age / (age + self._mean_age)
        return cost if age >= CHURN_MS else cost + CHURN_COST


def _cost(choice: tuple[float, Member]) -> float:
    return choice[0]


def _tiers(cluster: Cluster, pool: Pool, model: Model) -> list[tuple[float, _Keys]]:
    """Keys of the pool's rings by what being on them adds to a member's cost, least first."""
    held: dict[str, int] = {}
    for instance_id in model.copies:
        member = cluster.get(instance_id)
        if member is not None and not member.instance.draining:
            zone = member.instance.zone
            held[zone] = held.get(zone, 0) + 1
    counts = {held.get(zone, 0) for zone in pool.zones}
    if len(counts) <= 1:
        return [
            (0.0 if preferred else PREFERENCE_COST, [(preferred, None)])
            for preferred in (True, False)
            if (preferred, None) in pool.rings
        ]
    fewest = min(counts)
    tiers: dict[float, _Keys] = {}
    for key in pool.rings:
        preferred, in_zone = key
        if in_zone is not None:
            penalty = (0.0 if preferred else PREFERENCE_COST) + ZONE_COST * (held.get(in_zone, 0) - fewest)
            tiers.setdefault(penalty, []).append(key)
    return sorted(tiers.items())


def _why_none(cluster: Cluster, model: Model, exclude: Collection[str]) -> str:
    """What keeps a model from every instance, for its caller to read."""
    name = f"model {model.id!r}"
    running = [member for member in cluster if not member.instance.draining]
    if not running:
        return f"no place for {name}: " + ("every instance is draining" if len(cluster) else "no instance is running")
    key = cluster.constraints.key(model.type)
    if not cluster.pool(model.type):
        required = ", ".join(sorted(cluster.constraints.get(key).required))
        return f"no running instance has the labels that models of type {model.type!r} require: {required}"
    members = cluster.pool(model.type).members
    largest = max(member.capacity_bytes for member in members)
    if largest < model.size_bytes:
        return f"{name} of {model.size_bytes} bytes is larger than the capacity of any instance for it: {largest} bytes"
    left = [member for member in members if member.id not in model.copies and member.id not in model.failures]
    if not left:
        return f"{name} is held by, or failed to load at, all {len(members)} instances that may host it"
    left = [member for member in left if member.id not in exclude]
    if not left:
        return f"all {len(members)} instances that may host {name} have been tried"
    most = max(member.capacity_bytes - member.firm_bytes for member in left)
    return (
        f"{name} takes {model.size_bytes} bytes, and loads, unloads and models in use leave {max(0, most)} at most "
        f"at the {len(left)} instances that may host it"
    )
