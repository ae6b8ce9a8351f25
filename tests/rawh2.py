"""One side of HTTP/2 by hand, frame by frame, for peers that misbehave."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable
from typing import Any

import hpack
from hyperframe.frame import (
    DataFrame,
    ExtensionFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WITHIN_S = 20.0


def headers(path: str = "/test.Service/Unary", **changes: str | None) -> list[tuple[str, str]]:
    """A request's headers; names in ``changes`` have ``_`` for ``-``, and ``m_``… for pseudo headers' colon."""
    found: dict[str, str | None] = {
        ":method": "POST", ":scheme": "http", ":path": path, ":authority": "test", "te": "trailers",
        "content-type": "application/grpc",
    }  # fmt: skip
    for name, value in changes.items():
        found[":" + name[2:] if name.startswith("m_") else name.replace("_", "-")] = value
    return [(name, value) for name, value in found.items() if value is not None]


def framed(message: bytes, flag: int = 0, length: int | None = None) -> bytes:
    """A gRPC message with its prefix, which may lie about the length."""
    return struct.pack(">BI", flag, len(message) if length is None else length) + message


class RawPeer:
    """Frames in and out of one connection; answers nothing by itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self._buffer = bytearray()
        self.frames: list[Frame] = []
        self.ended = False

    @classmethod
    async def connect(
        cls, target: str, *, greet: bool = True, acknowledge: bool = True, settings: dict[int, int] | None = None
    ) -> RawPeer:
        host, _, port = target.rpartition(":")
        peer = cls(*await asyncio.open_connection(host, int(port), limit=2**24))
        if greet:
            peer.raw(PREFACE)
            peer.send(SettingsFrame(0, settings=settings or {}))
        if greet and acknowledge:  # unseen: the server's limits hold from then on
            peer.send(SettingsFrame(0, flags=["ACK"]))
        return peer

    def raw(self, data: bytes) -> None:
        self._writer.write(data)

    def send(self, *frames: Frame) -> None:
        self.raw(b"".join(frame.serialize() for frame in frames))

    async def send_all(self, data: bytes) -> bool:
        """Write, waiting for the socket; False when the other side has closed."""
        self._writer.write(data)
        try:
            await self._writer.drain()
        except ConnectionError:
            return False
        return not self.ended

    def encode(self, pairs: Iterable[tuple[str, str]]) -> bytes:
        return self._encoder.encode(list(pairs))

    def request(
        self, stream: int, pairs: Iterable[tuple[str, str]] | None = None, body: bytes | None = None, end: bool = True
    ) -> list[Frame]:
        """HEADERS, and DATA with a body."""
        flags = ["END_HEADERS"] + (["END_STREAM"] if end and body is None else [])
        found: list[Frame] = [HeadersFrame(stream, self.encode(pairs or headers()), flags=flags)]
        if body is not None:
            found.append(DataFrame(stream, body, flags=["END_STREAM"] if end else []))
        return found

    def response(self, frame: Frame) -> dict[str, str]:
        """The headers of a HEADERS frame; each is to be decoded once, in order."""
        assert isinstance(frame, HeadersFrame)
        return {str(name): str(value) for name, value in self._decoder.decode(frame.data)}

    async def read(self) -> Frame | None:
        """The next frame, None at the end of the connection."""
        while True:
            if len(self._buffer) >= 9:
                frame, length = Frame.parse_frame_header(memoryview(bytes(self._buffer[:9])))
                if len(self._buffer) >= 9 + length:
                    if not isinstance(frame, ExtensionFrame):
                        frame.parse_body(memoryview(bytes(self._buffer[9 : 9 + length])))
                    del self._buffer[: 9 + length]
                    self.frames.append(frame)
                    return frame
            try:
                data = await asyncio.wait_for(self._reader.read(2**20), WITHIN_S)
            except ConnectionError:
                data = b""
            if not data:
                self.ended = True
                return None
            self._buffer += data

    async def until(self, wanted: Callable[[Frame], bool] | type[Frame]) -> Any:
        """The next frame that is wanted; fails when the connection ends before."""
        while (frame := await self.read()) is not None:
            if isinstance(frame, wanted) if isinstance(wanted, type) else wanted(frame):
                return frame
        raise AssertionError(f"the connection ended; frames: {self.frames}")

    async def until_end(self) -> list[Frame]:
        """All frames until the other side closes."""
        while await self.read() is not None:
            pass
        return self.frames

    async def goaway(self) -> int:
        """The error code of the GOAWAY that ends the connection."""
        frames = await self.until_end()
        last = [frame for frame in frames if isinstance(frame, GoAwayFrame)]
        assert last, frames
        return int(last[-1].error_code)

    async def reset(self, stream: int) -> int:
        frame = await self.until(lambda frame: isinstance(frame, RstStreamFrame) and frame.stream_id == stream)
        return int(frame.error_code)

    async def status(self, stream: int) -> tuple[int, str]:
        """grpc-status and grpc-message of a stream's end; frames of other streams are passed over."""
        while True:
            frame = await self.until(HeadersFrame)
            found = self.response(frame)
            if frame.stream_id == stream and "END_STREAM" in frame.flags:
                return int(found["grpc-status"]), found.get("grpc-message", "")

    async def pong(self, data: bytes = b"are you?") -> None:
        """Two PINGs' answers: everything sent before was taken, and what it caused has come before the second."""
        for _ in range(2):
            self.send(PingFrame(0, data))
            await self.until(lambda frame: isinstance(frame, PingFrame) and "ACK" in frame.flags)

    def open_window(self, stream: int, size: int) -> None:
        self.send(WindowUpdateFrame(0, window_increment=size), WindowUpdateFrame(stream, window_increment=size))

    async def close(self) -> None:
        self._writer.transport.abort()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return


class RawServer:
    """A listener whose connections are scripted by the test, one after the other."""

    def __init__(self) -> None:
        self._accepted: asyncio.Queue[RawPeer] = asyncio.Queue()
        self._peers: list[RawPeer] = []
        self._listener: asyncio.Server
        self.target = ""

    async def start(self) -> None:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = RawPeer(reader, writer)
            self._peers.append(peer)
            self._accepted.put_nowait(peer)

        self._listener = await asyncio.start_server(accept, "127.0.0.1", 0, limit=2**24)
        self.target = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def accept(self, settings: dict[int, int] | None = None) -> RawPeer:
        """The next connection, its preface read and greeted."""
        peer = await asyncio.wait_for(self._accepted.get(), WITHIN_S)
        assert await peer._reader.readexactly(len(PREFACE)) == PREFACE
        peer.send(SettingsFrame(0, settings=settings or {}), SettingsFrame(0, flags=["ACK"]))
        return peer

    async def close(self) -> None:
        self._listener.close()
        for peer in self._peers:
            await peer.close()
