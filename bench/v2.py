"""SUITE=v2: real models through ``mmcore serve``, through a grpc.aio server that does the same, and bare."""

from __future__ import annotations

import base64
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from rich.console import Console

from bench.comparison import OURS, Case, Exchange, Plan, Summary, measure, rows
from bench.machine import cores
from bench.messages import infer_request
from bench.peers.paths import MODEL_INFER
from bench.processes import Generator, PeerFailed, Process, python_server
from bench.rows import Row, compare
from bench.samples import FOLDER, Sample, samples
from mmcore.pb import inference_pb2

CONNECTIONS: Final = 4
STREAMS: Final = 16
#: design.md: a request may cost the framework's own call times this, plus that many µs.
BUDGET_FACTOR: Final = 1.3
BUDGET_US: Final = 10.0
#: The real command, on a free port, models loaded before it is ready.
SERVE: Final = (
    sys.executable, "-m", "mmcore.cli.main", "serve", "--models", str(FOLDER), "--grpc-port", "0",
    "--preload", "all", "--log-level", "warning",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Running:
    """The processes of the suite: servers by name, and a framework's loop for each case that has one."""

    servers: Mapping[str, Process]
    frameworks: Mapping[str, Process]
    generator: Generator


def run(console: Console, plan: Plan) -> list[Row]:
    """Train the samples where they are missing, start everything, measure."""
    models = [sample for sample in samples(console) if any(map(plan.wants_case, _case_names(sample)))]
    with started(models) as running:
        cases = [case for sample in models for case in _cases(sample, running) if plan.wants_case(case.name)]
        loops: dict[str, list[dict[str, float]]] = {name: [] for name in running.frameworks}

        def call_frameworks() -> None:
            for name, loop in running.frameworks.items():
                loops[name].append(json.loads(loop.ask(str(plan.duration_s / 2), plan.duration_s + 60)))

        summaries = measure(cases, running.servers, running.generator, plan, console, between=call_frameworks)
    return rows(cases, ("grpc-aio",), summaries) + _framework_rows(summaries, loops)


@contextmanager
def started(models: list[Sample]) -> Iterator[Running]:
    """``mmcore serve`` on the samples, the grpc.aio server, the frameworks' loops and the generator."""
    server_core, load_core = cores()
    with ExitStack() as running, tempfile.TemporaryDirectory() as folder:
        ours = Process(OURS, SERVE, core=server_core)
        arguments = [f"{sample.model}={sample.case}:{sample.file}" for sample in models]
        servers = {
            OURS: running.enter_context(ours),
            "grpc-aio": running.enter_context(
                python_server("grpc-aio", "bench.peers.grpc_aio_v2", *arguments, core=server_core)
            ),
        }
        loops = {}
        for sample in models:
            stored = Path(folder) / f"{sample.case}.npy"
            np.save(stored, sample.array)
            loop = python_server(
                f"framework {sample.case}", "bench.peers.framework_loop", sample.case, str(sample.file), str(stored),
                core=server_core,
            )  # fmt: skip
            loops[sample.case] = running.enter_context(loop)
        yield Running(servers, loops, running.enter_context(Generator(load_core)))


def right_outputs(loop: Process) -> dict[str, tuple[str, bytes]]:
    """What the framework itself answers: output name to datatype and bytes."""
    outputs: Any = loop.ready["outputs"]
    return {entry["name"]: (entry["datatype"], base64.b64decode(entry["data"])) for entry in outputs}


def request_of(sample: Sample) -> bytes:
    """The sample's request body."""
    return infer_request(sample.model, sample.input, sample.datatype, sample.array)


def _case_names(sample: Sample) -> tuple[str, str]:
    return sample.case, f"{sample.case}-1x1"


def _cases(sample: Sample, running: Running) -> list[Case]:
    """64 callers, whose requests mmcore may answer in batches, and one alone."""
    body = request_of(sample)
    right = right_outputs(running.frameworks[sample.case])
    exchanges = {
        name: Exchange(body, _checked_answer(f"case {sample.case}, {name}", server.target, body, right))
        for name, server in running.servers.items()
    }
    many, one = _case_names(sample)
    return [
        Case(many, exchanges, CONNECTIONS, STREAMS, ("throughput", "p99", "cpu", "capacity")),
        Case(one, exchanges, 1, 1, ("throughput", "p50", "p99", "cpu")),
    ]


def _checked_answer(what: str, target: str, body: bytes, right: Mapping[str, tuple[str, bytes]]) -> bytes:
    """The bytes that a server answers, after a look into them by protobuf: the framework's own outputs.

    Asked with grpcio, twice: an answer that changes could not be verified under load.
    """
    with grpc.insecure_channel(target) as channel:
        infer = channel.unary_unary(MODEL_INFER)
        try:
            answer, again = infer(body, timeout=60), infer(body, timeout=60)
        except grpc.RpcError as failure:
            raise PeerFailed(f"{what}: {failure.code().name}: {failure.details()}") from failure
    assert isinstance(answer, bytes)
    response = inference_pb2.ModelInferResponse.FromString(answer)
    raw = response.raw_output_contents
    found = {output.name: (output.datatype, raw[at]) for at, output in enumerate(response.outputs)}
    if found != right or answer != again:
        raise PeerFailed(f"{what}: answered {found}, then {again!r}; the framework says {right}")
    return answer


def _framework_rows(
    summaries: Mapping[tuple[str, str], Summary], loops: Mapping[str, list[dict[str, float]]]
) -> list[Row]:
    found = []
    for case, runs in loops.items():
        if case == "identity":
            continue  # no framework is called
        if (case, OURS) not in summaries:
            continue
        ours = summaries[case, OURS].values
        cpu_us = statistics.median(run["cpu_us"] for run in runs)
        per_s = statistics.median(run["calls"] / run["seconds"] for run in runs)
        found.append(compare(case, "throughput", ours["throughput"], "framework", per_s))
        found.append(compare(case, "cpu", ours["cpu"], "framework", cpu_us))
        budget_us = BUDGET_FACTOR * cpu_us + BUDGET_US
        found.append(compare(case, "cpu_budget", ours["cpu"], "framework", budget_us))
    return found
