"""A proxy that fails as networks do: it cuts the connections through it, passes nothing on, or only late."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import psutil


@dataclass(eq=False)
class _Passage:
    """One connection through the proxy: the client's port, both ends, and whether nothing passes for now."""

    port: int
    writers: tuple[asyncio.StreamWriter, ...]
    silent: bool = False


class CuttingProxy:
    """Passes TCP connections on to ``target`` until it is cut or silenced, and again when it is mended.

    Attributes:
        endpoint: where it listens.
        delay_s: how long every piece is kept before it goes on.
        received_bytes, sent_bytes: what has come from the clients' side and gone to it.
    """

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._passages: set[_Passage] = set()
        self._silent = False
        self._shut_out: set[int] = set()
        self._mended = asyncio.Event()
        self.endpoint = ""
        self.delay_s = 0.0
        self.received_bytes = 0
        self.sent_bytes = 0

    async def start(self) -> CuttingProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"127.0.0.1:{port}"
        return self

    async def cut(self) -> None:
        """Close every connection, and take no new ones; what was kept back goes with them."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._silent = False
        for passage in list(self._passages):
            passage.silent = False
            for writer in passage.writers:
                writer.transport.abort()
        self._mended.set()

    def silence(self) -> None:
        """Pass nothing on and close nothing, as where packets are lost; new connections are taken and hear nothing."""
        self._silent = True
        self._mended.clear()

    def shut_out(self, pid: int) -> None:
        """The same for the connections of one process."""
        self._shut_out.add(pid)
        self._mended.clear()
        ports = _local_ports(pid)
        for passage in self._passages:
            passage.silent |= passage.port in ports

    async def mend(self) -> None:
        """Pass on what was kept, and take connections again, on the same port."""
        self._silent = False
        self._shut_out.clear()
        for passage in self._passages:
            passage.silent = False
        self._mended.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, *self.endpoint.split(":"))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("peername")[1]
        passage = _Passage(port, (writer,), silent=any(port in _local_ports(pid) for pid in self._shut_out))
        self._passages.add(passage)
        try:
            await self._passable(passage)
            there_reader, there = await asyncio.open_connection(self._host, self._port)
            passage.writers = (writer, there)
            await asyncio.gather(
                self._pump(passage, reader, there, up=True), self._pump(passage, there_reader, writer, up=False)
            )
        except OSError:
            writer.transport.abort()
        finally:
            self._passages.discard(passage)

    async def _passable(self, passage: _Passage) -> None:
        while self._silent or passage.silent:
            await self._mended.wait()

    async def _pump(
        self, passage: _Passage, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        try:
            while data := await reader.read(65536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._passable(passage)
                if up:
                    self.received_bytes += len(data)
                else:
                    self.sent_bytes += len(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            await self._passable(passage)
            writer.close()


def _local_ports(pid: int) -> set[int]:
    """The ports that a process has connections from."""
    return {connection.laddr.port for connection in psutil.Process(pid).net_connections("tcp") if connection.laddr}
