"""SUITE=passthrough: requests passed through by `mmcore serve --runtime`, through a grpc.aio proxy, and sent directly.

The runtime is an echo of ours, which shares a core with the generator; `mmcore serve` and the proxy have the other.
With `direct` the echo itself is measured, on the generator's core.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rich.console import Console

from bench.comparison import OURS, Case, Exchange, Plan, measure, rows
from bench.machine import cores
from bench.messages import large_request, small_request
from bench.processes import Generator, python_server
from bench.rows import Row

PROXY: Final = "grpc-aio-proxy"
DIRECT: Final = "direct"


def run(console: Console, plan: Plan) -> list[Row]:
    """Start the runtime and what stands before it, measure the cases, end them."""
    server_core, load_core = cores()
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="mmcore-bench-passthrough-")))
        (folder / "weights").write_bytes(b"weights")
        model = {"modelId": "identity", "modelInfo": {"type": "any", "path": str(folder / "weights")}}
        (folder / "models.json").write_text(json.dumps([{**model, "ensureLoaded": True}]))
        runtime = running.enter_context(python_server(DIRECT, "bench.peers.runtime_echo", core=load_core))
        options = ("--runtime", runtime.target, "--static-models", str(folder / "models.json"))
        ports = ("--grpc-port", "0", "--rest-port", "0", "--metrics-port", "0")
        servers = {
            OURS: running.enter_context(
                python_server(OURS, "mmcore.cli.main", "serve", *options, *ports, core=server_core)
            )
        }
        if plan.wants_peer(PROXY):
            servers[PROXY] = running.enter_context(
                python_server(PROXY, "bench.peers.grpc_aio_proxy", runtime.target, core=server_core)
            )
        if plan.wants_peer(DIRECT):
            servers[DIRECT] = runtime
        generator = running.enter_context(Generator(load_core))
        cases = [case for case in _cases(tuple(servers)) if plan.wants_case(case.name)]
        return rows(cases, (PROXY, DIRECT), measure(cases, servers, generator, plan, console))


def _cases(servers: tuple[str, ...]) -> list[Case]:
    small, large = small_request(), large_request()
    metrics = ("throughput", "p50", "p99", "cpu", "capacity")
    return [
        Case("small", dict.fromkeys(servers, Exchange(small, small)), 4, 16, metrics),
        Case("large", dict.fromkeys(servers, Exchange(large, large)), 1, 1, metrics),
    ]
