"""SUITE=forward: requests passed on to another instance, and through a grpc.aio proxy that does the same.

Both pass the bytes on unread to one echo of ours, which shares a core with the generator; the proxies have the other.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final

from rich.console import Console

from bench.comparison import OURS, Case, Exchange, Plan, measure, rows
from bench.machine import cores
from bench.messages import large_request, small_request
from bench.processes import Generator, python_server
from bench.rows import Row

PEER: Final = "grpc-aio-proxy"


def run(console: Console, plan: Plan) -> list[Row]:
    """Start the echo and both proxies before it, measure the cases, end them."""
    server_core, load_core = cores()
    with ExitStack() as running:
        holder = running.enter_context(python_server("holder", "bench.peers.mmcore_echo", core=load_core)).target
        servers = {
            name: running.enter_context(python_server(name, module, holder, core=server_core))
            for name, module in ((OURS, "bench.peers.mmcore_forward"), (PEER, "bench.peers.grpc_aio_proxy"))
            if name == OURS or plan.wants_peer(name)
        }
        generator = running.enter_context(Generator(load_core))
        cases = [case for case in _cases(tuple(servers)) if plan.wants_case(case.name)]
        return rows(cases, (PEER,), measure(cases, servers, generator, plan, console))


def _cases(servers: tuple[str, ...]) -> list[Case]:
    small, large = small_request(), large_request()
    metrics = ("throughput", "p50", "p99", "cpu", "capacity")
    return [
        Case("small", dict.fromkeys(servers, Exchange(small, small)), 4, 16, metrics),
        Case("small-1x1", dict.fromkeys(servers, Exchange(small, small)), 1, 1, metrics),
        Case("large", dict.fromkeys(servers, Exchange(large, large)), 1, 1, metrics),
    ]
