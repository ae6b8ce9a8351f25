"""The archived stack's metrics (mesh.md §7.2) for dashboards of it: its names, milliseconds, and gauges that it
calls totals.

Without modelmesh_model_sizing_milliseconds, since sizes are measured by the load itself, and without those of a JVM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from mmcore._ext.calls import CallCounts
from mmcore.metrics import Exposition, Histogram, merged
from mmcore.server.parts import Parts, call_seconds, request_sizes, response_sizes

#: What it says of an instance without models.
_EMPTY_LRU_S: Final = (2**63 - 1) // 1_000_000


def write_archived(out: Exposition, parts: Parts, duration: Histogram, queue: Histogram) -> None:
    """Write them; ``duration`` and ``queue`` are those of the inferences."""
    counted = parts.router.cache.counted
    clients: dict[tuple[str, str], list[CallCounts]] = {}
    for labels, counts in parts.calls():
        if labels["protocol"] != "peer":
            clients.setdefault((labels["method"], labels["code"]), []).append(counts)

    def by_method(
        make: Callable[[CallCounts], Histogram], factor: float = 1.0
    ) -> Iterable[tuple[dict[str, str], Histogram]]:
        for (method, code), found in clients.items():
            yield {"method": method, "code": code}, merged(map(make, found)).scaled(factor)

    out.histograms("modelmesh_api_request_milliseconds", "Requests of clients.", by_method(call_seconds, 1e3))
    out.histograms("modelmesh_request_size_bytes", "Messages received.", by_method(request_sizes))
    out.histograms("modelmesh_response_size_bytes", "Messages sent.", by_method(response_sizes))
    called = {"method": "ModelInfer", "code": "OK"}
    for name, text, seconds, told in (
        ("modelmesh_invoke_model_milliseconds", "Inferences.", duration, called),
        ("modelmesh_req_queue_delay_milliseconds", "Waiting before an inference.", queue, None),
        ("modelmesh_cache_miss_milliseconds", "Requests' waiting for loads.", counted.miss_seconds, None),
        ("modelmesh_loadmodel_milliseconds", "Loads.", counted.load_seconds, None),
        ("modelmesh_loading_queue_delay_milliseconds", "Waiting before a load.", counted.queue_seconds, None),
        ("modelmesh_unloadmodel_milliseconds", "Unloads.", counted.unload_seconds, None),
        ("modelmesh_age_at_eviction_milliseconds", "Idle time of the evicted.", counted.evicted_idle_seconds, None),
    ):
        out.histogram(name, text, seconds.scaled(1e3), told)
    out.histogram("modelmesh_loaded_model_size_bytes", "Sizes of models.", counted.sizes)
    out.value("modelmesh_loadmodel_failure", "counter", "Loads that failed.", counted.failures)
    for name in ("modelmesh_unloadmodel_failure", "modelmesh_unloadmodel_attempt_failure"):
        out.value(name, "counter", "Unloads that failed; each is tried once.", counted.unload_failures)
    _write_gauges(out, parts)


def _write_gauges(out: Exposition, parts: Parts) -> None:
    cache, models, capacity_bytes = parts.router.cache, parts.models(), parts.capacity()
    idle_s = cache.oldest_idle_s
    for name, value in (
        ("modelmesh_instance_lru_seconds", _EMPTY_LRU_S if idle_s is None else time.time() - idle_s),
        ("modelmesh_instance_lru_age_seconds", idle_s or 0),
        ("modelmesh_instance_capacity_bytes", capacity_bytes),
        ("modelmesh_instance_used_bytes", cache.used_bytes),
        ("modelmesh_instance_used_bps", 10_000 * cache.used_bytes // max(1, capacity_bytes)),
        ("modelmesh_instance_models_total", models["resident"]),
    ):
        out.value(name, "gauge", "Of this instance.", value)
    if parts.registry.leader:
        for name, value in (
            ("modelmesh_models_managed_total", models["registered"]),
            ("modelmesh_models_loaded_total", models["resident"]),
            ("modelmesh_models_with_failure_total", models["failed"]),
        ):
            out.value(name, "gauge", "Told by the leader.", value)
