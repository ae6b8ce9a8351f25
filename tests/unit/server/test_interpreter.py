"""Full collections pass over what has been there for long, and find what unloaded models have left behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mmcore.cache import Cache
from mmcore.model import ModelSource
from mmcore.server.interpreter import Collections
from tests.unit.models_in_memory import FakeModel, FakeOrigin


class Cyclic(FakeModel):
    """A model that the collector alone can free."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.itself = self


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    def load(source: ModelSource) -> Cyclic:
        return Cyclic()

    made = Cache(capacity_bytes=2**30, load=load)
    collections = Collections(made)
    gc.collect()
    collections.start()
    yield made
    collections.stop()
    await made.close()
    assert gc.get_freeze_count() == 0


async def test_what_has_survived_a_full_collection_is_passed_over(cache: Cache) -> None:
    kept = [[number] for number in range(1000)]
    gc.collect()
    assert gc.get_freeze_count() > len(kept)
    # Nothing but what is new is gone through.
    assert len(gc.get_objects()) < 1000


async def test_a_model_in_cycles_is_freed_after_it_has_been_unloaded(cache: Cache) -> None:
    copies = [await cache.load(f"m{number}", "1", FakeOrigin()) for number in range(20)]
    freed = asyncio.Event()
    weakref.finalize(copies[0].model, asyncio.get_running_loop().call_soon_threadsafe, freed.set)
    gc.collect()
    for copy in copies[:3]:
        cache.unload(copy)
    del copy, copies
    async with asyncio.timeout(10):
        while not freed.is_set():
            await asyncio.sleep(0.001)  # until it is closed, in a thread
            gc.collect()


async def test_other_garbage_is_found_in_the_end(cache: Cache) -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    found = weakref.finalize(holder := type("Holder", (), {"cyclic": cyclic})(), lambda: None)
    holder.itself = holder
    gc.collect()
    del holder, cyclic
    for _ in range(100):
        gc.collect()
    assert not found.alive
