"""mmcore's own decisions in the simulation: the functions of mmcore.placement on views that are late."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Final

import numpy as np

from bench.sim.mesh import NOWHERE, Mesh, Node
from bench.sim.policies import Policy
from mmcore.placement import (
    DEFAULT_POLICY,
    Cluster,
    Copy,
    Demand,
    Drop,
    Instance,
    Load,
    Model,
    Move,
    NoPlace,
    Traffic,
    choose,
    drain,
    evicted,
    fill,
    place,
    relieve,
    scale,
)

#: Deciders with a view of their own. What one reserves all learn from the model's record, so many decisions later.
VIEWS: Final = 3
LATE: Final = 20
#: Time of service that in-flight requests are counted with, in ms.
SERVICE_MS: Final = 10.0
#: Traffic flows in so many steps, and what is reported in flight follows it by this share (peers tell with answers).
STEPS: Final = 24
FOLLOWING: Final = 0.15
#: Models that were used last, without a copy, that filling looks at in a minute.
LOOKED_AT: Final = 20_000


class OwnPolicy(Policy):
    """Every decision is made on one of some views; records of instances reach all of them alike."""

    name = "summary"

    def __init__(self, mesh: Mesh, seed: int) -> None:
        super().__init__(mesh, seed)
        self.views: Final = [Cluster() for _ in range(VIEWS)]
        self._late: Final[deque[tuple[str, str, int, int]]] = deque()
        self._slots: Final[dict[str, int]] = {}
        self._moves: Final[list[Load | Move | Drop]] = []
        mesh.evicted = self._evicted

    def place(self, model: int, now_ms: int) -> int | None:
        """As the instance that the request entered decides."""
        decider = int(self.random.random() * VIEWS)
        wanted = self.model(model)
        began = time.thread_time_ns()
        try:
            name = place(self.views[decider], wanted, now_ms)
        except NoPlace:
            return None
        finally:
            self.decisions_ns.append(time.thread_time_ns() - began)
        self._tell(decider, name, wanted, now_ms)
        return self._slots[name]

    def published(self, node: Node, record: Instance) -> None:
        """All views take it."""
        self._slots[node.name] = node.slot
        for view in self.views:
            view.put(record)

    def lost(self, node: Node) -> None:
        """All views forget it."""
        for view in self.views:
            view.remove(node.name)

    def leaves(self, node: Node, now_ms: int) -> None:
        """Its models are handed over; until it stops, its copies answer."""
        view = self.views[node.slot % VIEWS]
        view.put(self.mesh.record(node, now_ms))
        self._act(drain(view, node.name, [self.model(model) for model in node.models], now_ms), now_ms)

    def every_tick(self, now_ms: int) -> None:
        """Each busy model's decider looks whether its copies are enough."""
        for view in self.views:
            view.expire(now_ms)
        rates = self.mesh.workload.rates
        pool = self.views[0].pool("")
        enough = max(DEFAULT_POLICY.least_requests_per_minute, DEFAULT_POLICY.share * pool.mean_rate)
        for model in np.flatnonzero(rates > enough).tolist():
            held = self.mesh.copies.get(model, {})
            if held and rates[model] > enough * len(held):
                self._act(scale(self.views[model % VIEWS], self.model(model), now_ms), now_ms)

    def every_minute(self, now_ms: int) -> None:
        """The others' deciders look too, each hot instance at its models, the leader at the instances with room."""
        for model in list(self.mesh.several):
            self._act(scale(self.views[model % VIEWS], self.model(model), now_ms), now_ms)
        rates = self.mesh.workload.rates
        mean = sum(node.rate for node in self.mesh.up) / max(1, sum(1 for _ in self.mesh.up))
        used = sum(node.used for node in self.mesh.up) / max(1, sum(node.capacity for node in self.mesh.up))
        for node in list(self.mesh.up):
            if not node.draining and (node.rate > 1.1 * mean or node.used > (used + 0.08) * node.capacity):
                busiest = sorted(node.models, key=rates.__getitem__, reverse=True)[:50]
                models = [self.model(model) for model in busiest]
                self._act(relieve(self.views[node.slot % VIEWS], node.name, models, now_ms), now_ms)
        self._fill(now_ms)

    def split(self, several: Iterable[int], rates: np.ndarray) -> None:
        """Requests choose one of two copies, by reports of what each instance had in flight a while ago."""
        mesh = self.mesh
        traffic = Traffic()
        several = list(several)
        names = {node.slot: node.name for node in mesh.nodes}
        copies = [(str(model), tuple(names[slot] for slot in mesh.copies[model])) for model in several]
        shares = [float(mesh.workload.rates[model]) / len(mesh.copies[model]) / STEPS for model in several]
        fixed = rates.copy()
        known = np.array([node.rate for node in mesh.nodes])
        for _ in range(STEPS):
            for slot, in_flight in enumerate((known * SERVICE_MS).astype(int).tolist()):
                traffic.reported(names[slot], in_flight)
            sent = np.zeros(len(rates))
            for (model, holders), share in zip(copies, shares, strict=True):
                for _ in holders:
                    chosen = choose(model, holders, traffic, 0, self.random)
                    assert chosen is not None
                    sent[self._slots[chosen]] += share
            rates += sent
            known += (fixed + sent * STEPS - known) * FOLLOWING

    def model(self, model: int) -> Model:
        """What the records say of a model."""
        workload = self.mesh.workload
        names = self.mesh.nodes
        rate = float(workload.rates[model])
        return Model(
            str(model),
            size_bytes=int(workload.sizes[model]),
            copies={
                names[slot].name: Copy(since_ms=since_ms) for slot, since_ms in self.mesh.copies.get(model, {}).items()
            },
            last_used_ms=int(workload.last_used_ms[model]),
            demand=Demand(requests_per_minute=rate, in_flight=rate * SERVICE_MS / 60_000),
        )

    def apply(self, now_ms: int, published: int = 0) -> None:
        """Carry out what was decided while something else was being done.

        ``published`` is 1 where records of this moment have been published before: they do not count what begins now.
        """
        since_ms = now_ms + published
        while self._moves:
            action = self._moves.pop()
            slot = self._slots[action.instance]
            if isinstance(action, Drop):
                if len(self.mesh.copies.get(int(action.model), ())) > 1:
                    self.mesh.drop(int(action.model), slot)
                continue
            size_bytes = int(self.mesh.workload.sizes[int(action.model)])
            self._late.append((action.instance, action.model, size_bytes, since_ms))
            self._learn(now_ms)
            self.move(int(action.model), slot, now_ms)
            if isinstance(action, Move) and action.reason != "drain":
                self.mesh.drop(int(action.model), self._slots[action.source])

    def _act(self, actions: Iterable[Load | Move | Drop], now_ms: int) -> None:
        self._moves.extend(actions)
        self.apply(now_ms, published=1)

    def _evicted(self, model: int, slot: int, since_ms: int) -> None:
        """In the middle of another load: acted upon when that is done."""
        node = self.mesh.nodes[slot]
        load = evicted(self.views[slot % VIEWS], self.model(model), node.name, since_ms, self.mesh.now_ms)
        if load is not None:
            self._moves.append(load)

    def _fill(self, now_ms: int) -> None:
        view = self.views[0]
        if not any(member.free_bytes * member.inverse > 0.1 for member in view):
            return
        unloaded = np.flatnonzero(self.mesh.home == NOWHERE)
        last_used_ms = self.mesh.workload.last_used_ms[unloaded]
        count = min(LOOKED_AT, len(unloaded))
        latest = np.argpartition(-last_used_ms, count - 1)[:count]
        latest = latest[np.argsort(-last_used_ms[latest])]
        models = (self.model(model) for model in unloaded[latest].tolist())
        self._act(fill(view, models, now_ms, most=LOOKED_AT), now_ms)

    def _tell(self, decider: int, name: str, model: Model, now_ms: int) -> None:
        self.views[decider].reserve(
            name, model.id, model.size_bytes, now_ms, requests_per_minute=model.demand.requests_per_minute
        )
        self._late.append((name, model.id, model.size_bytes, now_ms))
        self._learn(now_ms)

    def _learn(self, now_ms: int) -> None:
        """The records of models changed some decisions ago arrive at all views."""
        while len(self._late) > LATE:
            name, model_id, size_bytes, since_ms = self._late.popleft()
            for view in self.views:
                view.started(name, model_id, size_bytes, since_ms, now_ms)
