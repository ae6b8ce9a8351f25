"""Registries over each kind of store, for the tests that all of them pass."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from mmcore.registry import MemoryStore
from tests.etcds import Etcd
from tests.registries import Backend, EtcdBackend, MemoryBackend, Registries, SqliteBackend


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Etcd]]:
    """Running servers by version, each used by many tests, under prefixes of their own."""
    running: dict[str, Etcd] = {}

    def get(version: str) -> Etcd:
        if version not in running:
            running[version] = Etcd(tmp_path_factory.mktemp("etcd") / "data", version).start()
        return running[version]

    yield get
    for etcd in running.values():
        etcd.kill()


@pytest.fixture(
    params=[
        "memory",
        "sqlite",
        pytest.param("etcd 3.4", marks=pytest.mark.slow),
        pytest.param("etcd 3.5", marks=pytest.mark.slow),
    ]
)
def backend(request: pytest.FixtureRequest, shared_etcd: Callable[[str], Etcd], tmp_path: Path) -> Backend:
    """A place that holds a registry, empty."""
    kind, _, version = request.param.partition(" ")
    if kind == "etcd":
        return EtcdBackend(f"etcd://{shared_etcd(version).endpoint}/{request.node.name}")
    if kind == "sqlite":
        return SqliteBackend(tmp_path / "registry.db")
    return MemoryBackend(MemoryStore())


@pytest.fixture
async def registries(backend: Backend) -> AsyncIterator[Registries]:
    """Instances that share the registry of ``backend``: ``await registries.open("a")``; closed after the test."""
    opened = Registries(backend)
    yield opened
    await opened.close()
