"""A gRPC client: pooled, multiplexed connections to one target."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable
from functools import partial

from mmcore._ext.h2 import Method
from mmcore._ext.h2client import ClientCall, ClientSession
from mmcore._ext.outbuf import Buffers
from mmcore.config import TransportSettings
from mmcore.errors import RpcError, Status
from mmcore.transport.connection import TICK_S, Connection, Message, Metadata, loop_buffers, require_h2
from mmcore.transport.streams import ClientStream


class ClientConnection(Connection, ClientSession, asyncio.BufferedProtocol):
    """One connection of a channel."""

    def __init__(
        self, buffers: Buffers, settings: TransportSettings, loop: asyncio.AbstractEventLoop, authority: bytes
    ) -> None:
        Connection.__init__(self, buffers, settings, loop)
        self._authority = authority
        self.lost = loop.create_future()

    def authority_name(self) -> bytes | None:
        """The target's name."""
        return self._authority

    def connection_lost(self, error: Exception | None) -> None:
        """Let the channel replace this connection."""
        super().connection_lost(error)
        if not self.lost.done():
            self.lost.set_result(None)


class Channel:
    """Calls methods of one target.

    Args:
        target: ``host:port`` or ``unix:PATH``.
        connections: how many connections are kept; calls go to the one with the fewest open.
        settings: limits and timings.
        ssl: for TLS; a function is asked anew for each connection.
        server_name: what the certificate and ``:authority`` are to say, where it is not the host.
        on_silence: called with True when the target has left a PING unanswered for a while, and with False when it has
            answered or the connection was given up.
    """

    def __init__(
        self,
        target: str,
        *,
        connections: int = 1,
        settings: TransportSettings | None = None,
        ssl: ssl.SSLContext | Callable[[], ssl.SSLContext] | None = None,
        server_name: str | None = None,
        on_silence: Callable[[bool], object] | None = None,
    ) -> None:
        self.target = target
        self._on_silence = on_silence
        self._silent = False
        self._settings = settings or TransportSettings()
        self._ssl = ssl
        self._server_name = server_name
        self._wanted = connections
        self._open: list[ClientConnection] = []
        self._methods: dict[str, Method] = {}
        self._connecting: asyncio.Task[None] | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._last_error = ""
        self._ticker: asyncio.TimerHandle | None = None
        self._closed = False

    async def connect(self) -> None:
        """Open all connections now.

        Raises:
            RpcError: UNAVAILABLE, with the system's reason, or as the channel is closed.
        """
        if self._closed:
            raise RpcError(Status.UNAVAILABLE, "the channel is closed")
        if self._usable() < self._wanted:
            await self._open_more(None)

    async def greeted(self, within_s: float) -> ClientConnection:
        """Connect, and hear from the other side itself: the kernel takes connections for a process that hangs, too.

        Raises:
            RpcError: UNAVAILABLE: it cannot be reached, says nothing in time, or closes the connection again.
        """
        await self.connect()
        connection = self.pick()
        try:
            async with asyncio.timeout(within_s):
                while (  # noqa: ASYNC110  # nobody is woken by it
                    connection is not None and not connection.settled and not connection.lost.done()
                ):
                    await asyncio.sleep(0.002)
        except TimeoutError:
            assert connection is not None
            connection.abort()
            raise RpcError(Status.UNAVAILABLE, f"{self.target} takes connections and says nothing") from None
        if connection is None or not connection.request_allowed():
            raise RpcError(Status.UNAVAILABLE, f"{self.target} closed the connection at once")
        return connection

    async def close(self) -> None:
        """Close all connections; open calls end with UNAVAILABLE."""
        self._closed = True
        if self._ticker is not None:
            self._ticker.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
            self._connecting = None
        lost = [connection.lost for connection in self._open]
        for connection in self._open:
            connection.abort()
        if lost:
            await asyncio.wait(lost)
        self._open.clear()

    async def unary(
        self,
        path: str,
        message: Message,
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
        wait_for_ready: bool = False,
        encoding: str | None = None,
    ) -> bytes:
        """Call a unary method.

        Args:
            path: ``/package.Service/Method``.
            message: the serialised request.
            timeout_s: seconds until DEADLINE_EXCEEDED; the server is told.
            wait_for_ready: keep trying to connect until the deadline instead of failing with the first attempt.
            encoding: compress the request with ``gzip`` or ``deflate``, and accept compressed answers.

        Returns:
            The serialised answer.

        Raises:
            RpcError: any status but OK. A call the server certainly did not start is sent once more before that.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        method = self._method(path)
        for last_try in (False, True):
            connection = self.pick() or await self._connected(deadline, wait_for_ready)
            done: asyncio.Future[None] = loop.create_future()
            try:
                call = connection.request(method, message, partial(_settle, done), metadata, deadline, None, encoding)
            except ConnectionError as error:
                if last_try:
                    raise RpcError(Status.UNAVAILABLE, str(error)) from error
                continue
            try:
                await done
            except asyncio.CancelledError:
                call.cancel()
                raise
            if not call.refused or last_try:
                break
        if call.status != Status.OK:
            lost = call.lost and not call.refused
            raise RpcError(Status(call.status), call.details, call.trailers, lost=lost)
        answer = call.message
        assert answer is not None
        return answer

    def start(
        self,
        path: str,
        message: Message,
        on_done: Callable[[ClientCall], object],
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
    ) -> ClientCall:
        """Start a unary call on an open connection; ``on_done`` gets it when its outcome is known. No Future is made.

        Raises:
            RpcError: UNAVAILABLE when no connection is open (see connect).
        """
        connection = self.pick()
        if connection is None:
            raise RpcError(Status.UNAVAILABLE, f"not connected to {self.target}")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return connection.request(self._method(path), message, on_done, metadata, deadline, None, None)

    async def stream(
        self,
        path: str,
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
        encoding: str | None = None,
    ) -> ClientStream:
        """Start a streaming call.

        Raises:
            RpcError: UNAVAILABLE when the target cannot be reached.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        connection = self.pick() or await self._connected(deadline, False)
        stream = ClientStream(loop)
        stream.attach(connection.request(self._method(path), None, None, metadata, deadline, stream, encoding))
        return stream

    def _method(self, path: str) -> Method:
        method = self._methods.get(path)
        if method is None:
            method = self._methods[path] = Method(path)
        return method

    def _usable(self) -> int:
        """How many connections take new calls."""
        return sum(connection.request_allowed() for connection in self._open)

    def pick(self) -> ClientConnection | None:
        """The open connection with the fewest calls, or None."""
        best: ClientConnection | None = None
        for connection in self._open:
            if connection.request_allowed() and (best is None or connection.open_streams < best.open_streams):
                best = connection
        return best

    async def _connected(self, deadline: float | None, wait_for_ready: bool) -> ClientConnection:
        """A connection to use, opened if need be."""
        while True:
            if self._closed:
                raise RpcError(Status.UNAVAILABLE, "the channel is closed")
            try:
                pause = self._retry_at - time.monotonic()
                if pause > 0:
                    if not wait_for_ready:
                        raise RpcError(Status.UNAVAILABLE, self._last_error)
                    async with asyncio.timeout_at(self._loop_time(deadline)):
                        await asyncio.sleep(pause)
                await self._open_more(deadline)
            except RpcError:
                if not wait_for_ready:
                    raise
                continue
            except TimeoutError as error:
                raise RpcError(Status.DEADLINE_EXCEEDED, "deadline exceeded while connecting") from error
            connection = self.pick()
            if connection is not None:
                return connection
            if not wait_for_ready:
                raise RpcError(Status.UNAVAILABLE, f"{self.target} closed the connection at once")
            self._retry_at = time.monotonic() + self._settings.backoff_s

    @staticmethod
    def _loop_time(deadline: float | None) -> float | None:
        if deadline is None:
            return None
        return asyncio.get_running_loop().time() + max(0.0, deadline - time.monotonic())

    async def _open_more(self, deadline: float | None) -> None:
        """Share one attempt to open the missing connections; a waiter that gives up does not end it."""
        if self._connecting is None or self._connecting.done():
            loop = asyncio.get_running_loop()
            self._connecting = loop.create_task(self._open_missing(), name=f"connect {self.target}")
        attempt = self._connecting
        async with asyncio.timeout_at(self._loop_time(deadline)):
            try:
                await asyncio.shield(attempt)
            except asyncio.CancelledError:
                if not attempt.cancelled():
                    raise
                raise RpcError(Status.UNAVAILABLE, "the channel is closed") from None

    async def _open_missing(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                # Connections that take no more calls stay until those they have are answered.
                for _ in range(self._wanted - self._usable()):
                    self._open.append(await self._open_one(loop))
        except (OSError, TimeoutError) as error:
            pause = min(self._settings.max_backoff_s, self._settings.backoff_s * 2**self._failures)
            self._failures += 1
            self._retry_at = time.monotonic() + pause * random.uniform(0.8, 1.2)  # noqa: S311  # spreads, hides nothing
            reason = str(error) or "no answer in time"
            self._last_error = f"cannot connect to {self.target}: {reason}"
            raise RpcError(Status.UNAVAILABLE, self._last_error) from error
        self._failures = 0
        if self._ticker is None:
            self._ticker = loop.call_later(TICK_S, self._tick, loop)

    async def _open_one(self, loop: asyncio.AbstractEventLoop) -> ClientConnection:
        if self.target.startswith("unix:"):
            path = self.target.removeprefix("unix:")
            authority = (self._server_name or "localhost").encode()
            _, connection = await loop.create_unix_connection(
                lambda: ClientConnection(loop_buffers(loop), self._settings, loop, authority), path
            )
            return connection
        host, _, port = self.target.rpartition(":")
        authority = (self._server_name or self.target).encode()
        tls = self._ssl() if callable(self._ssl) else self._ssl
        transport, connection = await loop.create_connection(
            lambda: ClientConnection(loop_buffers(loop), self._settings, loop, authority),
            host.strip("[]"),
            int(port),
            ssl=tls and require_h2(tls),
            server_hostname=(self._server_name or host.strip("[]")) if tls else None,
        )
        if tls and transport.get_extra_info("ssl_object").selected_alpn_protocol() != "h2":
            connection.abort()
            raise ConnectionError("the server does not offer HTTP/2 (ALPN h2)")
        return connection

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ticker = loop.call_later(TICK_S, self._tick, loop)
        now = time.monotonic()
        for connection in list(self._open):
            if connection.lost.done():
                self._open.remove(connection)
            elif not connection.request_allowed() and not connection.open_streams:
                connection.abort()  # its streams' ids are used up, or the server wants it gone
            else:
                connection.tick(now)
        silent = any(connection.owes_pong(now) for connection in self._open)
        if silent != self._silent:
            self._silent = silent
            if self._on_silence is not None:
                self._on_silence(silent)
        # Replace lost ones of several while others serve; where none is left, the next call connects.
        connecting = self._connecting is not None and not self._connecting.done()
        if 0 < self._usable() < self._wanted and not connecting and now >= self._retry_at:
            self._connecting = loop.create_task(self._open_missing(), name=f"connect {self.target}")
            self._connecting.add_done_callback(_ignore_outcome)


def _ignore_outcome(attempt: asyncio.Task[None]) -> None:
    """Nobody waits for this attempt; what went wrong is told to the next call that needs a connection."""
    if not attempt.cancelled():
        attempt.exception()


def _settle(done: asyncio.Future[None], call: ClientCall) -> None:
    if not done.done():
        done.set_result(None)
