from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from mmcore._ext.rates import ModelStatistics
from mmcore.server.statistics import statistics_of


def copy(name: str) -> Any:
    counted = ModelStatistics()
    counted.record(1, 10, 20, 30, 40)
    return SimpleNamespace(name=name, version="1", statistics=counted, model=SimpleNamespace(size_bytes=7))


async def test_others_have_their_turns_while_many_models_are_told_of() -> None:
    router: Any = SimpleNamespace(copies=lambda: [copy(f"m-{number}") for number in range(2000)])
    turns = 0
    done = asyncio.Event()

    async def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    told = await statistics_of(router, "", "")
    done.set()
    await counting
    assert [one.name for one in told.model_stats] == [f"m-{number}" for number in range(2000)]
    assert told.model_stats[0].inference_stats.success.count == 1
    assert turns >= 9
