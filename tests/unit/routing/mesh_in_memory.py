"""Instances of one mesh in this process: made-up models, one registry, and real connections between them."""

from __future__ import annotations

from mmcore import placement
from mmcore.registry import InstanceRecord, MemoryStore
from mmcore.routing import Forwarding, Members, Mesh
from mmcore.server.peer import add_peer_methods
from mmcore.transport import Server
from tests.unit.routing.instances_in_memory import INFO, Member


class MeshMember(Member):
    """One instance, which others can reach.

    Attributes:
        mesh: its part of the mesh; its upkeep looks when a test says so, or after ``upkeep_s``.
    """

    def __init__(self, name: str, store: MemoryStore, *, capacity_bytes: int = 2**30, upkeep_s: float = 3600.0) -> None:
        super().__init__(name, store, capacity_bytes=capacity_bytes)
        self.name = name
        self.server = Server()
        self.address = ""
        forwarding = Forwarding(name)
        members = Members(self.registry, placement.Cluster(), forwarding, self.record)
        self.mesh = Mesh(self.registry, self.router, self.registered, forwarding, members, upkeep_s=upkeep_s)
        self.registered.loads = self.mesh
        add_peer_methods(self.server, self.router)

    def record(self) -> InstanceRecord:
        cache = self.router.cache
        return InstanceRecord(
            address=self.address,
            capacity_bytes=cache.capacity_bytes,
            used_bytes=cache.used_bytes,
            fixed_bytes=cache.lru.pinned + cache.room.reserved.host,
            loading=cache.loading,
            loader_threads=cache.loader_threads,
            published_ms=self.now_ms(),
        )

    async def start(self) -> MeshMember:
        self.address = await self.server.listen_tcp("127.0.0.1", 0, internal=True)
        await super().start()
        await self.mesh.start()
        return self

    async def close(self) -> None:
        for gate in self.loader.gates.values():
            gate.set()
        await self.server.close()
        await self.mesh.close()
        await super().close()

    async def add(self, name: str, *, used_ago_ms: int = 0) -> None:
        """Register a model of 10 bytes that was used so long ago."""
        await self.registered.register(name, INFO, last_used_ms=self.now_ms() - used_ago_ms - 1)

    def holders(self, name: str) -> set[str]:
        """The instances that have a loaded copy, by this one's view."""
        record = self.registry.models.get(name)
        return {one for one, copy in record.copies.items() if copy.state == "LOADED"} if record is not None else set()
