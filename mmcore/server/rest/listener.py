"""A port that HTTP requests come to: its connections from accept to drain."""

from __future__ import annotations

import asyncio
import contextlib
import ssl as tls
import time
from collections.abc import Callable
from typing import Final

from mmcore._ext.h2server import Working
from mmcore.config import TransportSettings
from mmcore.server.rest.connection import Connection
from mmcore.server.rest.request import Request
from mmcore.transport.connection import TICK_S
from mmcore.transport.listening import address_of, listen


class Listener:
    """Serves HTTP/1.1 on one TCP address.

    Attributes:
        handle: takes each request and answers it with ``request.send``, now or later, on the loop.
        draining: whether connections end with their next answer.
        accepted: connections since the beginning.
        refused: requests that could not be read as such, or were too long.
        working: counts the requests that are being answered.
    """

    def __init__(
        self,
        handle: Callable[[Request], None],
        settings: TransportSettings | None = None,
        working: Working | None = None,
    ) -> None:
        self.handle = handle
        self.working: Final = working or Working()
        self.settings = settings or TransportSettings()
        self.draining = False
        self.accepted = 0
        self.refused = 0
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._ticker: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    @property
    def requests(self) -> int:
        """Requests being answered now."""
        return sum(connection.busy for connection in self._connections)

    async def listen_tcp(
        self, host: str, port: int, *, reuse_port: bool = False, ssl: tls.SSLContext | None = None
    ) -> str:
        """Listen; returns ``host:port`` as bound, which tells the port chosen for 0.

        Raises:
            OSError: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        self._server = await listen(lambda: Connection(self), host, port, reuse_port=reuse_port, ssl=ssl)
        self._ticker = loop.call_later(TICK_S, self._tick, loop)
        return address_of(self._server)

    async def drain(self, grace_s: float) -> None:
        """Stop accepting, let requests under way finish for up to ``grace_s`` seconds, then close everything."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._none_open.wait()
        if self._ticker is not None:
            self._ticker.cancel()
        for connection in list(self._connections):
            connection.abort()
        await self._none_open.wait()

    def joined(self, connection: Connection) -> None:
        """A connection was accepted."""
        self.accepted += 1
        self._connections.add(connection)
        self._none_open.clear()

    def left(self, connection: Connection) -> None:
        """A connection has ended."""
        self._connections.discard(connection)
        if not self._connections:
            self._none_open.set()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ticker = loop.call_later(TICK_S, self._tick, loop)
        now = time.monotonic()
        for connection in list(self._connections):
            connection.tick(now)
