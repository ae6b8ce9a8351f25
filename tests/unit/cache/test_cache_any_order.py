"""Whatever is loaded, leased, unloaded and replaced in any order: the sums are right and every model is closed once."""

from __future__ import annotations

import asyncio
import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.cache import Cache, Copy, CopyState
from mmcore.errors import LoadFailed, MmcoreError, NotFound, Overloaded
from mmcore.model import ModelSettings, ModelSource
from tests.unit.models_in_memory import FakeModel, FakeOrigin

CAPACITY = 100
SIZES = {"a": 10, "b": 30, "c": 45, "d": 60, "e": 90, "f": 101}

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["load", "lease", "return", "unload", "replace", "break", "mend", "drop", "turn"]),
        st.sampled_from(sorted(SIZES)),
    ),
    max_size=60,
)


class Run:
    def __init__(self, room_wait_s: float = 0.02) -> None:
        self.broken: set[str] = set()
        self.models: list[FakeModel] = []
        self.leases: list[Copy] = []
        self.waiters: list[asyncio.Future[Copy]] = []
        self.origin = FakeOrigin()
        self.cache = Cache(
            capacity_bytes=CAPACITY,
            load=self.open,
            bind=lambda model: None,  # type: ignore[arg-type,return-value]  # nothing is bound here
            room_wait_s=room_wait_s,
            residency_s=0.0,
        )

    def open(self, source: ModelSource) -> FakeModel:
        if source.name in self.broken:
            raise LoadFailed("broken")
        model = FakeModel(SIZES[source.name])
        self.models.append(model)
        return model

    def step(self, action: str, name: str) -> None:
        # The prediction is the file's size; stated, so that it is below the capacity.
        self.origin.settings = ModelSettings(size_bytes=min(SIZES[name], CAPACITY))
        copy = self.cache.lru.get((name, "1"))
        match action:
            case "load":
                self.waiters.append(self.cache.load(name, "1", self.origin))
            case "replace":
                self.waiters.append(asyncio.ensure_future(self.cache.replace(name, "1", self.origin)))
            case "lease" if isinstance(copy, Copy):
                copy.acquire()
                self.leases.append(copy)
            case "return" if self.leases:
                self.leases.pop(0).release()
            case "unload" if isinstance(copy, Copy):
                self.cache.unload(copy)
            case "break":
                self.broken.add(name)
            case "mend":
                self.broken.discard(name)
                self.cache.failures.clear(name)
            case "drop":
                self.cache.drop_loads(name, NotFound("gone"))

    def check(self) -> None:
        assert self.cache.lru.total == sum(entry.weight for entry in self.cache.lru)
        for copy in self.leases:
            assert not copy.model.closed.is_set()

    async def play(self, steps: list[tuple[str, str]]) -> None:
        for action, name in steps:
            self.step(action, name)
            if action == "turn":
                await asyncio.sleep(0.001)
            self.check()
        for outcome in await asyncio.gather(*self.waiters, return_exceptions=True):
            assert isinstance(outcome, Copy | MmcoreError), outcome
            if isinstance(outcome, Overloaded):
                assert "bytes" in str(outcome)
        while self.leases:
            self.leases.pop().release()
        await self.cache.close()
        assert all(model.closed.is_set() for model in self.models)
        assert self.cache.used_bytes == 0
        assert len(self.cache.lru) == 0


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_order_of_events_keeps_the_books(steps: list[tuple[str, str]]) -> None:
    async def run() -> None:
        await Run().play(steps)

    asyncio.run(run())


@pytest.mark.slow
async def test_objects_stay_the_same_over_many_cycles() -> None:
    run = Run(room_wait_s=30.0)
    run.origin.settings = ModelSettings(size_bytes=45)

    async def cycles(count: int) -> None:
        for number in range(count):
            copy = await run.cache.load("abc"[number % 3], "1", run.origin)
            assert copy.state is CopyState.LOADED
            run.cache.unload(copy)
            run.models.clear()

    await cycles(200)
    await asyncio.sleep(0.01)
    gc.collect()
    before = len(gc.get_objects())
    await cycles(3000)
    await asyncio.sleep(0.01)
    gc.collect()
    assert len(gc.get_objects()) < before + 200
    await run.cache.close()
