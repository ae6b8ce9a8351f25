"""A server of ours in a thread with a loop of its own, for clients that block or belong to other people."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from mmcore.config import TransportSettings
from mmcore.errors import InvalidRequest, RpcError, Status
from mmcore.transport import Server, ServerCall, StreamCall

T = TypeVar("T")
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}
WITHIN_S = 20.0


class LoopThread:
    """An event loop that runs in a thread of its own until it is ended."""

    def __init__(self, loop: str) -> None:
        self.loop = LOOPS[loop]()
        self.faults: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.faults.append(context))
        self._thread = threading.Thread(target=self.loop.run_forever, name=f"{loop} of a test")
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.start(work).result(WITHIN_S)

    def call(self, function: Callable[[], T]) -> T:
        async def work() -> T:
            return function()

        return self.run(work())

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class EchoService:
    """Methods that other people's clients try; ``events`` is what they noticed, ``held`` the calls kept waiting."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.seen: list[tuple[tuple[str, str | bytes], ...]] = []
        self.held: list[ServerCall] = []
        self._noticed = threading.Condition()

    def note(self, event: str) -> None:
        with self._noticed:
            self.events.append(event)
            self._noticed.notify_all()

    def wait_for(self, event: str, count: int = 1) -> None:
        """Until the service has noted an event so often."""
        with self._noticed:
            assert self._noticed.wait_for(lambda: self.events.count(event) >= count, WITHIN_S), self.events

    def add_to(self, server: Server) -> None:
        server.add_unary("/echo.Echo/Unary", self.unary)
        server.add_unary("/echo.Echo/Fail", self.fail)
        server.add_unary("/echo.Echo/Hold", self.hold)
        server.add_unary("/echo.Echo/Size", lambda call, body: bytes(int(body)))
        server.add_unary("/echo.Echo/Compressed", self.compressed)
        server.add_stream("/echo.Echo/Bidi", self.bidi)
        server.add_stream("/echo.Echo/Count", self.count)
        server.add_stream("/echo.Echo/Sum", self.sum)
        server.add_stream("/echo.Echo/HoldStream", self.hold_stream)

    def unary(self, call: ServerCall, body: bytes) -> bytes:
        metadata = call.metadata
        self.seen.append(metadata)
        call.set_initial_metadata([("initial", "yes"), *(pair for pair in metadata if pair[0].startswith("echo-"))])
        call.set_trailers([pair for pair in metadata if pair[0].startswith("echo-")])
        return body

    def fail(self, call: ServerCall, body: bytes) -> None:
        code, _, text = body.decode().partition(" ")
        call.set_trailers([("why", "because"), ("why-bin", b"\x00\x01")])
        if code == "raise":
            raise InvalidRequest(text)
        call.fail(int(code), text)

    def hold(self, call: ServerCall, body: bytes) -> None:
        call.on_cancel = lambda: self.note("cancelled")
        self.held.append(call)
        self.note("held")

    def release(self) -> None:
        """Answer the held calls; on the loop's thread."""
        for call in self.held:
            call.reply(b"released")
        self.held.clear()

    def compressed(self, call: ServerCall, body: bytes) -> bytes:
        encoding, _, rest = body.partition(b" ")
        call.set_trailers([("used", str(call.set_compression(encoding.decode())))])
        return rest

    async def bidi(self, call: StreamCall) -> None:
        call.set_initial_metadata([("initial", "yes")])
        async for message in call:
            await call.send(message)
        call.set_trailers([("last", "word")])

    async def count(self, call: StreamCall) -> None:
        first = await anext(call)
        for number in range(int(first)):
            await call.send(b"%d" % number)
        if int(first) == 13:
            raise RpcError(Status.FAILED_PRECONDITION, "unlucky")

    async def sum(self, call: StreamCall) -> None:
        total = 0
        async for message in call:
            total += len(message)
        await call.send(b"%d" % total)

    async def hold_stream(self, call: StreamCall) -> None:
        try:
            await call.send(b"started")
            self.note("held")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.note("cancelled")
            raise


class Echoing:
    """A running echo server."""

    def __init__(self, loop: str, settings: TransportSettings) -> None:
        self.thread = LoopThread(loop)
        self.service = EchoService()
        self.server = self.thread.call(lambda: Server(settings=settings))
        self.service.add_to(self.server)
        self.target = self.thread.run(self.server.listen_tcp("127.0.0.1", 0))

    def end(self) -> None:
        try:
            self.thread.run(self.server.close())
            self.service.held.clear()
            assert self.thread.faults == []
        finally:
            self.thread.end()
