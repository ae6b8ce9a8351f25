"""Measures servers side by side: every round visits every case and every server once, and medians are reported."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich.console import Console

from bench.load.job import Job, Outcome
from bench.peers.paths import MODEL_INFER
from bench.processes import Generator, PeerFailed, Process
from bench.rows import Row, compare

OURS: Final = "mmcore"
#: The share of one core from which other processes' work is worth a warning.
DISTURBED: Final = 0.1

METRICS: Final[dict[str, Callable[[Outcome], float]]] = {
    "throughput": lambda outcome: outcome.per_s,
    "p50": lambda outcome: outcome.latency_us["p50"],
    "p99": lambda outcome: outcome.latency_us["p99"],
    "cpu": lambda outcome: outcome.server_cpu_us,
    "capacity": lambda outcome: 1e6 / outcome.server_cpu_us,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a suite measures (the rounds of the medians, the seconds of each window), and what of it.

    ``cases`` and ``peers`` name the ones wanted; empty: all.
    """

    rounds: int
    warmup_s: float
    duration_s: float
    cases: frozenset[str] = frozenset()
    peers: frozenset[str] = frozenset()

    def wants_case(self, name: str) -> bool:
        """Whether this case is to be measured."""
        return not self.cases or name in self.cases

    def wants_peer(self, name: str) -> bool:
        """Whether this peer is to be measured."""
        return not self.peers or name in self.peers


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request body and the one right answer to it, whose last ``rounded_values`` FP32 may be rounded otherwise."""

    body: bytes
    answer: bytes
    rounded_values: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A way to load a server. ``exchanges`` holds the bodies for each server by name; others are not measured."""

    name: str
    exchanges: Mapping[str, Exchange]
    connections: int
    streams: int
    metrics: tuple[str, ...]
    mode: Literal["closed", "open"] = "closed"
    rate_per_s: float = 0.0
    #: ``http``: the bodies are whole requests, and go to the address that the ready line calls ``rest``.
    protocol: Literal["grpc", "http"] = "grpc"


@dataclass(frozen=True, slots=True)
class Summary:
    """The medians of one server in one case, by metric."""

    values: dict[str, float]
    limited_by_load: bool


def measure(
    cases: Sequence[Case],
    servers: Mapping[str, Process],
    generator: Generator,
    plan: Plan,
    console: Console,
    *,
    between: Callable[[], None] = lambda: None,
) -> dict[tuple[str, str], Summary]:
    """Medians by (case, server). ``between`` is called once in each round, for what is measured another way.

    Raises:
        PeerFailed: a server failed or answered wrongly; names the case and the server.
    """
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for _ in range(plan.rounds):
        for case in cases:
            for name, server in servers.items():
                if name in case.exchanges:
                    outcome = _window(case, name, server, generator, plan)
                    outcomes.setdefault((case.name, name), []).append(outcome)
        between()
    others = statistics.median(outcome.others_busy for measured in outcomes.values() for outcome in measured)
    if others > DISTURBED:
        console.print(
            f"other processes took {others:.0%} of a core meanwhile: the figures are disturbed", style="yellow"
        )
    metrics = {case.name: case.metrics for case in cases}
    return {key: _summary(metrics[key[0]], measured) for key, measured in outcomes.items()}


def rows(cases: Sequence[Case], peers: Sequence[str], summaries: Mapping[tuple[str, str], Summary]) -> list[Row]:
    """A row for each case, metric and peer that was measured."""
    found = []
    for case in cases:
        ours = summaries[case.name, OURS]
        for metric in case.metrics:
            for peer in peers:
                theirs = summaries.get((case.name, peer))
                if theirs is None:
                    continue
                sides = (("ours", ours), ("peer", theirs))
                limited = tuple(side for side, summary in sides if summary.limited_by_load)
                found.append(compare(case.name, metric, ours.values[metric], peer, theirs.values[metric], limited))
    return found


def _window(case: Case, name: str, server: Process, generator: Generator, plan: Plan) -> Outcome:
    exchange = case.exchanges[name]
    job = Job(
        target=server.rest if case.protocol == "http" else server.target,
        protocol=case.protocol,
        path=MODEL_INFER,
        body=exchange.body,
        expected=exchange.answer,
        rounded_values=exchange.rounded_values,
        mode=case.mode,
        connections=case.connections,
        streams=case.streams,
        rate_per_s=case.rate_per_s,
        warmup_s=plan.warmup_s,
        duration_s=plan.duration_s,
        server_pids=server.pids,
    )
    try:
        return generator.measure(job)
    except PeerFailed as failure:
        raise PeerFailed(f"case {case.name}, {name}: {failure}") from failure


def _summary(metrics: Sequence[str], outcomes: Sequence[Outcome]) -> Summary:
    values = {metric: statistics.median(METRICS[metric](outcome) for outcome in outcomes) for metric in metrics}
    limited = [outcome.load_busy > 0.95 and outcome.server_busy < 0.95 for outcome in outcomes]
    return Summary(values, sum(limited) * 2 > len(limited))
