"""Fuzz targets for the transport: whatever bytes come, a session answers or ends, and nothing of it is left."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

from mmcore._ext.grpcwire import (
    decode_message,
    decompress,
    encode_message,
    format_timeout,
    parse_timeout,
)
from mmcore._ext.h2 import live_objects
from mmcore._ext.h2server import ServerCall
from mmcore._ext.outbuf import Buffers
from mmcore.errors import InvalidRequest, MessageTooLong
from tests.sessions import SETTINGS, Client, Echo, Pair, Server, Sink, methods

LIMITS = replace(
    SETTINGS, max_message_bytes=5000, max_receiving_bytes=20_000, max_header_bytes=2000, max_concurrent_streams=20,
    stream_window_bytes=65_535, control_frame_burst=20,
)  # fmt: skip
BUFFERS = Buffers(), Buffers()
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
UNARY, STREAM = "/fuzz.Fuzz/Unary", "/fuzz.Fuzz/Stream"


def unary(call: ServerCall, body: bytes) -> bytes | None:
    repr((call.metadata, call.method, call.deadline, call.peer))
    if body[:1] == b"e":
        raise InvalidRequest(body.decode("latin-1"))
    if body[:1] == b"w":
        call.on_cancel = lambda: None
        return None
    call.set_compression("gzip")
    return body


METHODS = methods({UNARY: unary}, {STREAM: Echo})


def fuzz_one(data: bytes) -> None:
    """Either side with these bytes from the other, and gRPC's notation; an exception is a finding."""
    if data:
        notation(data)
        session(data)


def session(data: bytes) -> None:
    """A session of HTTP/2: the first byte chooses the side and cuts the rest."""
    if not data:
        return
    side, size, rest = data[0] & 1, (data[0] >> 1) or 1000, data[1:]
    chunks = [rest[start : start + size] for start in range(0, len(rest), size)]
    before = live_objects()
    if side:
        _server(chunks, greeted=bool(data[0] & 2))
    else:
        _client(chunks)
    assert live_objects() == before


def unframing(data: bytes) -> None:
    """gRPC's messages in DATA of a call in order; the first byte cuts the rest and chooses the method."""
    if not data:
        return
    size = (data[0] >> 2) + 1
    body = data[1:5001]
    server = Server(BUFFERS[0], LIMITS, METHODS)
    server.feed_bytes(PREFACE + b"\0\0\0\x04\0\0\0\0\0" + _REQUESTS[data[0] & 3])
    for start in range(0, len(body), size):
        chunk = body[start : start + size]
        server.feed_bytes(len(chunk).to_bytes(3, "big") + b"\0\0\0\0\0\1" + chunk)
    server.feed_bytes(b"\0\0\0\0\1\0\0\0\1")
    server.shut("fuzzed")
    assert server.errors == []
    assert (server.open_streams, server.unsent) == (0, 0)


def _headers(path: str, encoding: str) -> bytes:
    """A HEADERS frame that opens a call on stream 1."""
    fields = ((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "a"), ("te", "trailers"),
              ("content-type", "application/grpc"), ("grpc-encoding", encoding))  # fmt: skip
    # RFC 7541, 6.2.2: literal fields without indexing, new names, no Huffman codes.
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields
    )
    return len(block).to_bytes(3, "big") + b"\1\4\0\0\0\1" + block


_REQUESTS = tuple(_headers(path, encoding) for path in (UNARY, STREAM) for encoding in ("identity", "gzip"))


def _server(chunks: list[bytes], *, greeted: bool) -> None:
    server = Server(BUFFERS[0], LIMITS, METHODS)
    if greeted:
        server.feed_bytes(PREFACE + b"\0\0\0\x04\0\0\0\0\0")
    for chunk in chunks:
        server.feed_bytes(chunk)
    server.expire()
    assert server.open_streams <= LIMITS.max_concurrent_streams
    server.shut("fuzzed")
    assert server.errors == []
    assert (server.open_streams, server.unsent) == (0, 0)


def _client(chunks: list[bytes]) -> None:
    both: Any = Pair.__new__(Pair)
    both.client = client = Client(BUFFERS[1], LIMITS)
    told: list[int] = []
    calls = [both.call(UNARY, b"hello", on_done=lambda call: told.append(call.status), encoding="gzip")]
    calls.append(both.call(STREAM, None, sink=Sink()))
    calls.append(both.call(UNARY, None, on_done=lambda call: told.append(call.status)))
    calls[1].send(b"one")
    for chunk in chunks:
        client.feed_bytes(chunk)
    calls[1].send(b"two")
    client.shut("fuzzed")
    assert len(told) == 2
    for call in calls:
        repr((call.details, call.message, call.trailers, call.initial_metadata))
        assert 0 <= call.status <= 16
    assert client.errors == []
    assert (client.open_streams, client.unsent) == (0, 0)


def notation(data: bytes) -> None:
    """Timeouts, messages and compressed messages."""
    text = decode_message(data)
    assert decode_message(encode_message(text)) == text
    ns = parse_timeout(data)
    assert ns is None or ns >= 0
    if len(data) >= 8:
        (seconds,) = struct.unpack("<d", data[:8])
        if seconds == seconds:
            again = parse_timeout(format_timeout(seconds))
            assert again is not None
    for encoding in ("gzip", "deflate"):
        try:
            assert len(decompress(encoding, data, 1000)) <= 1000
        except (ValueError, MessageTooLong):
            continue
