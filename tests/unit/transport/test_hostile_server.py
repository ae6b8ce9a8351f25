"""A channel whose server misbehaves: every call ends with a status that says what happened, and none hangs."""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hyperframe.frame import (
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from mmcore._ext.h2 import live_objects
from mmcore.errors import RpcError, Status
from mmcore.transport import Channel, ClientCall
from tests.rawh2 import RawPeer, RawServer, framed
from tests.sessions import SETTINGS

EVERY_LOOP = True
UNARY = "/test.Service/Unary"
OPENED = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]
MAX_CONCURRENT_STREAMS = 3

Open = Callable[..., Channel]


@pytest.fixture
async def raw() -> AsyncIterator[RawServer]:
    server = RawServer()
    await server.start()
    yield server
    await server.close()


@pytest.fixture
async def open_channel(raw: RawServer) -> AsyncIterator[Open]:
    """Makes channels to the raw server; nothing of them may be left at the end."""
    before = live_objects()
    opened: list[Channel] = []

    def make(**options: Any) -> Channel:
        opened.append(Channel(raw.target, **options))
        return opened[-1]

    yield make
    for channel in opened:
        await channel.close()
    opened.clear()
    async with asyncio.timeout(5):
        while any(count > before[kind] for kind, count in live_objects().items()):
            await asyncio.sleep(0.002)
            gc.collect()


async def outcome(call: asyncio.Task[bytes]) -> tuple[int, str]:
    with pytest.raises(RpcError) as caught:
        async with asyncio.timeout(10):
            await call
    return caught.value.status, caught.value.details


class Scene:
    """A call that a raw server has got, and is to be answered by the test."""

    def __init__(self, channel: Channel, call: asyncio.Task[bytes], server: RawPeer) -> None:
        self.channel = channel
        self.call = call
        self.server = server

    def answer(self, headers: list[tuple[str, str]], *rest: Any, end: bool = False) -> None:
        flags = ["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"]
        self.server.send(HeadersFrame(1, self.server.encode(headers), flags=flags))
        for one in rest:
            if isinstance(one, bytes):
                self.server.send(DataFrame(1, one))
            else:
                block = self.server.encode(one)
                self.server.send(HeadersFrame(1, block, flags=["END_HEADERS", "END_STREAM"]))


@pytest.fixture
async def scene(raw: RawServer, open_channel: Open) -> AsyncIterator[Scene]:
    channel = open_channel()
    call = asyncio.create_task(channel.unary(UNARY, b"hello"))
    server = await raw.accept()
    await server.until(DataFrame)
    scene = Scene(channel, call, server)
    yield scene
    del scene.call, call  # its exception's frames hold the connection


async def test_a_proper_answer_is_taken(scene: Scene) -> None:
    scene.answer([*OPENED, ("x-first", "1")], framed(b"answer"), [*OK, ("x-last", "2")])
    assert await scene.call == b"answer"


@pytest.mark.parametrize(("http", "status"), [
    (400, Status.INTERNAL), (401, Status.UNAUTHENTICATED), (403, Status.PERMISSION_DENIED),
    (404, Status.UNIMPLEMENTED), (429, Status.UNAVAILABLE), (502, Status.UNAVAILABLE), (503, Status.UNAVAILABLE),
    (504, Status.UNAVAILABLE), (500, Status.UNKNOWN), (302, Status.UNKNOWN), (204, Status.UNKNOWN),
])  # fmt: skip
@pytest.mark.parametrize("body", [b"", b"<html>Bad gateway</html>"])
async def test_an_http_status_becomes_a_grpc_one(scene: Scene, http: int, status: Status, body: bytes) -> None:
    pairs = [(":status", str(http)), ("content-type", "text/html")]
    if body:
        scene.answer(pairs, body, [])
    else:
        scene.answer(pairs, end=True)
    assert await outcome(scene.call) == (status, f"HTTP status {http} without grpc-status")


