"""Placement at cluster scale: mmcore's decisions beside simpler ones, on the same events in virtual time.

``python -m bench.sim.placement --instances 100 --models 100000`` runs other sizes than ``make bench SUITE=sim``.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapreplace
from statistics import mean, median
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.comparison import Plan
from bench.sim.mesh import NOWHERE, ZONES, Mesh, Node
from bench.sim.ours import OwnPolicy
from bench.sim.policies import ModelMeshPolicy, Policy, RandomPolicy
from bench.sim.workload import Workload

TICK_MS: Final = 10_000
MINUTE_MS: Final = 60_000
#: Records are published at most this often unless the loads in progress begin or end.
PUBLISH_TICKS: Final = 2
#: An instance that died, or whose zone did, is back after this long.
ABSENT_MS: Final = 300_000
#: Memory that the models loaded at the start take.
FILLED: Final = 0.97
#: Minutes before the start in which each policy makes the copies that it wants.
SETTLING: Final = 10


@dataclass(frozen=True, slots=True)
class Scenario:
    """How large, how busy, and what happens; the defaults are those of the suite."""

    instances: int = 1000
    models: int = 1_000_000
    minutes: int = 30
    capacity_bytes: int = 5_000_000_000
    #: For each instance.
    requests_per_minute: float = 1200.0
    #: The minutes in which a rolling restart takes place, and the share of the instances that it takes each minute.
    deploy_minutes: tuple[int, int] = (5, 15)
    deploy_share: float = 0.02
    #: An instance in a thousand dies every so many minutes; all of one zone dies at one minute.
    crash_every_minutes: int = 3
    zone_lost_minute: int = 20
    seed: int = 1


@dataclass(slots=True)
class Outcome:
    """What a run counts; one figure of each balance per minute."""

    requests: float = 0.0
    missed: float = 0.0
    memory: list[float] = field(default_factory=list)
    traffic: list[float] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    waits_ms: list[int] = field(default_factory=list)


class Simulation:
    """One policy through one scenario."""

    def __init__(self, scenario: Scenario, policy: type[Policy]) -> None:
        self.scenario: Final = scenario
        total = scenario.requests_per_minute * scenario.instances
        self.workload: Final = Workload(scenario.models, total, scenario.seed)
        self.mesh: Final = Mesh(self.workload, scenario.instances, scenario.capacity_bytes)
        self.policy: Final = policy(self.mesh, scenario.seed)
        self.outcome: Final = Outcome()
        self._random: Final = np.random.default_rng(scenario.seed + 1)
        self._back: Final[list[tuple[int, int]]] = []
        self._busy: Final[set[int]] = set()
        self._to_restart: Final = list(range(scenario.instances))

    def run(self) -> dict[str, float]:
        """Fill, then live through the scenario; the figures."""
        self._fill()
        # What the run began with is not looked at again by the collector: its pauses would be in the decisions' times.
        gc.collect()
        gc.freeze()
        ticks = self.scenario.minutes * MINUTE_MS // TICK_MS
        for tick in range(1, ticks + 1):
            now_ms = self.mesh.now_ms = tick * TICK_MS
            self._requests(now_ms)
            self._publish(tick, now_ms)
            self.policy.every_tick(now_ms)
            if now_ms % MINUTE_MS == 0:
                minute = now_ms // MINUTE_MS
                self.workload.drift()
                self._events(minute, now_ms)
                self._route()
                self.policy.every_minute(now_ms)
                self._measure()
        return self._figures()

    def _fill(self) -> None:
        """Load what was used last until memory is nearly full: for every policy alike, into the emptiest each time."""
        mesh = self.mesh
        sizes = self.workload.sizes
        room = FILLED * self.scenario.capacity_bytes * self.scenario.instances
        order = np.argsort(-self.workload.last_used_ms)
        emptiest = [(0, node.slot) for node in mesh.nodes]
        for model in order[np.cumsum(sizes[order]) < room].tolist():
            used, slot = emptiest[0]
            mesh.load(model, slot, 0)
            heapreplace(emptiest, (used + int(sizes[model]), slot))
        mesh.settle()
        for _ in range(SETTLING):
            self._route()
            for node in mesh.nodes:
                self.policy.published(node, mesh.record(node, 0))
            self.policy.every_tick(0)
        mesh.moves = 0

    def _requests(self, now_ms: int) -> None:
        """The requests of a tick: those for models without a copy load one and wait for it."""
        mesh, outcome = self.mesh, self.outcome
        asked = self.workload.used(now_ms, TICK_MS)
        outcome.requests += float(self.workload.rates.sum()) * TICK_MS / MINUTE_MS
        for model in asked[mesh.home[asked] == NOWHERE].tolist():
            if mesh.home[model] != NOWHERE:  # moved here meanwhile
                continue
            slot = self.policy.place(model, now_ms)
            if slot is None or not mesh.nodes[slot].up:
                # Its death is not known yet: the forward fails and any other will do.
                slot = int(self._random.choice([node.slot for node in mesh.up]))
            wait_ms = mesh.load(model, slot, now_ms)
            outcome.missed += 1 + float(self.workload.rates[model]) * wait_ms / MINUTE_MS
            outcome.waits_ms.append(wait_ms)
            self._busy.add(slot)
            if isinstance(self.policy, OwnPolicy):
                self.policy.apply(now_ms)

    def _publish(self, tick: int, now_ms: int) -> None:
        """Each second tick, and whenever loads began or ended."""
        for node in self.mesh.up:
            turned = node.slot in self._busy or any(done_ms <= now_ms for done_ms, _ in node.loads)
            if turned or (tick + node.slot) % PUBLISH_TICKS == 0:
                self.policy.published(node, self.mesh.record(node, now_ms))
        self._busy.clear()

    def _events(self, minute: int, now_ms: int) -> None:
        scenario, mesh = self.scenario, self.mesh
        for node in [node for node in mesh.up if node.draining]:
            mesh.stop(node.slot)
            self.policy.lost(node)
            node.version = "2"
            self._start(node, now_ms)
        for slot in [slot for back_ms, slot in self._back if back_ms <= now_ms]:
            self._start(mesh.nodes[slot], now_ms)
        self._back[:] = [entry for entry in self._back if entry[0] > now_ms]
        first, last = scenario.deploy_minutes
        if first <= minute < last:
            for _ in range(max(1, int(scenario.instances * scenario.deploy_share))):
                leaving = mesh.nodes[self._to_restart.pop(0)]
                if leaving.up:
                    leaving.draining = True
                    self.policy.published(leaving, mesh.record(leaving, now_ms))
                    self.policy.leaves(leaving, now_ms)
        if minute % scenario.crash_every_minutes == 0:
            for _ in range(max(1, scenario.instances // 1000)):
                self._die(mesh.nodes[int(self._random.integers(len(mesh.nodes)))], now_ms)
        if minute == scenario.zone_lost_minute:
            for node in mesh.nodes:
                if node.zone == f"zone-{ZONES - 1}":
                    self._die(node, now_ms)

    def _die(self, node: Node, now_ms: int) -> None:
        if node.up:
            self.mesh.stop(node.slot)
            self.policy.lost(node)
            self._back.append((now_ms + ABSENT_MS, node.slot))

    def _start(self, node: Node, now_ms: int) -> None:
        node.start(now_ms)
        self.policy.published(node, self.mesh.record(node, now_ms))

    def _route(self) -> None:
        mesh, rates = self.mesh, self.workload.rates
        single = mesh.home >= 0
        by_slot = np.bincount(mesh.home[single], weights=rates[single], minlength=len(mesh.nodes))
        self.policy.split(list(mesh.several), by_slot)
        for node, rate in zip(mesh.nodes, by_slot.tolist(), strict=True):
            node.rate = rate

    def _measure(self) -> None:
        up = [node for node in self.mesh.up if not node.draining]
        memory = [node.used / node.capacity for node in up]
        traffic = [node.rate for node in up]
        self.outcome.memory.append(max(memory) / mean(memory))
        self.outcome.traffic.append(max(traffic) / mean(traffic))
        self.outcome.copies.append(sum(len(node.models) for node in up))

    def _figures(self) -> dict[str, float]:
        outcome = self.outcome
        hours = self.scenario.minutes / 60
        took_us = np.percentile(self.policy.decisions_ns or [0], [50, 99]) / 1000
        return {
            "instances": self.scenario.instances,
            "models": self.scenario.models,
            "memory_max_over_mean": round(median(outcome.memory), 4),
            "traffic_max_over_mean": round(median(outcome.traffic), 4),
            "miss_rate": round(outcome.missed / outcome.requests, 6),
            "moves_per_model_hour": round(self.mesh.moves / mean(outcome.copies) / hours, 4),
            "decision_us": round(float(took_us[0]), 2),
            "decision_p99_us": round(float(took_us[1]), 2),
            "memory_max_over_mean_worst": round(max(outcome.memory), 4),
            "traffic_max_over_mean_worst": round(max(outcome.traffic), 4),
            "cold_wait_p99_ms": round(float(np.percentile(outcome.waits_ms or [0], 99)), 1),
            "copies": round(mean(outcome.copies), 1),
        }


def simulate(scenario: Scenario) -> dict[str, dict[str, float]]:
    """The figures of each policy: ours as ``summary``."""
    figures = {}
    for policy in (OwnPolicy, RandomPolicy, ModelMeshPolicy):
        figures[policy.name] = Simulation(scenario, policy).run()
        gc.unfreeze()
    return figures


def run(console: Console, plan: Plan) -> Mapping[str, Mapping[str, float]]:
    """The suite ``sim``; a quick plan is a tenth of its size."""
    scenario = Scenario() if plan.rounds > 3 else Scenario(instances=100, models=100_000)
    figures = simulate(scenario)
    _show(console, figures)
    return figures


def _show(console: Console, figures: Mapping[str, Mapping[str, float]]) -> None:
    table = Table(title="bench sim", title_justify="left")
    table.add_column("")
    for name in figures:
        table.add_column("mmcore" if name == "summary" else name, justify="right")
    for key in figures["summary"]:
        table.add_row(key, *(f"{by_key[key]:,}" for by_key in figures.values()))
    console.print(table)


def main() -> None:
    """Run one scenario and print its figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.sim.placement", description=__doc__)
    parser.add_argument("--instances", type=int, default=Scenario().instances)
    parser.add_argument("--models", type=int, default=Scenario().models)
    parser.add_argument("--minutes", type=int, default=Scenario().minutes)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    print(json.dumps(simulate(Scenario(**vars(arguments))), indent=1))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
