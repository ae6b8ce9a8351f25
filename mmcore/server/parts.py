"""The parts of an instance that its metrics and its state are read from, and what its calls tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    """What is looked at; ``rest_counted`` are REST's requests by method."""

    instance: str
    router: Router
    registry: Registry
    registered: Registered
    puller: Puller
    grpc: Server
    rest: Listener
    rest_counted: Mapping[str, CallCounters]
    forwarding: Forwarding | None
    ready: Callable[[], bool]
    payloads: Callable[[], PayloadLog | None]

    def models(self) -> dict[str, int]:
        """How many models there are, by state."""
        cache = self.router.cache
        return {
            "registered": len(self.router.table) + len(self.registry.models) - self.registered.held_models,
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