@pytest.mark.parametrize(("code", "status"), [
    (0, Status.INTERNAL), (1, Status.INTERNAL), (2, Status.INTERNAL), (3, Status.INTERNAL), (5, Status.INTERNAL),
    (8, Status.CANCELLED), (11, Status.RESOURCE_EXHAUSTED), (12, Status.PERMISSION_DENIED), (99, Status.INTERNAL),
])  # fmt: skip
@pytest.mark.parametrize("started", [False, True])
async def test_a_reset_becomes_a_status(scene: Scene, code: int, status: Status, started: bool) -> None:
    if started:
        scene.answer(OPENED, framed(b"ans", length=6))
    scene.server.send(RstStreamFrame(1, code))
    got, text = await outcome(scene.call)
    assert (got, str(code) in text) == (status, True)


async def test_a_refused_call_is_sent_once_more(scene: Scene) -> None:
    scene.server.send(RstStreamFrame(1, 7))
    again = await scene.server.until(DataFrame)
    assert again.stream_id == 3
    assert again.data == framed(b"hello")
    scene.server.send(RstStreamFrame(3, 7))
    assert (await outcome(scene.call))[0] == Status.UNAVAILABLE


async def test_a_call_above_goaways_last_stream_is_sent_again_elsewhere(raw: RawServer, scene: Scene) -> None:
    scene.server.send(GoAwayFrame(0, last_stream_id=0, error_code=0))
    other = await raw.accept()
    request = await other.until(DataFrame)
    other.send(HeadersFrame(request.stream_id, other.encode(OPENED), flags=["END_HEADERS"]))
    other.send(DataFrame(request.stream_id, framed(b"elsewhere")))
    other.send(HeadersFrame(request.stream_id, other.encode(OK), flags=["END_HEADERS", "END_STREAM"]))
    assert await scene.call == b"elsewhere"


async def test_a_call_below_goaways_last_stream_is_answered_still(scene: Scene) -> None:
    scene.server.send(GoAwayFrame(0, last_stream_id=1, error_code=0))
    scene.answer(OPENED, framed(b"answer"), OK)
    assert await scene.call == b"answer"
    await scene.server.until_end()


async def test_a_goaway_with_an_error_and_a_close_end_the_call(scene: Scene) -> None:
    scene.server.send(GoAwayFrame(0, last_stream_id=1, error_code=11))
    await scene.server.close()
    assert (await outcome(scene.call))[0] == Status.UNAVAILABLE


async def test_a_closed_connection_ends_the_call_and_the_next_one_connects_again(raw: RawServer, scene: Scene) -> None:
    await scene.server.close()
    assert (await outcome(scene.call))[0] == Status.UNAVAILABLE
    again = asyncio.create_task(scene.channel.unary(UNARY, b"again"))
    other = await raw.accept()
    assert (await other.until(DataFrame)).data == framed(b"again")
    await other.close()
    assert (await outcome(again))[0] == Status.UNAVAILABLE


