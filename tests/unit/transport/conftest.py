"""A server that peers may treat as they like."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from mmcore._ext.h2 import live_objects
from mmcore.transport import connection as connection_module
from tests.served import Serve, Served
from tests.sessions import SETTINGS


@pytest.fixture
async def serve(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Serve]:
    """Starts a server with changed settings. Its clock ticks faster; at the end nothing of it may be left."""
    monkeypatch.setattr("mmcore.transport.server.TICK_S", 0.02)
    monkeypatch.setattr("mmcore.transport.channel.TICK_S", 0.02)
    assert connection_module.TICK_S == 1.0
    before = live_objects()
    running: list[Served] = []

    async def begin(**changes: Any) -> Served:
        served = Served(replace(SETTINGS, **changes))
        await served.start()
        running.append(served)
        return served

    yield begin
    for served in running:
        await served.others_are_served()
        await served.close()
        assert served.server.calls == 0
    running.clear()
    served = None  # type: ignore[assignment]  # else its last connection lives on
    gc.collect()
    async with asyncio.timeout(5):
        while any(count > before[kind] for kind, count in live_objects().items()):
            await asyncio.sleep(0.002)
            gc.collect()
