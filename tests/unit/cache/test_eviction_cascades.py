"""Loads that come at once evict what they need and nothing more, also while some of it goes by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.unit.cache.test_cache import Fixture, settled

OLD = [f"old{number}" for number in range(18)]
NEW = [f"new{number}" for number in range(10)]


@pytest.fixture
async def full() -> AsyncIterator[Fixture]:
    """A cache that is full of 18 models."""
    made = Fixture(180)
    await made.loaded(*OLD)
    yield made
    await made.cache.close()


async def test_ten_loads_at_once_evict_the_ten_that_were_used_least_recently(full: Fixture) -> None:
    await asyncio.gather(*map(full.load, NEW))
    assert [event for event in full.events if event.startswith("-")] == [f"-{name}" for name in OLD[:10]]
    assert sorted(full.names()) == sorted(OLD[10:] + NEW)


async def test_models_that_are_unloaded_meanwhile_are_not_evicted_for_again(full: Fixture) -> None:
    copies = {copy.name: copy for copy in full.cache.lru}  # type: ignore[attr-defined]  # of loaded ones
    loads = [full.load(name) for name in NEW]
    for name in OLD[:5]:
        full.cache.unload(copies[name])
    await asyncio.gather(*loads)
    await settled(lambda: full.cache.used_bytes == 180)
    assert sorted(event for event in full.events if event.startswith("-")) == sorted(f"-{name}" for name in OLD[:10])
    assert sorted(full.names()) == sorted(OLD[10:] + NEW)
