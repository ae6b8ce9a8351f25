"""Which copy a request goes to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import exp
from random import Random
from typing import Final

from mmcore.placement.cluster import Cluster
from mmcore.placement.models import CopyState, Model

#: What was measured counts 1/e after this long.
LATENCY_DECAY_MS: Final = 10_000.0
#: A failed request counts as one that took at least this long.
FAILURE_MS: Final = 1_000.0
#: The local copy is taken while it costs at most this many times the other: a hop saved, and no herd.
LOCAL_FACTOR: Final = 2.0


class Traffic:
    """What one instance knows of the load on the others: its own requests there, their reports, how long they took.

    Latencies are kept by model and instance, as models differ more than instances do. A latency that rises counts at
    once; one that falls, or is not measured any more, fades: a slow copy is tried again after some seconds.
    """

    __slots__ = ("_latencies", "_others", "_own")

    def __init__(self) -> None:
        self._own: dict[str, int] = {}
        self._others: dict[str, int] = {}
        #: Model to instance to (ms, measured at ms).
        self._latencies: dict[str, dict[str, tuple[float, int]]] = {}

    def in_flight(self, instance_id: str) -> int:
        """Requests at an instance, those that others sent it by its last report."""
        return self._own.get(instance_id, 0) + self._others.get(instance_id, 0)

    def reported(self, instance_id: str, in_flight: int) -> None:
        """An instance told, in its record or with an answer, how many requests it has."""
        self._others[instance_id] = max(0, in_flight - self._own.get(instance_id, 0))

    def began(self, instance_id: str) -> None:
        """A request was sent there; :meth:`ended` must follow."""
        self._own[instance_id] = self._own.get(instance_id, 0) + 1

    def ended(self, model_id: str, instance_id: str, took_ms: float, now_ms: int, *, failed: bool = False) -> None:
        """The answer came, or none will."""
        left = self._own.get(instance_id, 0) - 1
        if left > 0:
            self._own[instance_id] = left
        else:
            self._own.pop(instance_id, None)
        if failed:
            took_ms = max(took_ms, FAILURE_MS)
        by_instance = self._latencies.setdefault(model_id, {})
        before = by_instance.get(instance_id)
        if before is not None:
            kept = exp((before[1] - now_ms) / LATENCY_DECAY_MS)
            took_ms = max(took_ms, took_ms + (before[0] - took_ms) * kept)
        by_instance[instance_id] = (took_ms, now_ms)

    def forget(self, *, model_id: str | None = None, instance_id: str | None = None) -> None:
        """Drop what is known of a model that is gone or unused, or of an instance that is gone."""
        if model_id is not None:
            self._latencies.pop(model_id, None)
        if instance_id is not None:
            self._own.pop(instance_id, None)
            self._others.pop(instance_id, None)
            for by_instance in self._latencies.values():
                by_instance.pop(instance_id, None)

    def cost(self, model_id: str, instance_id: str, now_ms: int) -> float:
        """The time a further request would take there, in ms: the latency seen for each request before it and itself.

        Where nothing was measured for seconds it is 1 ms, so that the requests there decide.
        """
        measured = self._latencies.get(model_id, {}).get(instance_id)
        latency = 1.0
        if measured is not None:
            latency = max(1.0, measured[0] * exp((measured[1] - now_ms) / LATENCY_DECAY_MS))
        return latency * (1 + self.in_flight(instance_id))


def serving(cluster: Cluster, model: Model) -> tuple[str, ...]:
    """The instances to choose from, to be computed when the model's record or an instance's standing changes.

    Those whose copy is loaded and which do not drain; without such ones those that drain; without any the one whose
    load began first, to wait there with all others. Empty: there is no copy, so one must be placed.
    """
    loaded: list[str] = []
    draining: list[str] = []
    loading: list[tuple[bool, int, str]] = []
    for instance_id, copy in model.copies.items():
        member = cluster.get(instance_id)
        if member is None:
            continue
        if copy.state is CopyState.LOADING:
            loading.append((member.instance.draining, copy.since_ms, instance_id))
        else:
            (draining if member.instance.draining else loaded).append(instance_id)
    if loaded or draining:
        return tuple(loaded or draining)
    return (min(loading)[2],) if loading else ()


def choose(
    model_id: str,
    copies: Sequence[str],
    traffic: Traffic,
    now_ms: int,
    random: Random,
    *,
    local: str | None = None,
    tried: Collection[str] = (),
    local_factor: float = LOCAL_FACTOR,
) -> str | None:
    """One of ``copies`` (see :func:`serving`) for a request; None when all have been tried.

    Two are drawn and the cheaper taken: nearly as even as always the cheapest, and many senders with the same old
    reports do not all choose the same. The copy of ``local``, the instance that asks, is taken unless it costs more
    than ``local_factor`` times the other; with 1.0 it competes like any (requests that no balancer spreads).
    """
    if tried:
        copies = [instance_id for instance_id in copies if instance_id not in tried]
    count = len(copies)
    if count <= 1:
        return copies[0] if count else None
    first = int(random.random() * count)
    second = int(random.random() * (count - 1))
    if second >= first:
        second += 1
    one, other = copies[first], copies[second]
    cost, other_cost = traffic.cost(model_id, one, now_ms), traffic.cost(model_id, other, now_ms)
    if other_cost < cost:
        one, cost = other, other_cost
    if local is None or local == one or local not in copies:
        return one
    return local if traffic.cost(model_id, local, now_ms) <= local_factor * cost else one
