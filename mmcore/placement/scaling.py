"""How many copies a model has: more when it is busy, fewer when it is not, never in a circle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Final

from mmcore.placement.actions import Drop, Load, NoPlace
from mmcore.placement.cluster import Cluster
from mmcore.placement.instances import Member
from mmcore.placement.models import Copy, CopyState, Model, point_of
from mmcore.placement.places import place

#: A copy is given up when the others would then be at most this busy: far below where one is added.
DOWN: Final = 0.6
#: Uses this many minutes apart are steady use: one now, one within these minutes ago.
STEADY_MINUTES: Final = (7, 40)
_STEADY_BITS: Final = (1 << STEADY_MINUTES[1] + 1) - (1 << STEADY_MINUTES[0])


@dataclass(frozen=True, slots=True)
class Policy:
    """What is configurable about copies."""

    #: Requests per minute of one copy above which there is to be another.
    requests_per_minute: float = 2000.0
    #: The same as a share of what the average instance serves: load cannot be spread more evenly than copies are busy.
    share: float = 0.15
    #: Where that share is less than this, it is no reason.
    least_requests_per_minute: float = 240.0
    #: Requests in flight at one copy, and their mean wait in ms, above which there is to be another.
    in_flight: float = 16.0
    queue_ms: float = 50.0
    #: How long the newest copy must have been there before one is given up.
    hold_ms: int = 600_000
    #: The second copy goes when the model has not been used for this long.
    idle_ms: int = 3_600_000
    #: A second copy for steady use displaces only what has not been used for this long.
    displaces_ms: int = 3_600_000
    #: The last copy goes when the model has not been used for this long; None: only when its space is needed.
    unload_idle_ms: int | None = None


DEFAULT_POLICY: Final = Policy()


def scale(cluster: Cluster, model: Model, now_ms: int, policy: Policy = DEFAULT_POLICY) -> list[Load | Drop]:
    """The loads and drops that bring a model to the copies it should have; loads are reserved in the cluster.

    To be asked by one decider, see :func:`decider`. Copies at draining or lost instances, or where the labels do not
    allow them any more, do not count. Copies below the least number asked for are added at once, those above the most
    go; otherwise nothing happens while a copy is on its way. More: as many as the use needs, at most twice as many at a
    time, and a second one when it is used steadily. Fewer: a quarter at a time, ``hold_ms`` after the last change, when
    those left would be at most 0.6 busy; from two to one when the model is idle.
    """
    coming = {instance_id: Copy(CopyState.LOADING, now_ms) for instance_id in cluster.reserved(model.id)}
    model = replace(model, copies={**coming, **model.copies})
    pool = cluster.pool(model.type)
    holders = _holders(cluster, model)
    live = [member for member in holders if member in pool.members]
    misplaced = [member for member in holders if member not in pool.members]
    count = len(live)
    most = min(len(pool), model.max_copies or len(pool))
    least = min(most, len(pool) if model.everywhere else model.min_copies)
    if count < max(least, 1 if misplaced else 0):
        return list(_loads(cluster, model, max(1, least - count), now_ms, "least number of copies"))
    if not count or any(model.copies[member.id].state is CopyState.LOADING for member in holders):
        return []
    if misplaced:
        return [Drop(model.id, member.id, "lacks a required label") for member in misplaced]
    if count > most:
        return list(_drops(cluster, model, live, count - most))
    heat = busy_copies(cluster, model, policy)
    if model.demand.queue_ms > policy.queue_ms:
        heat = max(heat, count + 0.5)
    if heat > count and count < most:
        return list(_loads(cluster, model, min(ceil(heat), 2 * count, most) - count, now_ms, "use"))
    if count == 1 < most and is_steady(model.demand.minutes):
        return list(_loads(cluster, model, 1, now_ms, "steady use", now_ms - policy.displaces_ms))
    return list(_drops(cluster, model, live, _surplus(model, count, least, heat, now_ms, policy)))


def busy_copies(cluster: Cluster, model: Model, policy: Policy = DEFAULT_POLICY) -> float:
    """How many copies a model's use keeps busy, by rate or by concurrency."""
    mean = cluster.pool(model.type).mean_rate
    rate = min(policy.requests_per_minute, max(policy.least_requests_per_minute, policy.share * mean))
    return max(model.demand.requests_per_minute / rate, model.demand.in_flight / policy.in_flight)


