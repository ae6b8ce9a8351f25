"""Streaming calls as their handlers and callers see them: async iteration in, awaited sends out."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Self

from mmcore._ext.forward import pass_stream
from mmcore._ext.h2client import ClientCall, ClientSession
from mmcore._ext.h2server import ServerCall
from mmcore._ext.onward import pass_head, pass_trailers
from mmcore._ext.passing import Target, pass_stream_to
from mmcore.errors import RpcError, Status
from mmcore.transport.connection import Message, Metadata

#: A sender waits once so many bytes of its call have not left; it goes on when few are left.
HIGH_WATER_BYTES = 1024 * 1024


class MessageStream:
    """Messages of one call, taken in order; its methods ``on_…`` are called by the session."""

    _call: ServerCall | ClientCall

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: deque[bytes] = deque()
        self._ended = False
        self._over = False
        self._error: RpcError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    def on_message(self, message: bytes) -> None:
        """A whole message came."""
        self._messages.append(message)
        self._wake_reader()

    def on_end(self) -> None:
        """The peer will send no more."""
        self._ended = True
        self._wake_reader()

    def on_writable(self) -> None:
        """Few bytes wait to leave."""
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._reader = self._loop.create_future()
            await self._reader
        message = self._messages.popleft()
        self._call.taken(len(message))
        return message

    async def send(self, message: Message) -> None:
        """Queue one message; waits while more than a megabyte of this call has not left."""
        self._call.send(message)
        while self._call.unsent > HIGH_WATER_BYTES and not self._over and not self._call.cancelled:
            self._writer = self._loop.create_future()
            self._call.notify_writable()
            await self._writer


class StreamCall(MessageStream):
    """A streaming call on the server's side."""

    _call: ServerCall

    def __init__(self, call: ServerCall, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._call = call
        self._ended_early = False
        self.task: asyncio.Task[None] | None = None

    @property
    def method(self) -> str:
        """Path of the method called."""
        return self._call.method

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The request's metadata."""
        return self._call.metadata

    @property
    def deadline(self) -> float | None:
        """Monotonic seconds; None for no deadline."""
        return self._call.deadline

    @property
    def cancelled(self) -> bool:
        """Whether the call has ended, whoever ended it."""
        return self._ended_early or self._call.cancelled

    @property
    def peer(self) -> str:
        """Address of the client."""
        return self._call.peer

    def set_initial_metadata(self, metadata: Metadata) -> None:
        """Metadata sent before the first message."""
        self._call.set_initial_metadata(metadata)

    def set_trailers(self, metadata: Metadata) -> None:
        """Metadata sent with the status."""
        self._call.set_trailers(metadata)

    def set_compression(self, encoding: str) -> bool:
        """Compress answers if the client accepts the encoding; whether it does."""
        return self._call.set_compression(encoding)

    def pass_on(self, session: ClientSession, headers: list[tuple[bytes, bytes]]) -> ClientStream:
        """Start a call like this one elsewhere, with encoded metadata before its own.

        Raises:
            ConnectionError: the session takes no new call, or this one is over.
            ValueError: it has more metadata than can be sent.
        """
        stream = ClientStream(self._loop)
        stream.attach(pass_stream(self._call, session, headers, stream))
        return stream

    def pass_through(
        self, session: ClientSession, target: Target, path: str, context: list[tuple[bytes, bytes]] | None = None
    ) -> ClientStream:
        """Start a call like this one at a runtime, with this trace context if not None; raises as :meth:`pass_on`."""
        stream = ClientStream(self._loop)
        stream.attach(pass_stream_to(self._call, session, target, path, stream, context))
        return stream

    def begin_like(self, stream: ClientStream) -> None:
        """Answer with the metadata and the compression of that stream's answer; before the first message."""
        pass_head(self._call, stream.call)

    def end_like(self, stream: ClientStream) -> None:
        """Have the call end with the trailers of that stream, which has ended."""
        self.begin_like(stream)
        pass_trailers(self._call, stream.call)

    def fail(self, status: Status, details: str) -> None:
        """End the call with an error."""
        self._call.fail(status, details)

    def end(self) -> None:
        """End the call with OK."""
        self._call.end()

    def on_error(self, status: int, details: str) -> None:
        """What came cannot be taken; the handler hears of it where it waits for the next message."""
        self._error = RpcError(Status(status), details)
        self._wake_reader()

    def on_close(self) -> None:
        """The client is gone or the deadline passed: the work stops."""
        self._ended_early = self._over = True
        if self.task is not None:
            self.task.cancel()


class ClientStream(MessageStream):
    """A streaming call on the client's side: ``send``, ``end``, and iteration over the answers.

    Iteration ends with the call; it raises :class:`RpcError` when the status is not OK.
    """

    _call: ClientCall

    def attach(self, call: ClientCall) -> None:
        """The call is started."""
        self._call = call

    @property
    def call(self) -> ClientCall:
        """The call itself, which tells how it ended."""
        return self._call

    @property
    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """Metadata that came with the status, once iteration has ended."""
        return self._call.trailers

    @property
    def initial_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Metadata that came before the first answer."""
        return self._call.initial_metadata

    async def end(self) -> None:
        """No more messages will be sent."""
        self._call.end()

    def cancel(self) -> None:
        """Take the call back."""
        self._call.cancel()

    def on_end(self) -> None:
        """The answers are complete; the status decides how iteration ends, in on_close."""

    def on_close(self) -> None:
        """The outcome is known."""
        call = self._call
        if call.status != Status.OK:
            self._error = RpcError(Status(call.status), call.details, call.trailers)
        self._ended = self._over = True
        self._wake_reader()
        self.on_writable()
