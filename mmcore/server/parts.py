"""The parts of an instance that its metrics and its state are read from, and what its calls tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from mmcore._ext.calls import SIZE_BOUNDS_BYTES, TIME_BOUNDS_S, CallCounters, CallCounts
from mmcore.errors import Status
from mmcore.metrics import Histogram
from mmcore.registry import Registry
from mmcore.routing import Forwarding, Registered, Router
from mmcore.server.payloads import PayloadLog
from mmcore.server.rest import Listener
from mmcore.storage import Puller
from mmcore.transport import Server


class Parts(NamedTuple):
    """What is looked at; a process that holds models for a mesh has no more than the first five.

    ``capacity_bytes`` is what loaded models may take where the cache does not say so, and ``rest_counted`` are REST's
    requests by method.
    """

    instance: str
    router: Router
    registry: Registry
    grpc: Server
    ready: Callable[[], bool]
    capacity_bytes: Callable[[], int] | None = None
    registered: Registered | None = None
    puller: Puller | None = None
    rest: Listener | None = None
    rest_counted: Mapping[str, CallCounters] = MappingProxyType({})
    forwarding: Forwarding | None = None
    payloads: Callable[[], PayloadLog | None] = lambda: None

    def capacity(self) -> int:
        """What loaded models may take, in bytes."""
        return self.capacity_bytes() if self.capacity_bytes is not None else self.router.cache.capacity_bytes

    def models(self) -> dict[str, int]:
        """How many models there are, by state."""
        cache = self.router.cache
        held = self.registered.held_models if self.registered is not None else 0
        return {
            "registered": len(self.router.table) + len(self.registry.models) - held,
            "resident": len(cache.lru),
            "loading": cache.loading,
            "failed": len(cache.failures),
        }

    def calls(self) -> Iterator[tuple[dict[str, str], CallCounts]]:
        """What was asked: labels, and counts for each method and status that has occurred."""
        for method in self.grpc.methods:
            name = method.path.rpartition("/")[2]
            yield from _told("grpc", name, method.counted)
            yield from _told("peer", name, method.from_peers)
        for name, counted in self.rest_counted.items():
            yield from _told("http", name, counted)


def _told(protocol: str, method: str, counted: CallCounters) -> Iterator[tuple[dict[str, str], CallCounts]]:
    for counts in counted.snapshot():
        yield {"protocol": protocol, "method": method, "code": Status(counts.status).name}, counts


def call_seconds(counts: CallCounts) -> Histogram:
    """How long calls took."""
    return Histogram(TIME_BOUNDS_S, counts.times, counts.time_s)


def request_sizes(counts: CallCounts) -> Histogram:
    """How large their messages were, in bytes."""
    return Histogram(SIZE_BOUNDS_BYTES, counts.requests, counts.request_bytes)


def response_sizes(counts: CallCounts) -> Histogram:
    """The same of the answers."""
    return Histogram(SIZE_BOUNDS_BYTES, counts.responses, counts.response_bytes)
