"""One HTTP/1.1 connection of the generator: whole requests out, the bodies of their answers back, one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from bench.load.loops import Answer


class HttpAnswer:
    """A finished request; ``status`` is 0 for 200 and the HTTP status otherwise."""

    __slots__ = ("details", "message", "status")

    def __init__(self, status: int, details: str, message: bytes) -> None:
        self.status = status
        self.details = details
        self.message = message


class HttpCaller(asyncio.Protocol):
    """A :class:`bench.load.loops.Caller` whose messages are requests as they go over the wire, head and body."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport
        self._buffer = b""
        self._on_done: Callable[[Answer], None] | None = None
        self._ended = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(cls, target: str) -> Self:
        """Connected to ``host:port``.

        Raises:
            OSError: nobody listens there.
        """
        host, port = target.rsplit(":", 1)
        _, caller = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        return caller

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no subclass

    def start(self, path: str, message: bytes, on_done: Callable[[Answer], None]) -> object:
        """Send a request; it holds its path itself."""
        self._on_done = on_done
        self._transport.write(message)
        return None

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer."""
        buffer = self._buffer = self._buffer + data if self._buffer else data
        head_end = buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = buffer[:head_end].lower()
        at = head.find(b"\r\ncontent-length:") + len(b"\r\ncontent-length:")
        body = head_end + 4
        length = int(head[at : end if (end := head.find(b"\r\n", at)) > 0 else None])
        if len(buffer) < body + length:
            return
        self._buffer = b""
        status = int(head[9:12])
        self._finish(HttpAnswer(0 if status == 200 else status, buffer[:300].decode("latin-1"), buffer[body:]))

    def connection_lost(self, error: Exception | None) -> None:
        """A request under way has failed."""
        self._ended.set_result(None)
        self._finish(HttpAnswer(599, f"the connection ended: {error}", b""))

    async def close(self) -> None:
        """End the connection."""
        self._transport.close()
        await self._ended

    def _finish(self, answer: HttpAnswer) -> None:
        on_done, self._on_done = self._on_done, None
        if on_done is not None:
            on_done(answer)


def request(path: str, body: bytes, **headers: str) -> bytes:
    """A POST as it goes over the wire; header names with ``_`` for ``-``."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "", "")).encode() + body
