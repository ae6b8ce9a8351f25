"""Two policies to compare with: any instance, and the rules of ModelMesh."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Final

import numpy as np

from bench.sim.mesh import NOWHERE, Mesh, Node
from mmcore.placement import Instance

#: Requests per minute of one instance's copy at which ModelMesh adds another (its default).
SCALE_UP: Final = 2000.0


class Policy(ABC):
    """What the simulation asks for decisions.

    Attributes:
        decisions_ns: what some of its decisions took, in CPU time so that other processes do not count.
    """

    name: str

    def __init__(self, mesh: Mesh, seed: int) -> None:
        self.mesh: Final = mesh
        self.random: Final = random.Random(seed)
        self.decisions_ns: Final[list[int]] = []

    @abstractmethod
    def place(self, model: int, now_ms: int) -> int | None:
        """The slot that a model asked for is loaded at; it may be one that died a moment ago."""

    def published(self, node: Node, record: Instance) -> None:  # noqa: B027 (nothing is a fair answer)
        """A node's record reached the others."""

    def lost(self, node: Node) -> None:  # noqa: B027 (nothing is a fair answer)
        """The others learned that a node is gone."""

    def leaves(self, node: Node, now_ms: int) -> None:  # noqa: B027 (nothing is a fair answer)
        """A node starts to drain; a minute later it stops."""

    def every_tick(self, now_ms: int) -> None:
        """Add copies of busy models: as ModelMesh by multiples of 2,000, to a third of the nodes at most (5.7)."""
        mesh = self.mesh
        rates = mesh.workload.rates
        most = max(2, len(mesh.nodes) // 3)
        for model in np.flatnonzero(rates >= SCALE_UP).tolist():
            held = mesh.copies.get(model)
            if not held:
                continue
            share = float(rates[model]) / len(held)
            for _ in range(min(int(share / SCALE_UP), most - len(held))):
                slot = self.place(model, now_ms)
                if slot is not None:
                    self.move(model, slot, now_ms)

    def every_minute(self, now_ms: int) -> None:  # noqa: B027 (nothing is a fair answer)
        """Even out, fill."""

    def split(self, several: Iterable[int], rates: np.ndarray) -> None:
        """Add the traffic of models with several copies to the nodes' rates: equal parts, as by turns."""
        for model in several:
            held = self.mesh.copies[model]
            share = float(self.mesh.workload.rates[model]) / len(held)
            for slot in held:
                rates[slot] += share

    def move(self, model: int, slot: int, now_ms: int) -> None:
        """Load a copy that nobody waits for."""
        if self.mesh.nodes[slot].up and slot not in self.mesh.copies.get(model, ()):
            self.mesh.load(model, slot, now_ms)
            self.mesh.moves += 1


class RandomPolicy(Policy):
    """Any instance that does not drain. Copies are added by rate as ModelMesh does, nothing is moved."""

    name = "random"

    def place(self, model: int, now_ms: int) -> int | None:
        """Any that does not hold it."""
        began = time.thread_time_ns()
        nodes = self.mesh.nodes
        held = self.mesh.copies.get(model, {})
        for _ in range(100):
            node = nodes[int(self.random.random() * len(nodes))]
            if not node.draining and node.slot not in held:
                self.decisions_ns.append(time.thread_time_ns() - began)
                return node.slot
        return None


class ModelMeshPolicy(Policy):
    """ModelMesh's rules, from their description (reference/mesh.md, section 5; letters and constants as there).

    Its records are those last published, for all deciders the same; nothing is reserved.
    """

    name = "modelmesh"
    #: An instance is full with less than this free: twice a default size (5.1).
    LEAST_SPACE: Final = 40_000_000

    def __init__(self, mesh: Mesh, seed: int) -> None:
        super().__init__(mesh, seed)
        self._records: Final[dict[int, tuple[Instance, int]]] = {}
        self._order: list[int] = []
        self._placed = 0

    def published(self, node: Node, record: Instance) -> None:
        """Kept with the number of its models."""
        self._records[node.slot] = (record, len(node.models))
        self._order = []

    def lost(self, node: Node) -> None:
        """It is no candidate any more."""
        self._records.pop(node.slot, None)
        self._order = []

    def place(self, model: int, now_ms: int) -> int | None:
        """The best in its order, a shortlist of those close to it, and one of these at random (5.4)."""
        began = time.thread_time_ns()
        # It sorts for each decision; here the order is kept while no record changes, and some are timed whole.
        timed = self._placed % 200 == 0
        self._placed += 1
        if timed or not self._order:
            self._order = sorted(self._records, key=self._rank)
        held = self.mesh.copies.get(model, {})
        candidates = (slot for slot in self._order if slot not in held and not self._records[slot][0].draining)
        best = next(candidates, None)
        if best is None:
            return None
        shortlist = [best, *self._close_to(best, candidates, now_ms)]
        entry = self.random.randrange(len(self.mesh.nodes))
        if entry in shortlist:
            chosen = entry
        else:
            least = min(self._records[slot][0].requests_per_minute for slot in shortlist)
            calm = [
                slot
                for slot in shortlist
                if (rate := self._records[slot][0].requests_per_minute) < 100 or rate <= 1.5 * max(100, least)
            ]
            chosen = self.random.choice(calm or shortlist)
        if timed:
            self.decisions_ns.append(time.thread_time_ns() - began)
        return chosen

    def leaves(self, node: Node, now_ms: int) -> None:
        """Its entries go first; those used within the hour are loaded elsewhere (5.10)."""
        for model in list(node.models):
            if len(self.mesh.copies[model]) > 1:
                continue
            self.mesh.drop(model, node.slot)
            if now_ms - int(self.mesh.workload.last_used_ms[model]) < 3_600_000:
                slot = self.place(model, now_ms)
                if slot is not None:
                    self.move(model, slot, now_ms)

    def every_minute(self, now_ms: int) -> None:
        """Proactive loads into half of the free space every seven minutes (4.3)."""
        if now_ms // 60_000 % 7 == 0:
            self._load_ahead(now_ms)

    def _load_ahead(self, now_ms: int) -> None:
        free = sum(max(0, record.capacity_bytes * 7 // 8 - record.used_bytes) for record, _ in self._records.values())
        size = int(self.mesh.workload.sizes.mean())
        count = min(free // 2 // size, 20_000)
        if count <= 0:
            return
        unloaded = np.flatnonzero(self.mesh.home == NOWHERE)
        last_used_ms = self.mesh.workload.last_used_ms[unloaded]
        for model in unloaded[np.argsort(-last_used_ms)[:count]].tolist():
            slot = self.place(model, now_ms)
            if slot is not None:
                self.move(model, slot, now_ms)

    def _rank(self, slot: int) -> tuple[object, ...]:
        record, models = self._records[slot]
        remaining = record.capacity_bytes - record.used_bytes
        full = remaining < self.LEAST_SPACE
        oldest_ms = record.oldest_used_ms or 0
        return (
            *(record.draining, full, oldest_ms if full else 0, models, -remaining, oldest_ms),
            *(record.loading - record.loader_threads, record.loading, record.requests_per_minute, record.id),
        )

    def _close_to(self, best: int, others: Iterable[int], now_ms: int) -> list[int]:
        record, models = self._records[best]
        remaining = record.capacity_bytes - record.used_bytes
        full = remaining < self.LEAST_SPACE
        oldest_ms = record.oldest_used_ms or now_ms
        close = []
        for slot in others:
            other, count = self._records[slot]
            left = other.capacity_bytes - other.used_bytes
            if full:
                gap_ms = (other.oldest_used_ms or now_ms) - oldest_ms
                if gap_ms > 45_000 and gap_ms > 0.1 * (now_ms - oldest_ms):
                    break
            elif left < self.LEAST_SPACE or left < remaining / 4 or (count >= 10 and count > 1.25 * models):
                break
            close.append(slot)
        return close
