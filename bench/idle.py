"""SUITE=idle: what an instance without models takes, and how soon it is ready."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Final

import psutil
from rich.console import Console

from bench.comparison import OURS, Plan
from bench.machine import cores
from bench.processes import Process
from bench.rows import Row, compare

#: design.md §9: at most 60 MB before any framework is imported, ready in less than a second.
BUDGET: Final = {"rss": 60.0, "ready": 1000.0}


def run(console: Console, plan: Plan) -> list[Row]:
    """Start each server several times, one after the other."""
    del console
    with tempfile.TemporaryDirectory() as folder:
        serve = [sys.executable, "-m", "mmcore.cli.main", "serve", "--models", folder, "--grpc-port", "0",
                 "--log-level", "warning"]  # fmt: skip
        commands = {OURS: serve, "grpc-aio": [sys.executable, "-m", "bench.peers.grpc_aio_echo"]}
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(plan.rounds):
            for name, command in commands.items():
                runs[name].append(_start(name, command))
    medians = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in runs.items()}
    found = []
    for at, metric in enumerate(("rss", "ready")):
        ours = medians[OURS][at]
        found.append(compare("idle", metric, ours, "grpc-aio", medians["grpc-aio"][at]))
        found.append(compare("idle", metric, ours, "budget", BUDGET[metric]))
    return found


def _start(name: str, command: Sequence[str]) -> tuple[float, float]:
    """Resident megabytes of a server that has just become ready, and the milliseconds it took to."""
    began = time.perf_counter()
    with Process(name, command, core=cores()[0]) as server:
        ready_ms = (time.perf_counter() - began) * 1e3
        rss = sum(psutil.Process(pid).memory_info().rss for pid in server.pids)
    return rss / 1e6, ready_ms
