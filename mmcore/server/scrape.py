"""One scrape of ``/metrics``.

Every number is read when it is asked for, from counters that are kept anyway. The cost does not depend on the number of
models, but where they run in worker processes, each of which is looked at; only those that are asked for by
``--metrics-per-model`` have labels of their own.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

import mmcore
from mmcore._ext.rates import BATCH_BOUNDS, TIME_BOUNDS_NS, TimeHistogram, totals
from mmcore.metrics import Exposition, Histogram
from mmcore.runtimes.isolation import worker_totals
from mmcore.server.archived_metrics import write_archived
from mmcore.server.parts import Parts, call_seconds, request_sizes, response_sizes
from mmcore.storage import Puller

_SECOND_NS: Final = 1e-9
_PAGE_BYTES: Final = resource.getpagesize()


class Scrape:
    """Writes scrapes; ``per_model``: so many models have labels of their own; ``started`` in seconds of the epoch."""

    def __init__(self, parts: Parts, *, per_model: int, started: float) -> None:
        self._parts = parts
        self._per_model = per_model
        self._started = started

    def text(self) -> bytes:
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
        self._write_forwarding(out)
        _write_workers(out)
        _write_process(out, self._started)
        write_archived(out, self._parts, duration, queue)
        if self._per_model:
            self._write_each(out)
        return out.text()

    def _write_models(self, out: Exposition) -> None:
        cache = self._parts.router.cache
        out.values(
            "mmcore_models", "gauge", "Models by state; registered are all that this instance would serve.",
            [({"state": state}, count) for state, count in self._parts.models().items()],
        )  # fmt: skip
        out.value("mmcore_capacity_bytes", "gauge", "What loaded models may take.", self._parts.capacity())
        out.value("mmcore_used_bytes", "gauge", "What loaded models take, and loads have reserved.", cache.used_bytes)
        out.histogram(
            "mmcore_model_load_seconds", "Loads that ended well, from their turn on.", cache.counted.load_seconds
        )
        out.histogram(
            "mmcore_model_load_queue_seconds", "How long these waited for their turn.", cache.counted.queue_seconds
        )
        out.histogram(
            "mmcore_model_pull_seconds", "Of the loads, finding or pulling files.", cache.counted.pull_seconds
        )
        out.histogram(
            "mmcore_model_miss_seconds", "How long requests waited for a copy that was not here and is now.",
            cache.counted.miss_seconds,
        )  # fmt: skip
        out.histogram("mmcore_model_unload_seconds", "How long unloads took.", cache.counted.unload_seconds)
        out.value(
            "mmcore_model_unload_failures_total", "counter", "Unloads that failed.", cache.counted.unload_failures
        )
        out.histogram(
            "mmcore_model_evicted_idle_seconds", "For how long what made room had not been used.",
            cache.counted.evicted_idle_seconds,
        )  # fmt: skip
        out.histogram("mmcore_model_size_bytes", "What the loaded models took.", cache.counted.sizes)
        out.value("mmcore_model_load_failures_total", "counter", "Loads that failed.", cache.counted.failures)
        out.value("mmcore_model_evictions_total", "counter", "Models unloaded to make room.", cache.room.evictions)
        if self._parts.puller is not None:
            _write_pulls(out, self._parts.puller)
        out.value(
            "mmcore_registry_connected", "gauge", "Whether the store answers.", int(self._parts.registry.connected)
        )
        out.value(
            "mmcore_registry_lag_seconds", "gauge", "How old what is known of the registry may be.",
            self._parts.registry.lag_s,
        )  # fmt: skip
        out.value("mmcore_leader", "gauge", "Whether this instance leads the others.", int(self._parts.registry.leader))

    def _write_transport(self, out: Exposition) -> None:
        grpc, rest = self._parts.grpc, self._parts.rest
        http = (rest.connections, rest.requests, rest.accepted, rest.refused) if rest is not None else (0, 0, 0, 0)
        out.values(
            "mmcore_connections", "gauge", "Connections open now.",
            [({"protocol": "grpc"}, grpc.connections), ({"protocol": "http"}, http[0])],
        )  # fmt: skip
        out.values(
            "mmcore_requests_in_flight", "gauge", "Requests under way, of any method.",
            [({"protocol": "grpc"}, grpc.calls), ({"protocol": "http"}, http[1])],
        )  # fmt: skip
        out.values(
            "mmcore_accepted_connections_total", "counter", "Connections accepted.",
            [({"protocol": "grpc"}, grpc.accepted), ({"protocol": "http"}, http[2])],
        )  # fmt: skip
        out.values(
            "mmcore_connection_errors_total", "counter",
            "Connections that broke the protocol, had a peer that was gone or stuck, or were lost by the network.",
            [
                *(({"protocol": "grpc", "reason": reason}, count) for reason, count in grpc.errors.items()),
                ({"protocol": "http", "reason": "protocol"}, http[3]),
            ],
        )  # fmt: skip
        out.value("mmcore_received_bytes_total", "counter", "Received by gRPC, framing included.", grpc.received_bytes)
        out.value("mmcore_sent_bytes_total", "counter", "Sent by gRPC, framing included.", grpc.sent_bytes)
        payloads = self._parts.payloads()
        written, dropped = (payloads.written, payloads.dropped) if payloads is not None else (0, 0)
        out.values(
            "mmcore_payload_events_total", "counter", "Requests and answers that were to be written out.",
            [({"outcome": "written"}, written), ({"outcome": "dropped"}, dropped)],
        )  # fmt: skip
        calls = list(self._parts.calls())
        for name, text, histogram in (
            ("mmcore_request_duration_seconds", "From a request's arrival to its answer, of any method.", call_seconds),
            ("mmcore_request_size_bytes", "Messages received.", request_sizes),
            ("mmcore_response_size_bytes", "Messages sent.", response_sizes),
        ):
            out.histograms(name, text, [(labels, histogram(counts)) for labels, counts in calls])

    def _write_forwarding(self, out: Exposition) -> None:
        forwarding = self._parts.forwarding
        peers = forwarding.peers.values() if forwarding is not None else ()
        usable = sum(peer.usable for peer in peers)
        out.values(
            "mmcore_peers", "gauge", "Other instances.",
            [({"state": "usable"}, usable), ({"state": "unreachable"}, len(peers) - usable)],
        )  # fmt: skip
        sent, retries, unanswered = (
            (forwarding.sent, forwarding.passed_over, forwarding.unanswered) if forwarding is not None else (0, 0, 0)
        )
        for name, text, count in (
            ("mmcore_forwards_total", "Requests sent on to other instances.", sent),
            ("mmcore_forward_retries_total", "Instances that were asked and did not answer a request.", retries),
            ("mmcore_forwards_unanswered_total", "Requests for which no such instance was left.", unanswered),
        ):
            out.value(name, "counter", text, count)

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


def _seconds(counted: TimeHistogram) -> Histogram:
    return Histogram([bound * _SECOND_NS for bound in TIME_BOUNDS_NS], counted.counts, counted.sum_ns * _SECOND_NS)


def _write_pulls(out: Exposition, puller: Puller) -> None:
    out.values(
        "mmcore_pulls_total", "counter", "Pulls of model files by what became of them.",
        [({"outcome": "pulled"}, puller.pulls), ({"outcome": "cached"}, puller.hits),
         ({"outcome": "failed"}, puller.failures)],
    )  # fmt: skip
    out.value("mmcore_pulled_bytes_total", "counter", "Bytes of model files received.", puller.received_bytes)
    out.value("mmcore_pull_seconds_total", "counter", "Time that pulls took together.", puller.seconds)


def _write_workers(out: Exposition) -> None:
    """The processes of isolated models, all together."""
    taken = worker_totals.taken()
    out.value("mmcore_worker_processes", "gauge", "Worker processes of isolated models.", taken.processes)
    out.value("mmcore_worker_resident_bytes", "gauge", "Their resident memory together.", taken.resident_bytes)
    out.value("mmcore_worker_cpu_seconds_total", "counter", "CPU time of all there were.", taken.cpu_s)
    out.value("mmcore_worker_starts_total", "counter", "Worker processes started.", worker_totals.started)
    out.values(
        "mmcore_worker_failures_total", "counter", "Worker processes that crashed, or did not answer in time.",
        [({"reason": "crashed"}, worker_totals.crashed), ({"reason": "overdue"}, worker_totals.overdue)],
    )  # fmt: skip


def _write_process(out: Exposition, started: float) -> None:
    """What every Prometheus client tells of its process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    out.value("process_cpu_seconds_total", "counter", "CPU time.", usage.ru_utime + usage.ru_stime)
    out.value("process_resident_memory_bytes", "gauge", "Resident memory.", resident)
    out.value("process_start_time_seconds", "gauge", "Start, since 1970.", started)
    out.value("process_open_fds", "gauge", "Open file descriptors.", len(os.listdir("/proc/self/fd")))  # noqa: PTH208
