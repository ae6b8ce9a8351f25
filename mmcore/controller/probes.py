"""``/healthz`` and ``/readyz`` for the kubelet, over HTTP/1.1."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

_READ_WITHIN_S: Final = 5.0


class Probes:
    """Answers probes; ``ready`` tells whether the controller is."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Answer from now on; OSError where the port is taken."""
        return await asyncio.start_server(self._answer, host, port, limit=8192)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_WITHIN_S):
                head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1:2]
            known = path in ([b"/healthz"], [b"/readyz"])
            good = known and (path == [b"/healthz"] or self._ready())
            status = "200 OK" if good else "503 Service Unavailable" if known else "404 Not Found"
            body = status.partition(" ")[2].lower()
            head_out = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write((head_out + body).encode())
            await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return
        finally:
            writer.close()
