"""A gRPC server: methods, listeners, and connections from accept to drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from mmcore._ext.h2 import Method
from mmcore._ext.h2server import ServerCall, ServerSession, Working
from mmcore.config import TransportSettings
from mmcore.errors import MmcoreError, RpcError, Status, no_thread
from mmcore.transport.connection import TICK_S, Connection, Message, loop_buffers, require_h2
from mmcore.transport.listening import address_of, listen
from mmcore.transport.streams import StreamCall

log = logging.getLogger(__name__)

#: Calls that another instance may have open on one connection: those of all its clients.
INTERNAL_STREAMS = 2**20

#: Methods that are served without having been added and are remembered.
OTHERS_KEPT = 256
_METHOD = re.compile(rb"/[A-Za-z_][\w.]*/[A-Za-z_]\w*")

#: Answers a unary call at once with its message, or returns None and calls ``call.reply`` or ``call.fail`` later.
UnaryHandler = Callable[[ServerCall, bytes], Message | None]
#: Serves a streaming call; returning ends it with OK, raising with an error.
StreamHandler = Callable[[StreamCall], Awaitable[None]]
#: Given a path and its handler, the handler that is to take its place.
Around = Callable[[str, UnaryHandler], UnaryHandler]


def status_of(error: BaseException) -> tuple[Status, str]:
    """The status and text an exception leaves with; what nobody foresaw is INTERNAL, without its traceback."""
    if isinstance(error, MmcoreError):
        return error.status, str(error)
    if isinstance(error, RpcError):
        return error.status, error.details
    if isinstance(error, MemoryError):
        return Status.RESOURCE_EXHAUSTED, "there is no memory for this request"
    if (refused := no_thread(error)) is not None:
        return refused.status, str(refused)
    return Status.INTERNAL, f"{type(error).__name__}: {error}"


class Guard(Protocol):
    """Decides before each call whether it may be made."""

    def unary(self, path: str, handler: UnaryHandler) -> UnaryHandler:
        """``handler``, or what calls it for those who may."""

    def stream(self, path: str, handler: StreamHandler, *, each: bool = False) -> StreamHandler:
        """The same for a streaming method; ``each``: its messages are guarded one by one by who reads them."""


class ServerConnection(Connection, ServerSession, asyncio.BufferedProtocol):
    """One accepted connection."""

    def __init__(
        self,
        buffers: object,
        settings: TransportSettings,
        methods: dict[bytes, Method],
        loop: asyncio.AbstractEventLoop,
        server: Server,
        internal: bool,
    ) -> None:
        Connection.__init__(self, buffers, settings, loop)  # type: ignore[arg-type]  # typed where it is made
        self.internal = internal
        self.working = server.working
        self._server = server
        self._leaving_since: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the server's connections."""
        super().connection_made(transport)
        self._server.joined(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Leave the server's connections."""
        super().connection_lost(error)
        self._server.left(self, error)

    def handler_failed(self, call: ServerCall, error: Exception) -> None:
        """Answer a unary handler's exception."""
        status, text = status_of(error)
        if not isinstance(error, MmcoreError | RpcError):
            log.error("handler failed", exc_info=error, extra={"method": call.method})
        call.fail(status, text)

    def find_method(self, path: bytes) -> Method | None:
        """What serves a method that was not added."""
        return self._server.other(path)

    def open_stream_call(self, call: ServerCall, handler: StreamHandler) -> StreamCall:
        """Start a streaming handler in a task of its own."""
        stream = StreamCall(call, self._loop)
        self._server.start_task(stream, handler)
        return stream

    def leave(self) -> None:
        """Ask the peer to open its next calls elsewhere, and end with the last call in flight."""
        if self._leaving_since is None:
            self._leaving_since = time.monotonic()
            self.announce_shutdown()

    def on_pong(self) -> None:
        """Either keepalive, or the peer has read our first GOAWAY."""
        super().on_pong()
        if self._leaving_since is not None:
            self.refuse_new()

    def tick(self, now: float) -> str | None:
        """Age, and what every connection is checked for."""
        settings = self._settings
        if self._leaving_since is not None:
            if settings.max_connection_age_s and now - self._leaving_since > settings.max_connection_age_grace_s:
                self.abort()
                return "too old"
        elif settings.max_connection_age_s and now - self._made_at > settings.max_connection_age_s:
            self.leave()
        return super().tick(now)


#: Ends of connections that are errors: the peer broke the protocol, was gone or stuck, or the network failed.
CONNECTION_ERRORS: Final = ("protocol", "stalled", "lost")


class Server:
    """Serves methods on any number of TCP and Unix listeners of one event loop; ``guard`` stands before all of them.

    Attributes:
        accepted: connections since the beginning.
        working: counts the calls that are being answered; those of other protocols may be added to it.
        errors: those that ended with an error, by :data:`CONNECTION_ERRORS`.
    """

    def __init__(self, *, settings: TransportSettings | None = None, guard: Guard | None = None) -> None:
        self._guard = guard
        self._settings = settings or TransportSettings()
        self._internal_settings = replace(self._settings, max_concurrent_streams=INTERNAL_STREAMS)
        self._methods: dict[bytes, Method] = {}
        self._unary: dict[str, Method] = {}
        self._around: Around | None = None
        self._bare: dict[str, UnaryHandler] = {}
        self._listeners: list[asyncio.Server] = []
        self._unix_paths: list[Path] = []
        self._connections: set[ServerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.TimerHandle | None = None
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._draining = self._closed = False
        self._serve_others: StreamHandler | None = None
        #: Methods that were not added, those called last.
        self._others: OrderedDict[bytes, Method] = OrderedDict()
        self.accepted = 0
        self.working = Working()
        self.errors = dict.fromkeys(CONNECTION_ERRORS, 0)
        self._received = self._sent = 0

    @property
    def received_bytes(self) -> int:
        """Received since the beginning."""
        return self._received + sum(connection.bytes_received for connection in self._connections)

    @property
    def sent_bytes(self) -> int:
        """Sent since the beginning."""
        return self._sent + sum(connection.bytes_sent for connection in self._connections)

    @property
    def methods(self) -> list[Method]:
        """What is served, with its counters."""
        return list(self._methods.values())

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    @property
    def calls(self) -> int:
        """Calls open now."""
        return sum(connection.open_streams for connection in self._connections)

    def add_unary(self, path: str, handler: UnaryHandler) -> None:
        """Serve a unary method, ``/package.Service/Method``; see UnaryHandler."""
        if self._guard is not None:
            handler = self._guard.unary(path, handler)
        self._bare[path] = handler
        self._unary[path] = method = Method(path, self._surrounded(path), False)
        self._add(method)

    def unary(self, path: str) -> Callable[[Any, bytes], Message | None]:
        """The handler of a unary method, for calls that come in another way and answer as a ServerCall does.

        Raises:
            KeyError: there is no such method.
        """
        handler = self._unary[path].handler
        assert handler is not None
        return handler

    def surround(self, around: Around | None) -> None:
        """Have unary calls answered by what ``around(path, handler)`` returns from now on; None: by the handlers alone.

        What is not surrounded costs nothing.
        """
        self._around = around
        for path, method in self._unary.items():
            method.handler = self._surrounded(path)

    def _surrounded(self, path: str) -> UnaryHandler:
        handler = self._bare[path]
        return handler if self._around is None else self._around(path, handler)

    def add_stream(self, path: str, handler: StreamHandler, *, each: bool = False) -> None:
        """Serve a method that streams either way or both; see StreamHandler, and Guard for ``each``."""
        if self._guard is not None:
            handler = self._guard.stream(path, handler, each=each)
        self._add(Method(path, handler, True))

    def serve_others(self, handler: StreamHandler) -> None:
        """Serve all methods that are not added as streams either way, which a unary call is one kind of."""
        self._serve_others = handler if self._guard is None else self._guard.stream("", handler)

    def other(self, path: bytes) -> Method | None:
        """A method that was not added, where others are served."""
        found = self._others.get(path)
        if found is None and self._serve_others is not None and _METHOD.fullmatch(path):
            found = self._others[path] = Method(path.decode("ascii"), self._serve_others, True)
            if len(self._others) > OTHERS_KEPT:
                self._others.popitem(last=False)
        return found

    def _add(self, method: Method) -> None:
        raw = method.path.encode()
        if raw in self._methods:
            raise ValueError(f"{method.path} is served already")
        self._methods[raw] = method

    def _protocol(self, internal: bool) -> ServerConnection:
        loop = asyncio.get_running_loop()
        settings = self._internal_settings if internal else self._settings
        return ServerConnection(loop_buffers(loop), settings, self._methods, loop, self, internal)

    async def listen_tcp(
        self,
        host: str,
        port: int,
        *,
        reuse_port: bool = False,
        ssl: ssl.SSLContext | None = None,
        internal: bool = False,
    ) -> str:
        """Listen on a TCP address; returns ``host:port`` as bound, which tells the port chosen for 0.

        ``internal``: for other instances alone, whose calls may carry metadata of their own and come from many clients.

        Raises:
            OSError: the address cannot be bound.
        """
        listener = await listen(
            partial(self._protocol, internal), host, port, reuse_port=reuse_port, ssl=ssl and require_h2(ssl)
        )
        self._listeners.append(listener)
        self._start_ticker(asyncio.get_running_loop())
        return address_of(listener)

    async def listen_unix(self, path: str, *, internal: bool = False) -> str:
        """Listen on a Unix socket, in place of a stale one; returns ``unix:PATH``. ``internal``: as for TCP.

        Raises:
            OSError: the path cannot be bound.
        """
        loop = asyncio.get_running_loop()
        listener = await loop.create_unix_server(partial(self._protocol, internal), path, backlog=4096)
        self._listeners.append(listener)
        self._unix_paths.append(Path(path))
        self._start_ticker(loop)
        return f"unix:{path}"

    def _start_ticker(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._ticker is None:
            self._ticker = loop.call_later(TICK_S, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ticker = loop.call_later(TICK_S, self._tick, loop)
        now = time.monotonic()
        for connection in list(self._connections):
            connection.tick(now)

    def joined(self, connection: ServerConnection) -> None:
        """A connection was accepted."""
        self._connections.add(connection)
        self._none_open.clear()
        self.accepted += 1
        # The loop may hand over connections that were accepted before the listeners closed.
        if self._closed:
            connection.abort()
        elif self._draining:
            connection.leave()

    def left(self, connection: ServerConnection, error: Exception | None) -> None:
        """A connection has ended."""
        self._connections.discard(connection)
        self._received += connection.bytes_received
        self._sent += connection.bytes_sent
        if connection.broken:
            self.errors["protocol"] += 1
        elif connection.dropped:
            self.errors["stalled"] += 1
        elif error is not None:
            self.errors["lost"] += 1
        if not self._connections:
            self._none_open.set()

    def start_task(self, stream: StreamCall, handler: StreamHandler) -> None:
        """Run a streaming handler until it ends or its call does."""
        task = asyncio.get_running_loop().create_task(_serve_stream(stream, handler), name=stream.method)
        stream.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, grace_s: float) -> None:
        """Stop accepting, let calls in flight finish for up to ``grace_s`` seconds, then close everything."""
        self._draining = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._none_open.wait()
        await self.close()

    async def close(self) -> None:
        """Close listeners and connections now; calls in flight end with UNAVAILABLE at their clients."""
        self._closed = True
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for path in self._unix_paths:
            path.unlink(missing_ok=True)
        self._unix_paths.clear()
        for connection in list(self._connections):
            connection.abort()
        await self._none_open.wait()
        if self._tasks:
            await asyncio.wait(self._tasks)


async def _serve_stream(stream: StreamCall, handler: StreamHandler) -> None:
    try:
        await handler(stream)
    except asyncio.CancelledError:
        # Cancelled because the call is over: nobody waits for an answer.
        if not stream.cancelled:
            stream.fail(Status.UNAVAILABLE, "the server stopped the call")
            raise
    except Exception as error:
        status, text = status_of(error)
        if not isinstance(error, MmcoreError | RpcError):
            log.error("streaming handler failed", exc_info=error, extra={"method": stream.method})
        stream.fail(status, text)
    else:
        stream.end()
