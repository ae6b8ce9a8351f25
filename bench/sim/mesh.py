"""The mesh that decisions act upon: instances that load, evict, leave and die, without any decision of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.sim.workload import Workload
from mmcore.placement import Instance

LOADER_THREADS: Final = 4
#: A load takes a second, and the files come at this many bytes each ms.
LOAD_MS: Final = 1000
BYTES_PER_MS: Final = 100_000
ZONES: Final = 4
#: In ``home``: a model without a copy, and one with several.
NOWHERE: Final = -1
SEVERAL: Final = -2


class Node:
    """One instance. ``slot`` is its number as long as the run lasts; each start there gets a new name."""

    __slots__ = (
        *("capacity", "draining", "heap", "loads", "models", "name", "rate", "slot", "started_ms", "threads", "up"),
        *("used", "version", "zone"),
    )

    def __init__(self, slot: int, capacity: int) -> None:
        self.slot: Final = slot
        self.capacity: Final = capacity
        self.zone: Final = f"zone-{slot % ZONES}"
        self.name = ""
        self.version = "1"
        self.start(0)

    def start(self, now_ms: int) -> None:
        """Begin anew, with nothing."""
        self.name = f"node-{self.slot}-{now_ms}"
        self.started_ms = now_ms
        self.up = True
        self.draining = False
        self.used = 0
        self.rate = 0.0
        self.models: dict[int, None] = {}
        #: (last use when it was pushed, model): put right when it comes to the top.
        self.heap: list[tuple[int, int]] = []
        #: (done at ms, size) of loads that were begun.
        self.loads: list[tuple[int, int]] = []
        #: When each loader thread is free.
        self.threads = [0] * LOADER_THREADS


class Mesh:
    """Nodes by slot and copies by model: {slot: since ms}.

    Attributes:
        home: for each model NOWHERE, SEVERAL or the slot of its only copy.
        several: the models with more than one copy.
        moves: the loads that nobody waited for.
        now_ms: virtual time.
        evicted: called with a model, a slot whose copy of it had to go for another, and since when (ms) it was there.
    """

    def __init__(self, workload: Workload, nodes: int, capacity: int) -> None:
        self.workload: Final = workload
        self.nodes: Final = [Node(slot, capacity) for slot in range(nodes)]
        self.copies: Final[dict[int, dict[int, int]]] = {}
        self.home: NDArray[np.int32] = np.full(len(workload.rates), NOWHERE, np.int32)
        self.several: Final[dict[int, None]] = {}
        self.evicted: Callable[[int, int, int], None] = lambda model, slot, since_ms: None
        self.moves = 0
        self.now_ms = 0
        self._sizes: Final[list[int]] = workload.sizes.tolist()

    @property
    def up(self) -> Iterator[Node]:
        """The nodes that answer."""
        return (node for node in self.nodes if node.up)

    def load(self, model: int, slot: int, now_ms: int) -> int:
        """Load a copy, whatever must be evicted for it; how long that takes with its wait for a thread, in ms."""
        node = self.nodes[slot]
        held = self.copies.setdefault(model, {})
        if slot in held or not node.up:
            return 0
        size = self._sizes[model]
        node.models[model] = None
        held[slot] = now_ms
        node.used += size
        self._note(model, held)
        self._make_room(node, model)
        heappush(node.heap, (now_ms, model))
        begins_ms = max(now_ms, node.threads[0])
        done_ms = begins_ms + LOAD_MS + size // BYTES_PER_MS
        heapreplace(node.threads, done_ms)
        node.loads.append((done_ms, size))
        return done_ms - now_ms

    def drop(self, model: int, slot: int) -> None:
        """Give a copy up."""
        node = self.nodes[slot]
        held = self.copies.get(model)
        if held is None or held.pop(slot, None) is None:
            return
        node.models.pop(model, None)
        node.used -= self._sizes[model]
        if not held:
            del self.copies[model]
        self._note(model, held)

    def stop(self, slot: int) -> None:
        """A node ends with all its copies."""
        node = self.nodes[slot]
        for model in list(node.models):
            self.drop(model, slot)
        node.up = False

    def oldest_used_ms(self, node: Node) -> int | None:
        """The last use of what a node would evict first."""
        last_used_ms = self.workload.last_used_ms
        heap = node.heap
        while heap:
            known_ms, model = heap[0]
            if model not in node.models:
                heappop(heap)
            elif (used_ms := int(last_used_ms[model])) > known_ms:
                heapreplace(heap, (used_ms, model))
            else:
                return known_ms
        return None

    def record(self, node: Node, now_ms: int) -> Instance:
        """What a node would publish now."""
        node.loads = [load for load in node.loads if load[0] > now_ms]
        return Instance(
            node.name,
            node.capacity,
            used_bytes=node.used,
            fixed_bytes=sum(size for _, size in node.loads),
            oldest_used_ms=self.oldest_used_ms(node),
            loading=len(node.loads),
            loader_threads=LOADER_THREADS,
            zone=node.zone,
            version=node.version,
            started_ms=node.started_ms,
            draining=node.draining,
            requests_per_minute=node.rate,
            published_ms=now_ms,
        )

    def settle(self) -> None:
        """After the first fill: order by the true last uses, not by those of loading."""
        for node in self.nodes:
            node.loads.clear()
            node.threads = [0] * LOADER_THREADS
            node.heap = [(int(self.workload.last_used_ms[model]), model) for model in node.models]
            heapify(node.heap)

    def _make_room(self, node: Node, coming: int) -> None:
        while node.used > node.capacity and self.oldest_used_ms(node) is not None:
            _, victim = heappop(node.heap)
            if victim != coming:
                since_ms = self.copies[victim][node.slot]
                self.drop(victim, node.slot)
                self.evicted(victim, node.slot, since_ms)

    def _note(self, model: int, held: dict[int, int]) -> None:
        if len(held) > 1:
            self.home[model] = SEVERAL
            self.several[model] = None
        else:
            self.home[model] = next(iter(held), NOWHERE)
            self.several.pop(model, None)
