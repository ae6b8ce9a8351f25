"""Instances of one mesh in this process: made-up models, one registry, and real connections between them."""

from __future__ import annotations

from dataclasses import replace

from mmcore import placement
from mmcore.registry import CopyRecord, InstanceRecord, MemoryStore, ModelRecord
from mmcore.routing import Forwarding, Members, Mesh
from mmcore.server.peer import add_peer_methods
from mmcore.transport import Server
from tests.unit.routing.instances_in_memory import INFO, Member, until


class MeshMember(Member):
    """One instance, which others can reach.

    Attributes:
        mesh: its part of the mesh; its upkeep looks when a test says so, or after ``upkeep_s``, its filling after
            ``settle_s``.
    """

    def __init__(
        self,
        name: str,
        store: MemoryStore,
        *,
        capacity_bytes: int = 2**30,
        upkeep_s: float = 3600.0,
        settle_s: float = 3600.0,
    ) -> None:
        super().__init__(name, store, capacity_bytes=capacity_bytes)
        self.name = name
        self.server = Server()
        self.address = ""
        self.draining = False
        forwarding = Forwarding(name)
        members = Members(self.registry, placement.Cluster(), forwarding, self.record)
        self.mesh = Mesh(
            self.registry, self.router, self.registered, forwarding, members,
            upkeep_s=upkeep_s, settle_s=settle_s, clock_ms=lambda: self.now_ms(),
        )  # fmt: skip
        self.registered.loads = self.mesh
        add_peer_methods(self.server, self.router, self.registered)

    def record(self) -> InstanceRecord:
        cache = self.router.cache
        return InstanceRecord(
            address=self.address,
            capacity_bytes=cache.capacity_bytes,
            used_bytes=cache.used_bytes,
            fixed_bytes=cache.lru.pinned + cache.room.reserved.host,
            loading=cache.loading,
            loader_threads=cache.loader_threads,
            draining=self.draining,
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

    info = INFO

    def with_copies(self, record: ModelRecord, copies: dict[str, CopyRecord]) -> ModelRecord:
        """A model's record as instances that have those copies would have left it."""
        return replace(record, copies=copies)

    def holders(self, name: str) -> set[str]:
        """The instances that have a loaded copy, by this one's view."""
        record = self.registry.models.get(name)
        return {one for one, copy in record.copies.items() if copy.state == "LOADED"} if record is not None else set()


class Meshes:
    """Starts instances over one store, and closes what was not closed."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.members: list[MeshMember] = []
        self.settle_s = 3600.0

    async def __call__(self, name: str, *, capacity_bytes: int = 2**30) -> MeshMember:
        member = MeshMember(name, self.store, capacity_bytes=capacity_bytes, settle_s=self.settle_s)
        await member.start()
        self.members.append(member)
        await until(lambda: all(len(one.mesh.members.cluster) == len(self.members) for one in self.members))
        return member

    async def end(self, member: MeshMember) -> None:
        """One leaves, without a word to the others but the end of its lease."""
        self.members.remove(member)
        await member.close()

    async def close(self) -> None:
        """All that are left leave."""
        for member in self.members:
            await member.close()