def is_steady(minutes: int) -> bool:
    """Whether a model is used now and was 7 to 40 minutes ago, whatever happened in between.

    ``minutes`` as in Demand. Use without a pause is steady too.
    """
    return bool(minutes & 0b11) and bool(minutes & _STEADY_BITS)


def decider(cluster: Cluster, model: Model) -> str | None:
    """The one instance that decides about a model's copies: of its live holders the first on the ring.

    Holders know the model's use best. None where there is no copy: then whoever asks for it decides where it goes.
    """
    point = point_of(model.id)
    holders = _holders(cluster, model)
    return min(holders, key=lambda member: member.points[0] ^ point).id if holders else None


def _holders(cluster: Cluster, model: Model) -> list[Member]:
    members = (cluster.get(instance_id) for instance_id in model.copies)
    return [member for member in members if member is not None and not member.instance.draining]


def _loads(
    cluster: Cluster, model: Model, count: int, now_ms: int, reason: str, evicts_before_ms: int | None = None
) -> list[Load]:
    loads: list[Load] = []
    share = model.demand.requests_per_minute / (len(model.copies) + count)
    for _ in range(count):
        try:
            instance_id = place(cluster, model, now_ms, evicts_before_ms=evicts_before_ms)
        except NoPlace:
            break
        cluster.reserve(instance_id, model.id, model.size_bytes, now_ms, requests_per_minute=share)
        model = replace(model, copies={**model.copies, instance_id: Copy(CopyState.LOADING, now_ms)})
        loads.append(Load(model.id, instance_id, reason))
    return loads


def _surplus(model: Model, count: int, least: int, heat: float, now_ms: int, policy: Policy) -> int:
    """How many copies may go now."""
    idle_ms = now_ms - model.last_used_ms
    if count == 1:
        return int(policy.unload_idle_ms is not None and idle_ms > policy.unload_idle_ms and least == 0)
    newest_ms = max(copy.since_ms for copy in model.copies.values())
    if count <= least or now_ms - newest_ms < policy.hold_ms:
        return 0
    if count == 2:
        calm = _expected_wait_ms(model, 1) <= policy.queue_ms / 2
        return int(idle_ms > policy.idle_ms and heat <= DOWN and calm)
    kept = max(2, least, ceil(heat / DOWN))
    going = min(count - kept, max(1, count // 4))
    while going > 0 and _expected_wait_ms(model, count - going) > policy.queue_ms / 2:
        going -= 1
    return max(0, going)


def _expected_wait_ms(model: Model, copies: int) -> float:
    """The mean wait with fewer copies: the time of service by Little's law, the wait as of one server for each copy."""
    demand = model.demand
    if demand.requests_per_minute <= 0:
        return 0.0
    service_ms = max(0.0, demand.in_flight * 60_000 / demand.requests_per_minute - demand.queue_ms)
    busy = demand.requests_per_minute / 60_000 * service_ms / copies
    return service_ms * busy / (1 - busy) if busy < 1 else inf


def _drops(cluster: Cluster, model: Model, live: list[Member], count: int) -> list[Drop]:
    """Copies to give up: in the zone with most of them first, then where memory and traffic are scarcest."""
    mean = cluster.pool(model.type).mean_rate or 1.0
    drops: list[Drop] = []
    left = list(live)
    for _ in range(count):
        zones: dict[str, int] = {}
        for member in left:
            zones[member.instance.zone] = zones.get(member.instance.zone, 0) + 1
        victim = max(
            left,
            key=lambda member: (
                zones[member.instance.zone],
                member.requests_per_minute / mean - member.free_bytes * member.inverse,
                member.id,
            ),
        )
        left.remove(victim)
        drops.append(Drop(model.id, victim.id, "surplus"))
    return drops
