"""What becomes of the copies of an instance that leaves, or that is gone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from math import ceil
from typing import Final

from mmcore.placement.actions import Drop, Move, NoPlace
from mmcore.placement.cluster import Cluster
from mmcore.placement.models import Model
from mmcore.placement.places import place
from mmcore.placement.scaling import DEFAULT_POLICY, Policy, busy_copies

#: How long an instance must have been missing before its copies leave the models' records.
MISSING_MS: Final = 60_000


def drain(
    cluster: Cluster,
    instance_id: str,
    models: Iterable[Model],
    now_ms: int,
    policy: Policy = DEFAULT_POLICY,
    *,
    gone: Collection[str] = (),
) -> list[Move]:
    """What an instance that leaves hands over, the busiest first; the loads are reserved.

    ``instance_id`` must drain in the cluster already, so that nothing new is placed there. Each move is a load
    elsewhere and, once that has been done, a drop here: until then the copy here goes on answering. As many copies are
    handed over as are needed (its use, its least number, one), not only the first. What nobody used for ``idle_ms``
    and what would displace something used more recently is not. Instances that are ``gone``, though the cluster has
    them still, hold nothing and take nothing.
    """
    ranked = sorted(models, key=lambda model: (model.demand.requests_per_minute, model.last_used_ms), reverse=True)
    moves: list[Move] = []
    for model in ranked:
        if not model.min_copies and not model.everywhere and now_ms - model.last_used_ms > policy.idle_ms:
            continue
        others = sum(
            1
            for holder in model.copies
            if holder != instance_id
            and holder not in gone
            and (member := cluster.get(holder)) is not None
            and not member.instance.draining
        )
        if others >= max(1, model.min_copies, min(len(model.copies), ceil(busy_copies(cluster, model, policy)))):
            continue
        rate = model.demand.requests_per_minute / max(1, len(model.copies))
        before_ms = None if model.min_copies else model.last_used_ms
        try:
            target = place(cluster, model, now_ms, exclude=gone, evicts_before_ms=before_ms, requests_per_minute=rate)
        except NoPlace:
            continue
        cluster.reserve(target, model.id, model.size_bytes, now_ms, requests_per_minute=rate)
        moves.append(Move(model.id, target, instance_id, "drain"))
    return moves


def prune(cluster: Cluster, model: Model, missing_since: Callable[[str], int | None], now_ms: int) -> list[Drop]:
    """The copies and failures in a model's record of instances that have been missing for a minute.

    ``missing_since`` tells since when (ms) an instance is known to be missing, or None while it is not. No request goes
    to them in the meantime: :func:`serving` leaves out who is not in the cluster.
    """
    drops = []
    for instance_id in dict.fromkeys((*model.copies, *model.failures)):
        since_ms = missing_since(instance_id)
        if instance_id not in cluster and since_ms is not None and now_ms - since_ms >= MISSING_MS:
            drops.append(Drop(model.id, instance_id, "its instance is gone"))
    return drops
