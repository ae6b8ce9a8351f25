"""``/healthz`` and ``/readyz`` for the kubelet and ``/metrics`` for Prometheus, over HTTP/1.1."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from mmcore.metrics import CONTENT_TYPE

_READ_WITHIN_S: Final = 5.0
_TEXT: Final = b"text/plain; charset=utf-8"


class Probes:
    """Answers probes: ``ready`` tells whether the controller is, ``metrics`` what it counts."""

    def __init__(self, ready: Callable[[], bool], metrics: Callable[[], bytes]) -> None:
        self._ready = ready
        self._metrics = metrics

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Answer from now on; OSError where the port is taken."""
        return await asyncio.start_server(self._answer, host, port, limit=8192)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_WITHIN_S):
                head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1] if head.count(b" ") > 1 else b""
            status, kind, body = self._found(path)
            lines = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
            writer.write(lines.encode() + b"Content-Type: " + kind + b"\r\n\r\n" + body)
            await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return
        finally:
            writer.close()

    def _found(self, path: bytes) -> tuple[HTTPStatus, bytes, bytes]:
        if path == b"/metrics":
            return HTTPStatus.OK, CONTENT_TYPE, self._metrics()
        status = HTTPStatus.NOT_FOUND
        if path in (b"/healthz", b"/readyz"):
            good = path == b"/healthz" or self._ready()
            status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        return status, _TEXT, status.phrase.lower().encode()
