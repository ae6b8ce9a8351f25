"""The instances of the mesh as this one sees them, and what it tells them of itself.

The registry's records become the view that placement decides on, and the peers that requests are passed on to. An
instance's own record is written when something in it has changed that others would decide by, not with every load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mmcore import placement
from mmcore.errors import Unavailable
from mmcore.log import event
from mmcore.registry import InstanceRecord, ModelRecord, Registry
from mmcore.routing.forwarding import Forwarding

log = logging.getLogger(__name__)

#: How often the own record is looked at, and after how long it is written whatever it says.
LOOK_S: Final = 1.0
LONGEST_SILENCE_S: Final = 60.0
#: What others decide by: this share of the capacity, this many requests per minute or this share of them.
_MEMORY_SHARE: Final = 0.02
_RATE: Final = 100
_RATE_SHARE: Final = 0.1
#: What a model is taken to need before any copy of it was measured.
UNKNOWN_SIZE_BYTES: Final = 4 * 2**20
#: An instance where a model failed to load is not asked to load it for so long.
FAILURE_MS: Final = 60_000


class Members:
    """Keeps ``cluster`` and the peers of ``forwarding`` in step with the registry, and publishes this instance.

    ``own_record`` tells what this instance is at this moment.
    """

    def __init__(
        self,
        registry: Registry,
        cluster: placement.Cluster,
        forwarding: Forwarding,
        own_record: Callable[[], InstanceRecord],
    ) -> None:
        self.cluster: Final = cluster
        self._registry = registry
        self._forwarding = forwarding
        self._own_record = own_record
        self._published: InstanceRecord | None = None
        self._wanted = asyncio.Event()
        self._publishing: asyncio.Task[None] | None = None
        registry.instances.listen(self._changed)

    async def start(self) -> None:
        """Take in who is there, and tell them of this instance from now on.

        Raises:
            Unavailable: the registry is away.
        """
        for name in list(self._registry.instances):
            self._changed(name)
        await self._publish()
        self._publishing = asyncio.get_running_loop().create_task(self._keep_published(), name="publish this instance")

    @property
    def joined(self) -> bool:
        """Whether the others are told of this instance."""
        return self._publishing is not None

    async def close(self) -> None:
        """Tell nothing any more; the record goes with the registry's lease."""
        if self._publishing is not None:
            self._publishing.cancel()
            await asyncio.wait([self._publishing])

    def refresh(self) -> None:
        """Bring this instance's own place in the cluster up to the moment."""
        self.cluster.put(instance_of(self._registry.instance, self._own_record()))

    def constrain(self, constraints: placement.TypeConstraints) -> None:
        """What types of models need of instances from now on."""
        self.cluster.constraints = constraints

    async def announce(self) -> None:
        """Publish now, whatever has changed; the registry being away is no reason to wait."""
        with contextlib.suppress(Unavailable):
            await self._publish()

    def _changed(self, name: str) -> None:
        record = self._registry.instances.get(name)
        known = self.cluster.get(name) is not None
        if record is None:
            if known:
                log.info("instance %s has left", name, extra=event("left", instance=name))
            self.cluster.remove(name)
            self._forwarding.update(name, None)
            return
        if not known:
            log.info(
                "instance %s has joined, at %s", name, record.address or "no address",
                extra=event("joined", instance=name, address=record.address),
            )  # fmt: skip
        self.cluster.put(instance_of(name, record))
        self._forwarding.update(name, record.address or None)

    async def _keep_published(self) -> None:
        silent_s = 0.0
        while True:
            await asyncio.sleep(LOOK_S)
            silent_s += LOOK_S
            before = self._published
            if before is not None and silent_s < LONGEST_SILENCE_S and not _matters(before, self._own_record()):
                continue
            try:
                await self._publish()
                silent_s = 0.0
            except Unavailable as error:
                log.debug("this instance's record was not written: %s", error)

    async def _publish(self) -> None:
        record = self._own_record()
        await self._registry.publish(record)
        self._published = record


def instance_of(name: str, record: InstanceRecord) -> placement.Instance:
    """An instance's record as placement sees it."""
    return placement.Instance(
        id=name,
        capacity_bytes=record.capacity_bytes,
        used_bytes=record.used_bytes,
        fixed_bytes=record.fixed_bytes,
        unloading_bytes=record.unloading_bytes,
        oldest_used_ms=record.oldest_used_ms or None,
        loading=record.loading,
        loader_threads=record.loader_threads,
        zone=record.zone,
        labels=frozenset(record.labels),
        version=record.version,
        started_ms=record.started_ms,
        draining=record.draining,
        requests_per_minute=float(record.requests_per_minute),
        in_flight=record.in_flight,
        published_ms=record.published_ms,
    )


def model_of(name: str, record: ModelRecord, now_ms: int, demand: placement.Demand | None = None) -> placement.Model:
    """A model's record as placement sees it at ``now_ms``, used as ``demand`` says."""
    states = placement.CopyState
    return placement.Model(
        id=name,
        type=record.type,
        size_bytes=record.size_bytes or UNKNOWN_SIZE_BYTES,
        copies={
            instance: placement.Copy(states.LOADED if copy.state == states.LOADED else states.LOADING, copy.since_ms)
            for instance, copy in record.copies.items()
        },
        failures={
            instance: failure.at_ms
            for instance, failure in record.failures.items()
            # By a clock that is ahead it would stand for as long as that is.
            if abs(now_ms - failure.at_ms) < FAILURE_MS
        },
        last_used_ms=record.last_used_ms,
        demand=demand or placement.Demand(),
        min_copies=record.min_copies,
        max_copies=record.max_copies,
        everywhere=record.everywhere,
    )


def _matters(before: InstanceRecord, now: InstanceRecord) -> bool:
    """Whether others would decide otherwise if they knew."""
    step = _MEMORY_SHARE * max(1, now.capacity_bytes)
    figures = (
        (before.used_bytes, now.used_bytes, step),
        (before.fixed_bytes, now.fixed_bytes, step),
        (before.unloading_bytes, now.unloading_bytes, step),
        (before.requests_per_minute, now.requests_per_minute, max(_RATE, _RATE_SHARE * before.requests_per_minute)),
        (before.in_flight, now.in_flight, max(16, before.in_flight)),
        (before.loading, now.loading, max(1, now.loader_threads)),
    )
    if any(abs(old - new) >= enough for old, new, enough in figures):
        return True
    kept = {name: getattr(before, name) for name in _FIGURES}
    return replace(now, **kept) != before


#: Fields that change all the time.
_FIGURES: Final = (
    *("used_bytes", "fixed_bytes", "unloading_bytes", "requests_per_minute", "in_flight", "loading"),
    *("models", "oldest_used_ms", "published_ms"),
)