@pytest.mark.parametrize(("parts", "status"), [
    ([OPENED, framed(b"x"), []], Status.INTERNAL),
    ([OPENED, framed(b"x"), [("grpc-status", "abc")]], Status.UNKNOWN),
    ([OPENED, framed(b"x"), [("grpc-status", "")]], Status.UNKNOWN),
    ([OPENED, framed(b"x"), [("grpc-status", "99")]], Status.UNKNOWN),
    ([OPENED, framed(b"x"), [("grpc-status", "1000")]], Status.UNKNOWN),
    ([OPENED, framed(b"x"), [("grpc-status", "5"), ("grpc-message", "100%25 %F0%9F%98")]], Status.NOT_FOUND),
    ([OPENED, OK], Status.UNIMPLEMENTED),
    ([OPENED, framed(b"x", length=2), OK], Status.INTERNAL),
    ([OPENED, framed(b"x")[:3], OK], Status.INTERNAL),
    ([OPENED, framed(b"x") + b"\0\0", OK], Status.INTERNAL),
    ([OPENED, framed(b"x") + framed(b"y"), OK], Status.UNIMPLEMENTED),
    ([OPENED, framed(b"", length=2**32 - 1), OK], Status.RESOURCE_EXHAUSTED),
    ([OPENED, framed(b"x", 7), OK], Status.INTERNAL),
    ([OPENED, framed(b"x", 1), OK], Status.INTERNAL),
    ([[*OPENED, ("grpc-encoding", "gzip")], framed(b"no gzip", 1), OK], Status.INTERNAL),
    ([[*OPENED, ("grpc-encoding", "snappy")], framed(b"x", 1), OK], Status.INTERNAL),
    ([OPENED, b"garbage that is no message at all", OK], Status.INTERNAL),
    ([[(":status", "200"), ("content-type", "text/html")], b"<html>", []], Status.UNKNOWN),
    ([[(":status", "200")], framed(b"x"), OK], Status.UNKNOWN),
    ([OPENED, framed(b"x"), [*OK, ("flood", "f" * 60_000)]], Status.RESOURCE_EXHAUSTED),
    ([[*OPENED, *[("flood", "f" * 1000)] * 50], framed(b"x"), OK], Status.RESOURCE_EXHAUSTED),
], ids=range(21))  # fmt: skip
async def test_a_broken_answer_ends_the_call_alone(scene: Scene, parts: list[Any], status: Status) -> None:
    scene.answer(*parts)
    assert (await outcome(scene.call))[0] == status
    # The connection serves the next call, whether or not the broken one had to be reset.
    call = asyncio.create_task(scene.channel.unary(UNARY, b"next"))
    request = await scene.server.until(lambda frame: isinstance(frame, DataFrame) and frame.stream_id == 3)
    assert request.data == framed(b"next")
    scene.server.send(HeadersFrame(3, scene.server.encode(OPENED), flags=["END_HEADERS"]))
    scene.server.send(DataFrame(3, framed(b"fine")))
    scene.server.send(HeadersFrame(3, scene.server.encode(OK), flags=["END_HEADERS", "END_STREAM"]))
    assert await call == b"fine"


async def test_interim_answers_are_passed_over(scene: Scene) -> None:
    for _ in range(3):
        scene.server.send(HeadersFrame(1, scene.server.encode([(":status", "103")]), flags=["END_HEADERS"]))
    scene.answer(OPENED, framed(b"answer"), OK)
    assert await scene.call == b"answer"


async def test_a_message_may_end_in_a_space(scene: Scene) -> None:
    """As Triton's of a wrong shape does, which HTTP/2 forbids."""
    scene.answer([*OPENED, ("grpc-status", "3"), ("grpc-message", "got [2,3]. ")], end=True)
    assert await outcome(scene.call) == (Status.INVALID_ARGUMENT, "got [2,3]. ")


async def test_a_trailers_only_answer_carries_its_status(scene: Scene) -> None:
    scene.answer([*OPENED, ("grpc-status", "7"), ("grpc-message", "not %C3%BC")], end=True)
    assert await outcome(scene.call) == (Status.PERMISSION_DENIED, "not ü")


@pytest.mark.parametrize("data", [
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", bytes(100), b"\xff" * 100, b"\0\0\x05\x06\0\0\0\0\0hello",
], ids=range(4))  # fmt: skip
async def test_bytes_that_are_no_http2_end_the_connection(scene: Scene, data: bytes) -> None:
    scene.server.raw(data)
    assert (await outcome(scene.call))[0] == Status.UNAVAILABLE
    await scene.server.until_end()


