"""SUITE=transport: the echo of one message through our transport and through the peers' servers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from rich.console import Console

from bench import builds
from bench.comparison import OURS, Case, Exchange, Plan, measure, rows
from bench.machine import cores
from bench.messages import large_request, small_request
from bench.processes import Generator, Process, python_server
from bench.rows import Row

PEERS: Final = ("raw-c", "grpc-cpp", "grpc-aio", "grpc-sync")
#: What an open loop sends in a second: about a third of what the slowest peer can answer.
STEADY_PER_S: Final = 1000.0


def run(console: Console, plan: Plan) -> list[Row]:
    """Start every server that can be built, measure the cases, end the servers."""
    server_core, load_core = cores()
    starts: dict[str, Callable[[], Process]] = {
        OURS: lambda: python_server(OURS, "bench.peers.mmcore_echo", core=server_core),
        "raw-c": lambda: Process("raw-c", [str(builds.raw_c())], core=server_core),
        "grpc-cpp": lambda: Process("grpc-cpp", [str(builds.grpc_cpp())], core=server_core),
        "grpc-aio": lambda: python_server("grpc-aio", "bench.peers.grpc_aio_echo", core=server_core),
        "grpc-sync": lambda: python_server("grpc-sync", "bench.peers.grpc_sync_echo", core=server_core),
    }
    with ExitStack() as running:
        servers: dict[str, Process] = {}
        for name, start in starts.items():
            if name != OURS and not plan.wants_peer(name):
                continue
            try:
                servers[name] = running.enter_context(start())
            except builds.NotMeasured as missing:
                console.print(f"{name}: not measured: {missing}")
        generator = running.enter_context(Generator(load_core))
        cases = [case for case in _cases(tuple(servers)) if plan.wants_case(case.name)]
        return rows(cases, PEERS, measure(cases, servers, generator, plan, console))


def _cases(servers: tuple[str, ...]) -> list[Case]:
    small, large = small_request(), large_request()
    echo_small = dict.fromkeys(servers, Exchange(small, small))
    echo_large = dict.fromkeys(servers, Exchange(large, large))
    closed = ("throughput", "p99", "cpu", "capacity")
    timed = ("throughput", "p50", "p99", "cpu")
    return [
        Case("small", echo_small, 4, 16, closed),
        Case("large", echo_large, 1, 1, closed),
        Case("large-4x4", echo_large, 4, 4, closed),
        Case("latency", echo_small, 1, 1, timed),
        Case("steady", echo_small, 4, 1, ("p50", "p99", "cpu"), mode="open", rate_per_s=STEADY_PER_S),
    ]
