"""A proxy that can cut the connections through it: a partition of whoever connects through it."""

from __future__ import annotations

import asyncio


class CuttingProxy:
    """Passes TCP connections on to ``target`` until it is cut, and again when it is mended.

    Attributes:
        endpoint: where it listens.
        received_bytes, sent_bytes: what has come from the clients' side and gone to it.
    """

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.endpoint = ""
        self.received_bytes = 0
        self.sent_bytes = 0

    async def start(self) -> CuttingProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"127.0.0.1:{port}"
        return self

    async def cut(self) -> None:
        """Close every connection, and take no new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._open):
            writer.transport.abort()

    async def mend(self) -> None:
        """Take connections again, on the same port."""
        self._server = await asyncio.start_server(self._serve, *self.endpoint.split(":"))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, there}
        try:
            await asyncio.gather(self._pump(reader, there, up=True), self._pump(there_reader, writer, up=False))
        finally:
            self._open -= {writer, there}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        try:
            while data := await reader.read(65536):
                if up:
                    self.received_bytes += len(data)
                else:
                    self.sent_bytes += len(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
