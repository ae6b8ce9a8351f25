"""Instances with made-up models over one store in memory, for the tests of registered models and vmodels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mmcore.model import ModelInfo, ModelSettings
from mmcore.registry import MemoryStore, Registry
from mmcore.routing import Loads, Names, Registered, Router, Transitions, VModels
from mmcore.routing.registered import wall_ms
from tests.unit.models_in_memory import Clock, FakeOrigin, Loader

INFO = ModelInfo("fake", "/models/m")


class CatalogOrigin(FakeOrigin):
    """The origin of registered models, with the way it finds what they are registered as."""

    def __init__(self, find: Callable[[str], ModelInfo | None]) -> None:
        super().__init__(ModelSettings(size_bytes=10))
        self.find = find


class Member:
    """One instance of several."""

    def __init__(self, name: str, store: MemoryStore, *, capacity_bytes: int = 100, loads: Loads | None = None) -> None:
        self.loader = Loader()
        self.clock = Clock()
        self.registry = Registry(store, name)
        self.router = Router(
            capacity_bytes=capacity_bytes,
            load=self.loader,
            bind=lambda model: None,  # type: ignore[arg-type,return-value]  # nothing is bound here
            clock=self.clock,
        )
        self.now_ms = wall_ms
        self.registered = Registered(
            self.registry, self.router, CatalogOrigin, loads=loads, clock_ms=lambda: self.now_ms()
        )
        self.vmodels = VModels(self.registry, self.registered)
        self.transitions = Transitions(self.registry, self.vmodels, self.registered.loads, retry_s=0.05)
        self.names = Names(self.router.table, self.registry, self.router.knows)

    async def start(self) -> Member:
        await self.registry.start()
        self.registered.start()
        self.transitions.start()
        return self

    async def close(self) -> None:
        for gate in self.loader.gates.values():
            gate.set()
        await self.transitions.close()
        await self.router.close()
        await self.registered.close()
        await self.registry.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