async def test_a_pushed_stream_ends_the_connection(scene: Scene) -> None:
    block = scene.server.encode([(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x")])
    scene.server.send(PushPromiseFrame(1, promised_stream_id=2, data=block, flags=["END_HEADERS"]))
    assert (await outcome(scene.call))[0] == Status.UNAVAILABLE
    assert await scene.server.goaway() == 1


async def test_control_frame_floods_of_a_server_are_ended_too(scene: Scene) -> None:
    for _ in range(3000):
        if not await scene.server.send_all(SettingsFrame(0).serialize()):
            break
    assert (await outcome(scene.call))[0] == Status.UNAVAILABLE
    assert await scene.server.goaway() == 11


async def test_a_server_that_gives_no_window_is_waited_for_until_the_deadline(
    raw: RawServer, open_channel: Open
) -> None:
    channel = open_channel()
    call = asyncio.create_task(channel.unary(UNARY, bytes(1_000_000), timeout_s=0.5))
    server = await raw.accept({4: 100})
    assert (await outcome(call))[0] == Status.DEADLINE_EXCEEDED
    reset = await server.until(RstStreamFrame)
    assert (reset.stream_id, reset.error_code) == (1, 8)


async def test_a_server_that_allows_no_calls_is_waited_for_until_the_deadline(
    raw: RawServer, open_channel: Open
) -> None:
    channel = open_channel()
    connecting = asyncio.create_task(channel.connect())
    server = await raw.accept({MAX_CONCURRENT_STREAMS: 0})
    await connecting
    await server.until(lambda frame: isinstance(frame, SettingsFrame) and "ACK" in frame.flags)
    outcomes: list[ClientCall] = []
    channel.start(UNARY, b"", outcomes.append).cancel()
    late = asyncio.create_task(channel.unary(UNARY, b"", timeout_s=0.05))
    assert (await outcome(late))[0] == Status.DEADLINE_EXCEEDED
    assert [call.status for call in outcomes] == [Status.CANCELLED]
    server.send(SettingsFrame(0, settings={MAX_CONCURRENT_STREAMS: 10}))
    call = asyncio.create_task(channel.unary(UNARY, b"now"))
    assert (await server.until(DataFrame)).data == framed(b"now")
    await server.close()
    assert (await outcome(call))[0] == Status.UNAVAILABLE


async def test_window_updates_of_ended_calls_harm_nothing(scene: Scene) -> None:
    scene.call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scene.call
    await scene.server.until(RstStreamFrame)
    scene.server.send(WindowUpdateFrame(1, window_increment=10), DataFrame(1, b"late"))
    scene.answer(OPENED, b"", OK)
    await scene.server.pong()


async def test_a_channel_may_be_closed_in_a_callback(raw: RawServer, open_channel: Open) -> None:
    channel = open_channel(connections=1)
    connecting = asyncio.create_task(channel.connect())
    server = await raw.accept()
    await connecting
    closing: list[asyncio.Task[None]] = []
    statuses: list[int] = []

    def close(call: ClientCall) -> None:
        statuses.append(call.status)
        closing.append(asyncio.ensure_future(channel.close()))

    channel.start(UNARY, b"", close)
    channel.start(UNARY, b"", close)
    await server.until(DataFrame)
    server.send(RstStreamFrame(1, 8))
    async with asyncio.timeout(10):
        while len(closing) < 2:
            await asyncio.sleep(0)
        await asyncio.gather(*closing)
    assert statuses == [Status.CANCELLED, Status.UNAVAILABLE]


async def test_a_tls_server_without_http2_is_refused(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    process = await asyncio.create_subprocess_exec(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-keyout", key, "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert await process.wait() == 0
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    listener = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    port = listener.sockets[0].getsockname()[1]
    channel = Channel(
        f"127.0.0.1:{port}",
        settings=replace(SETTINGS, connect_timeout_s=5),
        ssl=ssl.create_default_context(cafile=cert),
        server_name="localhost",
    )
    status, details = await outcome(asyncio.create_task(channel.unary(UNARY, b"")))
    assert (status, "ALPN" in details) == (Status.UNAVAILABLE, True)
    await channel.close()
    listener.close()
