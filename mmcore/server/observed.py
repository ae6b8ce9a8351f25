"""The metrics port: ``/metrics`` for Prometheus, ``/live`` and ``/ready`` for probes, ``/debug/state`` for support.

Every number is read when it is asked for, from counters that are kept anyway. The cost does not depend on the number of
models; only those that are asked for by ``--metrics-per-model`` have labels of their own.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import mmcore
from mmcore._ext.rates import BATCH_BOUNDS, TIME_BOUNDS_NS, TimeHistogram, totals
from mmcore.metrics import CONTENT_TYPE, Exposition, Histogram
from mmcore.registry import Registry
from mmcore.routing import Registered, Router
from mmcore.server.rest import Listener, Request
from mmcore.storage import Puller
from mmcore.transport import Server

_SECOND_NS: Final = 1e-9
_PAGE_BYTES: Final = resource.getpagesize()
#: Models told of in /debug/state, the most recently used first.
_MODELS_TOLD: Final = 1000


class Parts(NamedTuple):
    """What is looked at."""

    instance: str
    router: Router
    registry: Registry
    registered: Registered
    puller: Puller
    grpc: Server
    rest: Listener
    ready: Callable[[], bool]


class Observed:
    """Answers the requests of the metrics port. ``per_model``: so many models have labels of their own."""

    def __init__(self, parts: Parts, *, per_model: int = 0) -> None:
        self._parts = parts
        self._per_model = per_model
        self._started = time.time()

    def handle(self, request: Request) -> None:
        """Answer one request."""
        path = request.target.partition("?")[0]
        if request.method not in ("GET", "HEAD"):
            request.fail(405, f"{path} takes GET, got {request.method}", ((b"allow", b"GET"),))
        elif path == "/metrics":
            request.send(self.metrics(), content_type=CONTENT_TYPE)
        elif path == "/live":
            request.send(b'{"live":true}')
        elif path == "/ready":
            ready = self._parts.ready()
            request.send(json.dumps({"ready": ready}).encode(), status=200 if ready else 503)
        elif path == "/debug/state":
            request.send(json.dumps(self.state(), indent=1).encode())
        else:
            request.fail(404, f"no such path: {path}; there are /metrics, /live, /ready and /debug/state")

    def metrics(self) -> bytes:
        """One scrape."""
        out = Exposition()
        counted = totals()
        duration = _seconds(counted.total)
        queue = _seconds(counted.queue)
        answered = sum(counted.total.counts) + counted.hits
        out.value(
            "mmcore_info", "gauge", "Always 1; which instance this is.", 1,
            {"version": mmcore.__version__, "instance": self._parts.instance},
        )  # fmt: skip
        out.value("mmcore_ready", "gauge", "Whether requests are to be sent here.", int(self._parts.ready()))
        out.values(
            "mmcore_inference_requests_total", "counter", "Requests that were answered, cached or not, or failed.",
            [({"outcome": "success"}, answered), ({"outcome": "failure"}, counted.failed)],
        )  # fmt: skip
        out.value("mmcore_inference_rows_total", "counter", "Rows of the requests that models have run.", counted.rows)
        out.histogram("mmcore_inference_duration_seconds", "From a request's arrival to its answer.", duration)
        out.histogram("mmcore_inference_queue_seconds", "Of this, waiting for a copy, a batch or a thread.", queue)
        out.histogram("mmcore_inference_compute_seconds", "Of this, in the model.", _seconds(counted.infer))
        out.histogram(
            "mmcore_inference_batch_size", "Rows that a model ran at once.",
            Histogram(BATCH_BOUNDS, counted.batch_counts, counted.executed_rows),
        )  # fmt: skip
        out.value("mmcore_response_cache_hits_total", "counter", "Requests answered from the cache.", counted.hits)
        out.value("mmcore_response_cache_misses_total", "counter", "Answers put into the cache.", counted.misses)
        self._write_models(out)
        self._write_transport(out)
        _write_process(out, self._started)
        self._write_archived(out, duration, queue)
        if self._per_model:
            self._write_each(out)
        return out.text()

    def _write_models(self, out: Exposition) -> None:
        cache, puller = self._parts.router.cache, self._parts.puller
        out.values(
            "mmcore_models", "gauge", "Models by state; registered are all that this instance would serve.",
            [({"state": state}, count) for state, count in self._models().items()],
        )  # fmt: skip
        out.value("mmcore_capacity_bytes", "gauge", "What loaded models may take.", cache.capacity_bytes)
        out.value("mmcore_used_bytes", "gauge", "What loaded models take, and loads have reserved.", cache.used_bytes)
        out.histogram(
            "mmcore_model_load_seconds", "Loads that ended well, from their turn on.", cache.counted.load_seconds
        )
        out.histogram(
            "mmcore_model_load_queue_seconds", "How long these waited for their turn.", cache.counted.queue_seconds
        )
        out.histogram("mmcore_model_size_bytes", "What the loaded models took.", cache.counted.sizes)
        out.value("mmcore_model_load_failures_total", "counter", "Loads that failed.", cache.counted.failures)
        out.value("mmcore_model_evictions_total", "counter", "Models unloaded to make room.", cache.room.evictions)
        out.values(
            "mmcore_pulls_total", "counter", "Pulls of model files by what became of them.",
            [({"outcome": "pulled"}, puller.pulls), ({"outcome": "cached"}, puller.hits),
             ({"outcome": "failed"}, puller.failures)],
        )  # fmt: skip
        out.value("mmcore_pulled_bytes_total", "counter", "Bytes of model files received.", puller.received_bytes)
        out.value("mmcore_pull_seconds_total", "counter", "Time that pulls took together.", puller.seconds)
        out.value(
            "mmcore_registry_connected", "gauge", "Whether the store answers.", int(self._parts.registry.connected)
        )
        out.value("mmcore_leader", "gauge", "Whether this instance leads the others.", int(self._parts.registry.leader))

    def _models(self) -> dict[str, int]:
        cache = self._parts.router.cache
        return {
            "registered": (
                len(self._parts.router.table) + len(self._parts.registry.models) - self._parts.registered.held_models
            ),
            "resident": len(cache.lru),
            "loading": cache.loading,
            "failed": len(cache.failures),
        }

    def _write_transport(self, out: Exposition) -> None:
        grpc, rest = self._parts.grpc, self._parts.rest
        out.values(
            "mmcore_connections", "gauge", "Connections open now.",
            [({"protocol": "grpc"}, grpc.connections), ({"protocol": "http"}, rest.connections)],
        )  # fmt: skip
        out.values(
            "mmcore_requests_in_flight", "gauge", "Requests under way, of any method.",
            [({"protocol": "grpc"}, grpc.calls), ({"protocol": "http"}, rest.requests)],
        )  # fmt: skip

    def _write_archived(self, out: Exposition, duration: Histogram, queue: Histogram) -> None:
        """The archived stack's names, for dashboards that are there: milliseconds, and gauges that it calls totals."""
        cache, models = self._parts.router.cache, self._models()
        called = {"method": "ModelInfer", "code": "OK"}
        for name, text, seconds, labels in (
            ("modelmesh_invoke_model_milliseconds", "Inferences.", duration, called),
            ("modelmesh_api_request_milliseconds", "Requests.", duration, called),
            ("modelmesh_req_queue_delay_milliseconds", "Waiting before an inference.", queue, None),
            ("modelmesh_loadmodel_milliseconds", "Loads.", cache.counted.load_seconds, None),
            ("modelmesh_loading_queue_delay_milliseconds", "Waiting before a load.", cache.counted.queue_seconds, None),
        ):
            out.histogram(name, text, seconds.scaled(1e3), labels)
        out.histogram("modelmesh_loaded_model_size_bytes", "Sizes of models.", cache.counted.sizes)
        out.value("modelmesh_loadmodel_failure", "counter", "Loads that failed.", cache.counted.failures)
        used_bps = 10_000 * cache.used_bytes // max(1, cache.capacity_bytes)
        for name, value in (
            ("modelmesh_instance_capacity_bytes", cache.capacity_bytes),
            ("modelmesh_instance_used_bytes", cache.used_bytes),
            ("modelmesh_instance_used_bps", used_bps),
            ("modelmesh_instance_models_total", models["resident"]),
        ):
            out.value(name, "gauge", "Of this instance.", value)
        if self._parts.registry.leader:
            for name, value in (
                ("modelmesh_models_managed_total", models["registered"]),
                ("modelmesh_models_loaded_total", models["resident"]),
                ("modelmesh_models_with_failure_total", models["failed"]),
            ):
                out.value(name, "gauge", "Told by the leader.", value)

    def _write_each(self, out: Exposition) -> None:
        """The models used last, each by itself."""
        copies = self._parts.router.copies()[-self._per_model :]
        told = [({"model": copy.name, "version": copy.version}, copy.statistics.snapshot(), copy) for copy in copies]
        requests: list[tuple[dict[str, str], float]] = []
        seconds: list[tuple[dict[str, str], float]] = []
        for labels, counted, _ in told:
            requests.append(({**labels, "outcome": "success"}, counted.success.count))
            requests.append(({**labels, "outcome": "failure"}, counted.fail.count))
            seconds.append(({**labels, "part": "queue"}, counted.queue.ns * _SECOND_NS))
            seconds.append(({**labels, "part": "compute"}, counted.compute_infer.ns * _SECOND_NS))
            seconds.append(({**labels, "part": "total"}, counted.success.ns * _SECOND_NS))
        out.values("mmcore_model_requests_total", "counter", "Requests of a loaded copy.", requests)
        out.values("mmcore_model_seconds_total", "counter", "Time of its requests together.", seconds)
        out.values("mmcore_model_bytes", "gauge", "What it takes.", [(labels, copy.weight) for labels, _, copy in told])

    def state(self) -> dict[str, Any]:
        """The instance's view, for people: what is loaded, how much it takes and what went wrong."""
        router = self._parts.router
        cache = router.cache
        copies = router.copies()[::-1]
        return {
            "instance": self._parts.instance,
            "version": mmcore.__version__,
            "ready": self._parts.ready(),
            "up_s": round(time.time() - self._started, 1),
            "leader": self._parts.registry.leader,
            "registry_connected": self._parts.registry.connected,
            "models": self._models(),
            "capacity_bytes": cache.capacity_bytes,
            "used_bytes": cache.used_bytes,
            "connections": {"grpc": self._parts.grpc.connections, "http": self._parts.rest.connections},
            "loaded": [
                {
                    "model": copy.name,
                    "version": copy.version,
                    "bytes": copy.weight,
                    "requests": copy.statistics.snapshot().success.count,
                }
                for copy in copies[:_MODELS_TOLD]
            ],
            "failures": [
                {"model": name, "version": version, "reason": reason}
                for name, version, reason in cache.failures.told(_MODELS_TOLD)
            ],
        }


def _seconds(counted: TimeHistogram) -> Histogram:
    return Histogram([bound * _SECOND_NS for bound in TIME_BOUNDS_NS], counted.counts, counted.sum_ns * _SECOND_NS)


def _write_process(out: Exposition, started: float) -> None:
    """What every Prometheus client tells of its process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    out.value("process_cpu_seconds_total", "counter", "CPU time.", usage.ru_utime + usage.ru_stime)
    out.value("process_resident_memory_bytes", "gauge", "Resident memory.", resident)
    out.value("process_start_time_seconds", "gauge", "Start, since 1970.", started)
    out.value("process_open_fds", "gauge", "Open file descriptors.", len(os.listdir("/proc/self/fd")))  # noqa: PTH208
