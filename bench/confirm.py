"""Other people's clients beside our generator: h2load times the small echo, tritonclient reads the models' answers."""

from __future__ import annotations

import re
import shutil
import statistics
import struct
import subprocess
import tempfile
from contextlib import ExitStack
from typing import Final

import numpy as np
from rich.console import Console

from bench import builds
from bench.comparison import OURS, Plan
from bench.machine import cores, pinned
from bench.messages import small_request
from bench.peers.paths import MODEL_INFER
from bench.processes import PeerFailed, Process, python_server
from bench.rows import Row, compare
from bench.samples import samples
from bench.v2 import right_outputs, started

H2LOAD_REQUESTS: Final = 300_000
_RATE: Final = re.compile(r"finished in .*?, ([\d.]+) req/s")
_COUNTS: Final = re.compile(r"requests: (\d+) total.* (\d+) succeeded")
_STATUS: Final = re.compile(r"status codes: (\d+) 2xx")


def run(console: Console, plan: Plan) -> list[Row]:
    """h2load's rows; whether tritonclient agrees is printed.

    Raises:
        PeerFailed: a call failed, or tritonclient read an answer that the framework does not give.
    """
    found = _h2load_rows(console, plan)
    _ask_tritonclient(console)
    return found


def _h2load_rows(console: Console, plan: Plan) -> list[Row]:
    if shutil.which("h2load") is None:
        console.print("h2load: not measured: install nghttp2-client")
        return []
    server_core, load_core = cores()
    with ExitStack() as running, tempfile.NamedTemporaryFile() as stored:
        message = small_request()
        stored.write(b"\0" + struct.pack(">I", len(message)) + message)
        stored.flush()
        ours = running.enter_context(python_server(OURS, "bench.peers.mmcore_echo", core=server_core))
        raw_c = running.enter_context(Process("raw-c", [str(builds.raw_c())], core=server_core))
        requests = max(2_000, int(H2LOAD_REQUESTS * plan.duration_s))
        per_s: dict[str, list[float]] = {OURS: [], "raw-c": []}
        for _ in range(plan.rounds):
            for server in (ours, raw_c):
                with pinned(load_core):
                    per_s[server.name].append(_h2load(server, stored.name, requests))
    medians = {name: statistics.median(values) for name, values in per_s.items()}
    return [compare("small-h2load", "throughput", medians[OURS], "raw-c", medians["raw-c"])]


def _h2load(server: Process, body: str, requests: int) -> float:
    argv = ["h2load", "-n", str(requests), "-c", "4", "-m", "16", "-t", "1", "-d", body,
            "-H", "content-type: application/grpc", "-H", "te: trailers",
            f"http://{server.target}{MODEL_INFER}"]  # fmt: skip
    output = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout
    rate, counts = _RATE.search(output), _COUNTS.search(output)
    if rate is None or counts is None or counts[1] != counts[2]:
        raise PeerFailed(f"h2load against {server.name}: {output}")
    return float(rate[1])


def _ask_tritonclient(console: Console) -> None:
    try:
        import tritonclient.grpc as triton
    except ModuleNotFoundError:
        console.print("tritonclient: not asked: pip install 'mmcore[client]'")
        return
    models = samples(console)
    with started(models) as running, triton.InferenceServerClient(running.servers[OURS].target) as client:
        for sample in models:
            tensor = triton.InferInput(sample.input, list(sample.array.shape), sample.datatype)
            tensor.set_data_from_numpy(sample.array)
            try:
                answer = client.infer(sample.model, [tensor], client_timeout=60)
            except triton.InferenceServerException as failure:
                raise PeerFailed(f"tritonclient, {sample.model}: {failure}") from failure
            found = {
                output.name: (output.datatype, np.ascontiguousarray(answer.as_numpy(output.name)).tobytes())
                for output in answer.get_response().outputs
            }
            right = right_outputs(running.frameworks[sample.case])
            if found != right:
                raise PeerFailed(f"tritonclient reads {found} from {sample.model}, the framework says {right}")
            console.print(f"tritonclient: {sample.model} answers what the generator verifies")
