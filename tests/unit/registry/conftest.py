"""Registries over each kind of store, for the tests that all of them pass."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mmcore.registry import MemoryStore
from tests.registries import MemoryBackend, Registries


@pytest.fixture(params=["memory"])
def backend(request: pytest.FixtureRequest) -> MemoryBackend:
    """A place that holds a registry, empty."""
    return MemoryBackend(MemoryStore())


@pytest.fixture
async def registries(backend: MemoryBackend) -> AsyncIterator[Registries]:
    """Instances that share the registry of ``backend``: ``await registries.open("a")``; closed after the test."""
    opened = Registries(backend)
    yield opened
    await opened.close()
