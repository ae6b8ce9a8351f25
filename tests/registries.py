"""Registries for tests: several instances in one process over one store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mmcore.registry import MemoryStore, Registry
from mmcore.registry.etcd import etcd_store
from mmcore.registry.sqlite import SqliteStore
from mmcore.registry.store import Store


class Backend(Protocol):
    """A place that holds a registry."""

    def store(self) -> Store:
        """An instance's own way to it."""


class MemoryBackend:
    """A store in this process, shared by all instances."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def store(self) -> Store:
        return self._store


class SqliteBackend:
    """A file; every instance has its own connections to it, as if in a process of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def store(self) -> Store:
        return SqliteStore(self.path)


class EtcdBackend:
    """An etcd; every instance has a connection of its own to it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def store(self) -> Store:
        return etcd_store(self.url)


class Registries:
    """The registries of several instances, all over one backend; closed in the end."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._open: list[Registry] = []

    async def open(self, instance: str, *, lease_s: float = 10.0) -> Registry:
        """A registry that has started."""
        registry = Registry(self.backend.store(), instance, lease_s=lease_s)
        await registry.start()
        self._open.append(registry)
        return registry

    async def close(self) -> None:
        for registry in self._open:
            await registry.close()


async def until(condition: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    """Return when ``condition`` holds; it is looked at every few milliseconds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)
