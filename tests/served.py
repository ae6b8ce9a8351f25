"""A gRPC server in the test's own loop beside a client that behaves, for tests of peers that do not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import psutil

from mmcore.config import TransportSettings
from mmcore.transport import Channel, Server, ServerCall, StreamCall
from tests.rawh2 import RawPeer


def grown_since(before: int) -> int:
    """Bytes of memory taken since; AddressSanitizer keeps what is freed, so there is no telling under it."""
    return 0 if "libasan" in os.environ.get("LD_PRELOAD", "") else psutil.Process().memory_info().rss - before


class Served:
    """A server in the test's loop, and a well-behaved client of it."""

    def __init__(self, settings: TransportSettings) -> None:
        self.server = Server(settings=settings)
        self.held: list[ServerCall] = []
        self.cancelled = 0
        self._peers: list[RawPeer] = []
        self.server.add_unary("/test.Service/Unary", lambda call, body: body)
        self.server.add_unary("/test.Service/Size", lambda call, body: bytes(int(body)))
        self.server.add_unary("/test.Service/Hold", self.hold)
        self.server.add_stream("/test.Service/Stream", self.stream)
        self.server.add_stream("/test.Service/Idle", self.idle)

    async def start(self) -> None:
        self.target = await self.server.listen_tcp("127.0.0.1", 0)
        self.good = Channel(self.target)
        await self.good.connect()

    def hold(self, call: ServerCall, body: bytes) -> None:
        self.held.append(call)

        def on_cancel() -> None:
            self.cancelled += 1

        call.on_cancel = on_cancel

    async def stream(self, call: StreamCall) -> None:
        async for message in call:
            await call.send(message)

    async def idle(self, call: StreamCall) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled += 1

    async def peer(self, **options: Any) -> RawPeer:
        self._peers.append(await RawPeer.connect(self.target, **options))
        return self._peers[-1]

    async def close(self) -> None:
        for peer in self._peers:
            await peer.close()
        await self.good.close()
        await self.server.close()
        self.held.clear()

    async def others_are_served(self) -> None:
        assert await self.good.unary("/test.Service/Unary", b"others", timeout_s=10) == b"others"

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)


Serve = Callable[..., Awaitable[Served]]
