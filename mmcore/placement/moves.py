"""Evening out: off a hot instance, into an empty one, elsewhere instead of out of the mesh."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from math import inf
from typing import Final

from mmcore.placement.actions import Load, Move, NoPlace
from mmcore.placement.cluster import Cluster
from mmcore.placement.instances import Member
from mmcore.placement.models import Model
from mmcore.placement.places import place

#: An instance is hot above this many times the mean of the traffic, or this share of memory above the mean.
HOT_TRAFFIC: Final = 1.1
HOT_MEMORY: Final = 0.08
#: Copies that leave a hot instance at a time, so that the next pass sees what became of it.
MOVES: Final = 4
#: A copy that was loaded less than this ago stays.
RESIDENT_MS: Final = 60_000
#: A copy that carries less than this share of an instance's mean traffic is not worth a move.
LEAST_SHARE: Final = 0.005
#: Share of an instance's memory that filling leaves free for what is asked for.
HEADROOM: Final = 1 / 16
#: Below this share of free memory it is not worth looking for room for what was evicted.
LEAST_FREE: Final = 0.02
#: Instances looked at for a model that the emptiest may not host.
LOOKED_AT: Final = 8
#: Loads per loader thread that filling lets wait.
FILL_QUEUE: Final = 2.0


def relieve(cluster: Cluster, instance_id: str, models: Iterable[Model], now_ms: int) -> list[Move]:
    """What a hot instance should give to others, of the models it holds; the loads are reserved.

    Traffic above 1.1 times the mean: its busiest copies that carry no more than the excess, to instances that stay
    below the mean with them. Memory 0.08 of its capacity above the mean: its largest copies that take no more than
    the excess, to emptier instances where nothing is evicted for them.
    """
    member = cluster.get(instance_id)
    if member is None or member.instance.draining:
        return []
    settled = [model for model in models if _is_settled(model, instance_id, now_ms)]
    return _less_traffic(cluster, member, settled, now_ms) or _less_memory(cluster, member, settled, now_ms)


def evicted(cluster: Cluster, model: Model, instance_id: str, loaded_ms: int, now_ms: int) -> Load | None:
    """Where a model goes on whose last copy an instance had to evict; None where that is not worth it.

    Worth it where there is room and a loader thread idle: places are chosen so that what is evicted is the stalest
    anywhere, and one eviction must never lead to another (modelmesh-serving#455). ``model`` comes without the evicted
    copy, which was there since ``loaded_ms``; one that was hardly there is not passed on and on. The load is reserved.
    """
    pool = cluster.pool(model.type)
    short = now_ms - loaded_ms < RESIDENT_MS
    if model.copies or short or pool.free_bytes < LEAST_FREE * pool.capacity_bytes:
        return None
    try:
        target = place(cluster, model, now_ms, exclude=(instance_id,), evicts_before_ms=0, below_queue=1.0)
    except NoPlace:
        return None
    cluster.reserve(target, model.id, model.size_bytes, now_ms)
    return Load(model.id, target, "evicted elsewhere")


def fill(cluster: Cluster, models: Iterable[Model], now_ms: int, *, most: int) -> list[Load]:
    """Loads into instances that have room, new ones above all, before anybody asks; at most ``most``, reserved.

    ``models`` have no copies and come in the order of their last use, latest first. Each goes to the emptiest instance
    that may host it. A sixteenth of each instance is left free, and no more than two loads wait for a loader thread.
    For the leader: one decider sees all the room and fills it once.
    """
    roomy = [
        (-(member.free_bytes * member.inverse), member.id)
        for member in cluster
        if not member.instance.draining and has_room(member)
    ]
    heapify(roomy)
    loads: list[Load] = []
    for model in models:
        if not roomy or len(loads) == most:
            break
        members = cluster.pool(model.type).members
        passed: list[tuple[float, str]] = []
        while roomy:
            _, target_id = entry = heappop(roomy)
            target = cluster.get(target_id)
            if target is None or not has_room(target):
                continue
            passed.append(entry)
            if target in members and target_id not in model.failures and has_room(target, model.size_bytes):
                cluster.reserve(target_id, model.id, model.size_bytes, now_ms)
                loads.append(Load(model.id, target_id, "room"))
                passed[-1] = (-(target.free_bytes * target.inverse), target_id)
                break
            if len(passed) == LOOKED_AT:
                break
        for entry in passed:
            heappush(roomy, entry)
    return loads


def has_room(member: Member, size_bytes: int = 0) -> bool:
    """Whether filling takes an instance for one that has room for so much, and for a load more."""
    return member.free_bytes - size_bytes >= HEADROOM * member.capacity_bytes and member.queue < FILL_QUEUE


def _less_traffic(cluster: Cluster, member: Member, models: list[Model], now_ms: int) -> list[Move]:
    moves: list[Move] = []
    gone = 0.0
    for model in sorted(models, key=_rate_of_copy, reverse=True):
        mean = cluster.pool(model.type).mean_rate
        rate = _rate_of_copy(model)
        left = member.requests_per_minute - gone
        if left <= HOT_TRAFFIC * mean or rate < LEAST_SHARE * mean or len(moves) == MOVES:
            break
        if rate <= left - mean:
            move = _move(cluster, model, member, now_ms, "traffic", below_rate=mean)
            if move is not None:
                moves.append(move)
                gone += rate
    return moves


def _less_memory(cluster: Cluster, member: Member, models: list[Model], now_ms: int) -> list[Move]:
    moves: list[Move] = []
    gone = 0
    for model in sorted(models, key=lambda model: model.size_bytes, reverse=True):
        pool = cluster.pool(model.type)
        spare = pool.free_bytes / max(1, pool.capacity_bytes) * member.capacity_bytes - member.free_bytes
        if spare - gone <= HOT_MEMORY * member.capacity_bytes or len(moves) == MOVES:
            break
        if model.size_bytes <= spare - gone:
            move = _move(cluster, model, member, now_ms, "memory")
            if move is not None:
                moves.append(move)
                gone += model.size_bytes
    return moves


def _move(
    cluster: Cluster, model: Model, source: Member, now_ms: int, reason: str, below_rate: float = inf
) -> Move | None:
    """Nothing is evicted for a copy that is moved for memory's sake, and nothing younger than it for traffic's."""
    before_ms = 0 if below_rate == inf else model.last_used_ms - RESIDENT_MS
    rate = _rate_of_copy(model)
    try:
        target = place(
            cluster,
            model,
            now_ms,
            evicts_before_ms=before_ms,
            requests_per_minute=rate,
            below_rate=below_rate,
            below_queue=1.0,
        )
    except NoPlace:
        return None
    cluster.reserve(target, model.id, model.size_bytes, now_ms, requests_per_minute=rate)
    return Move(model.id, target, source.id, reason)


def _rate_of_copy(model: Model) -> float:
    return model.demand.requests_per_minute / max(1, len(model.copies))


def _is_settled(model: Model, instance_id: str, now_ms: int) -> bool:
    copy = model.copies.get(instance_id)
    if copy is None or model.everywhere or model.loading:
        return False
    return now_ms - copy.since_ms >= RESIDENT_MS
