"""A server whose peer breaks HTTP/2 or gRPC, by accident or on purpose: what it answers, and others do not notice."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import psutil
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from mmcore.errors import Status
from mmcore.transport import StreamCall
from tests.rawh2 import PREFACE, RawPeer, framed, headers
from tests.served import Serve, Served, grown_since

EVERY_LOOP = True
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR = 0, 1, 3, 5, 6
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 7, 8, 9, 11
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_CONCURRENT_STREAMS = 4, 5, 3
HELLO = framed(b"hello")


# -- the connection's beginning


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(100), b"\0" * 24])
async def test_a_wrong_preface_closes_the_connection(serve: Serve, start: bytes) -> None:
    served = await serve()
    peer = await served.peer(greet=False)
    peer.raw(start)
    await peer.until_end()


@pytest.mark.parametrize("start", [b"", PREFACE[:10], PREFACE, PREFACE + b"\0\0\0"])
async def test_a_slow_preface_is_not_waited_for(serve: Serve, start: bytes) -> None:
    served = await serve(handshake_timeout_s=0.3)
    peer = await served.peer(greet=False)
    peer.raw(start)
    await peer.until_end()


async def test_the_preface_may_come_byte_by_byte(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer(greet=False)
    frames = b"".join(frame.serialize() for frame in (SettingsFrame(0), *peer.request(1, body=HELLO)))
    for byte in PREFACE + frames:
        await peer.send_all(bytes([byte]))
    assert await peer.status(1) == (0, "")


# -- frames that break HTTP/2


def header(length: int, kind: int, flags: int, stream: int) -> bytes:
    return struct.pack(">I", length)[1:] + struct.pack(">BBI", kind, flags, stream)


@pytest.mark.parametrize(("data", "codes"), [
    (header(2**20 + 1, 0, 0, 1), {FRAME_SIZE_ERROR}),
    (header(2**24 - 1, 1, 4, 1), {FRAME_SIZE_ERROR}),
    (header(5, 6, 0, 0) + bytes(5), {FRAME_SIZE_ERROR}),
    (header(3, 8, 0, 0) + bytes(3), {FRAME_SIZE_ERROR}),
    (header(7, 4, 0, 0) + bytes(7), {FRAME_SIZE_ERROR}),
    (header(4, 8, 0, 0) + bytes(4), {PROTOCOL_ERROR}),
    (header(4, 3, 0, 0) + bytes(4), {PROTOCOL_ERROR}),
    (header(4, 3, 0, 1) + bytes(4), {PROTOCOL_ERROR}),
    (header(8, 6, 0, 1) + bytes(8), {PROTOCOL_ERROR}),
    (header(3, 0, 0, 1) + b"abc", {PROTOCOL_ERROR}),
    (header(3, 0, 0, 0) + b"abc", {PROTOCOL_ERROR}),
    (header(1, 9, 4, 1) + b"\x82", {PROTOCOL_ERROR}),
    (header(1, 1, 5, 2) + b"\x82", {PROTOCOL_ERROR}),
    (header(5, 5, 4, 1) + bytes(5), {PROTOCOL_ERROR}),
    (header(4, 1, 5, 1) + b"\xff\xff\xff\xff", {COMPRESSION_ERROR}),
    (header(2, 1, 5, 1) + b"\xbe\xff", {COMPRESSION_ERROR}),
    (header(6, 4, 0, 0) + struct.pack(">HI", 4, 2**31), {FLOW_CONTROL_ERROR}),
    (header(6, 4, 0, 0) + struct.pack(">HI", 5, 100), {PROTOCOL_ERROR}),
    (header(6, 4, 0, 0) + struct.pack(">HI", 2, 2), {PROTOCOL_ERROR}),
    (header(6, 4, 1, 0) + bytes(6), {FRAME_SIZE_ERROR}),
    (header(4, 8, 0, 0) + struct.pack(">I", 2**31 - 1), {FLOW_CONTROL_ERROR}),
], ids=range(21))  # fmt: skip
async def test_a_broken_frame_ends_the_connection_with_its_error(serve: Serve, data: bytes, codes: set[int]) -> None:
    served = await serve()
    peer = await served.peer()
    peer.raw(data)
    assert await peer.goaway() in codes


async def test_a_streams_window_that_overflows_ends_the_stream_alone(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers("/test.Service/Hold"), HELLO))
    peer.send(WindowUpdateFrame(1, window_increment=2**31 - 1))
    assert await peer.reset(1) == FLOW_CONTROL_ERROR
    peer.send(*peer.request(3, body=HELLO))
    assert await peer.status(3) == (0, "")
    assert served.cancelled == 1


async def test_a_stream_id_that_was_used_is_no_new_call(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(5, body=HELLO))
    assert await peer.status(5) == (0, "")
    for second in (1, 3, 5):  # nghttp2 remembers no closed streams, so it passes over these
        peer.send(HeadersFrame(second, peer.encode(headers("/test.Service/Hold")), flags=["END_HEADERS"]))
    await peer.pong()
    assert served.held == []
    peer.send(*peer.request(7, headers("/test.Service/Hold"), HELLO))
    peer.send(*peer.request(7, body=HELLO))  # half closed by its client
    assert await peer.goaway() in (PROTOCOL_ERROR, STREAM_CLOSED)
    await served.until(lambda: served.cancelled == 1)


async def test_data_behind_the_end_of_a_stream_is_refused(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers("/test.Service/Hold"), HELLO), DataFrame(1, b"more"))
    frame = await peer.until(lambda frame: isinstance(frame, RstStreamFrame | GoAwayFrame))
    assert frame.error_code in (STREAM_CLOSED, PROTOCOL_ERROR)


async def test_more_calls_than_allowed_are_refused_one_by_one(serve: Serve) -> None:
    served = await serve(max_concurrent_streams=3)
    peer = await served.peer(acknowledge=False)
    for stream in range(1, 11, 2):
        peer.send(*peer.request(stream, headers("/test.Service/Hold"), HELLO))
    assert {await peer.reset(7), await peer.reset(9)} == {REFUSED_STREAM}
    assert len(served.held) == 3
    for call in served.held:
        call.reply(b"x")
    for stream in (1, 3, 5):
        assert await peer.status(stream) == (0, "")
    served.held.clear()
    # Who has acknowledged our SETTINGS knows the limit.
    for stream in range(11, 19, 2):
        peer.send(SettingsFrame(0, flags=["ACK"]) if stream == 11 else PingFrame(0, b"12345678"))
        peer.send(*peer.request(stream, headers("/test.Service/Hold"), HELLO))
    assert await peer.goaway() == PROTOCOL_ERROR


# -- floods


async def flood(served: Served, peer: RawPeer, data: bytes, times: int) -> int:
    """Send the same again and again until the server has had enough; its GOAWAY's code."""
    for _ in range(times):
        if not await peer.send_all(data):
            break
        await asyncio.sleep(0)
    await served.others_are_served()
    return await peer.goaway()


@pytest.mark.parametrize("at_once", [1, 5000])
@pytest.mark.parametrize("frame", [
    PingFrame(0, b"12345678"), PingFrame(0, b"12345678", flags=["ACK"]), SettingsFrame(0),
    SettingsFrame(0, settings={INITIAL_WINDOW_SIZE: 65_535}),
], ids=["ping", "pong", "settings", "settings with value"])  # fmt: skip
async def test_floods_of_control_frames_are_ended(serve: Serve, frame: Frame, at_once: int) -> None:
    served = await serve()
    peer = await served.peer()
    reading = asyncio.create_task(peer.until_end())
    data = frame.serialize() * at_once
    for _ in range(5000 // at_once):
        if not await peer.send_all(data):
            break
    await served.others_are_served()
    await reading
    codes = [frame.error_code for frame in peer.frames if isinstance(frame, GoAwayFrame)]
    assert codes == [ENHANCE_YOUR_CALM]


async def test_priorities_are_passed_over(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    for stream in range(1, 20_001, 2):
        peer.send(PriorityFrame(stream, depends_on=stream - 1, stream_weight=3))
    await peer.pong()


async def test_a_flood_of_empty_data_is_ended(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers("/test.Service/Stream"), end=False))
    assert await flood(served, peer, DataFrame(1, b"").serialize() * 100, 50) == ENHANCE_YOUR_CALM


async def test_rapid_resets_are_ended(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    for stream in range(1, 10_000, 2):
        frames = [*peer.request(stream, headers("/test.Service/Hold"), HELLO), RstStreamFrame(stream, CANCEL)]
        if not await peer.send_all(b"".join(frame.serialize() for frame in frames)):
            break
    await served.others_are_served()
    assert await peer.goaway() == ENHANCE_YOUR_CALM
    assert served.server.calls == 0
    assert len(served.held) < 2000


async def test_resets_among_answered_calls_and_at_deadlines_are_no_flood(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    for stream in range(1, 12_001, 6):
        late = headers("/test.Service/Hold", grpc_timeout="1m")
        peer.send(*peer.request(stream, body=HELLO), *peer.request(stream + 2, headers("/test.Service/Hold"), HELLO))
        peer.send(RstStreamFrame(stream + 2, CANCEL), *peer.request(stream + 4, late, HELLO))
        peer.send(RstStreamFrame(stream + 4, CANCEL))
        if stream % 120 == 1:
            await peer.pong()
    await peer.pong()


async def test_a_flood_of_continuations_is_ended(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(HeadersFrame(1, peer.encode(headers())))
    block = peer.encode([("x", "y")])
    for _ in range(1000):
        if not await peer.send_all(ContinuationFrame(1, block).serialize()):
            break
        await asyncio.sleep(0)
    await peer.until_end()


async def test_empty_headers_in_continuations_are_ended_too(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(HeadersFrame(1, b""))
    peer.raw(ContinuationFrame(1, b"").serialize() * 1000)
    await peer.until_end()


# -- headers


@pytest.mark.parametrize("pairs", [[("x" * 100, "y" * 200)] * 150, [("big", "z" * 40_000)]], ids=["many", "long"])
async def test_too_much_metadata_fails_the_call_alone(serve: Serve, pairs: list[tuple[str, str]]) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers() + pairs, HELLO))
    status, text = await peer.status(1)
    assert (status, "metadata" in text) == (Status.RESOURCE_EXHAUSTED, True)
    peer.send(*peer.request(3, body=HELLO))
    assert await peer.status(3) == (0, "")


async def test_a_header_bomb_costs_little(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    # One long value in the table, then named again and again by one byte each.
    peer.send(*peer.request(1, body=HELLO))
    assert await peer.status(1) == (0, "")
    before = psutil.Process().memory_info().rss
    for stream in range(3, 43, 2):
        block = peer.encode(headers()) + peer.encode([("bomb", "b" * 3990)]) + b"\xbe" * 10_000
        peer.send(HeadersFrame(stream, block, flags=["END_HEADERS", "END_STREAM"]))
        assert (await peer.status(stream))[0] == Status.RESOURCE_EXHAUSTED
    assert grown_since(before) < 20_000_000


@pytest.mark.parametrize(("changes", "status"), [
    ({"m_method": "GET"}, 405), ({"m_method": "PUT"}, 405), ({"content_type": "text/html"}, 415),
    ({"content_type": None}, 415), ({"content_type": "application/grpcx"}, 415),
    ({"content_type": "application/json"}, 415),
])  # fmt: skip
async def test_what_is_not_grpc_gets_an_http_status(serve: Serve, changes: dict[str, Any], status: int) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers(**changes), HELLO))
    answer = peer.response(await peer.until(HeadersFrame))
    assert answer[":status"] == str(status)


@pytest.mark.parametrize("changes", [
    {"content_type": "application/grpc+proto"}, {"content_type": "application/grpc;x=y"}, {"te": None},
    {"grpc_timeout": "99999999H"}, {"grpc_timeout": "10S"}, {"grpc_encoding": "identity"}, {"grpc_accept_encoding": ""},
    {"x_bin": "not base64!"}, {"grpc_trace_bin": "AAAA"},
])  # fmt: skip
async def test_what_is_odd_but_allowed_is_served(serve: Serve, changes: dict[str, Any]) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers(**changes), HELLO))
    assert await peer.status(1) == (0, "")


@pytest.mark.parametrize("timeout", ["", "1", "S", "-1S", "1.5S", "123456789S", "1s", "1 S", "S1", "0x1S", "\u0661S"])
async def test_a_malformed_timeout_is_an_error(serve: Serve, timeout: str) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers(grpc_timeout=timeout), HELLO))
    status, text = await peer.status(1)
    assert (status, "grpc-timeout" in text) == (Status.INTERNAL, True)


async def test_an_unknown_encoding_is_answered_with_those_known(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers(grpc_encoding="snappy"), framed(b"hello", 1)))
    answer = peer.response(await peer.until(HeadersFrame))
    assert answer["grpc-status"] == str(int(Status.UNIMPLEMENTED))
    assert set(answer["grpc-accept-encoding"].split(",")) == {"identity", "gzip", "deflate"}


@pytest.mark.parametrize("pairs", [
    [(":method", "POST"), (":scheme", "http"), (":path", "/x")][:2], [*headers(), (":path", "/again")],
    [*headers(), ("connection", "close")], [*headers(), ("Upper", "case")], [("te", "trailers"), *headers()],
    [*headers(), (":unknown", "x")], [*headers(), ("content-length", "3")],
], ids=range(7))  # fmt: skip
async def test_malformed_requests_are_reset_and_reach_no_handler(serve: Serve, pairs: list[tuple[str, str]]) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, [(name, value.replace("Unary", "Hold")) for name, value in pairs], HELLO))
    assert await peer.reset(1) == PROTOCOL_ERROR
    assert served.held == []
    await peer.pong()


# -- messages


@pytest.mark.parametrize(("body", "status"), [
    (b"", Status.UNIMPLEMENTED), (HELLO[:3], Status.INTERNAL), (HELLO[:5], Status.INTERNAL),
    (HELLO[:-1], Status.INTERNAL), (HELLO + b"\0", Status.INTERNAL), (HELLO + HELLO, Status.UNIMPLEMENTED),
    (framed(b"", 2), Status.INTERNAL), (framed(b"x", 1), Status.INTERNAL), (framed(b"", 0, 2**32 - 1), 8),
    (b"garbage that is no message", Status.INTERNAL), (b"GET / HTTP/1.1\r\n\r\n", Status.INTERNAL),
], ids=range(11))  # fmt: skip
@pytest.mark.parametrize("method", ["Hold", "Stream"])
async def test_broken_messages_fail_the_call_alone(serve: Serve, body: bytes, status: int, method: str) -> None:
    if method == "Stream" and body in (b"", HELLO + HELLO):
        status = Status.OK
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers(f"/test.Service/{method}"), body))
    assert (await peer.status(1))[0] == status
    assert served.held == []
    await peer.pong()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_message_that_is_not_is_an_error(serve: Serve, encoding: str) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers(grpc_encoding=encoding), framed(b"not compressed", 1)))
    assert (await peer.status(1))[0] == Status.INTERNAL


async def test_a_message_above_the_limit_is_refused_before_it_comes(serve: Serve) -> None:
    served = await serve(max_message_bytes=1000)
    peer = await served.peer()
    peer.send(*peer.request(1, body=framed(b"", length=1001), end=False))
    assert (await peer.status(1))[0] == Status.RESOURCE_EXHAUSTED
    assert await peer.reset(1) == NO_ERROR


async def test_half_messages_held_open_are_bounded(serve: Serve) -> None:
    served = await serve(max_message_bytes=2**20, max_receiving_bytes=10 * 2**20)
    peer = await served.peer()
    for stream in range(1, 201, 2):
        peer.send(*peer.request(stream, body=framed(b"x" * 1000, length=2**20), end=False))
    await peer.pong()
    refused = [frame for frame in peer.frames if isinstance(frame, HeadersFrame)]
    assert len(refused) >= 90
    await served.others_are_served()


async def test_half_requests_end_at_their_deadline(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers(grpc_timeout="20m"), HELLO[:7], end=False))
    assert (await peer.status(1))[0] == Status.DEADLINE_EXCEEDED
    assert await peer.reset(1) == NO_ERROR


# -- readers that are slow or do not read


async def test_answers_a_peer_gives_no_window_for_are_bounded_and_then_given_up(serve: Serve) -> None:
    served = await serve(max_unsent_bytes=2_000_000, max_message_bytes=500_000, send_stall_timeout_s=0.3)
    peer = await served.peer(settings={INITIAL_WINDOW_SIZE: 0})
    before = psutil.Process().memory_info().rss
    for stream in range(1, 401, 2):
        peer.send(*peer.request(stream, headers("/test.Service/Size"), framed(b"500000")))
    refused = 0
    while refused < 150:
        frame = await peer.until(HeadersFrame)
        refused += peer.response(frame).get("grpc-status") == str(int(Status.RESOURCE_EXHAUSTED))
    assert grown_since(before) < 20_000_000
    await served.others_are_served()
    started = asyncio.get_running_loop().time()
    while not peer.ended:  # PINGs are no progress
        peer.send(PingFrame(0, b"still on"))
        while not peer.ended and not isinstance(await peer.read(), PingFrame):
            pass
        await asyncio.sleep(0.02)
    assert asyncio.get_running_loop().time() - started < 5


async def test_a_peer_that_does_not_read_its_socket_is_bounded_and_then_given_up(serve: Serve) -> None:
    # More than the kernel's own buffers hold, or nothing would have to wait.
    served = await serve(max_unsent_bytes=30_000_000, max_message_bytes=500_000, send_stall_timeout_s=0.3)
    peer = await served.peer(settings={INITIAL_WINDOW_SIZE: 2**31 - 1})
    peer._writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's transports of sockets have it
    peer.send(WindowUpdateFrame(0, window_increment=2**31 - 1 - 65_535))
    before = psutil.Process().memory_info().rss
    for stream in range(1, 2001, 2):
        peer.send(*peer.request(stream, headers("/test.Service/Size"), framed(b"500000")))
    await served.others_are_served()
    assert grown_since(before) < 90_000_000
    await served.until(lambda: served.server.connections == 1)
    await peer.close()


async def test_a_slow_reader_gets_everything_in_the_end(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer(settings={INITIAL_WINDOW_SIZE: 1000})
    peer.send(*peer.request(1, headers("/test.Service/Size"), framed(b"100000")))
    got = 0
    while True:
        frame = await peer.read()
        if isinstance(frame, DataFrame):
            got += len(frame.data)
            peer.open_window(1, len(frame.data))
        elif isinstance(frame, HeadersFrame) and "END_STREAM" in frame.flags:
            break
    assert got == 100_005


async def test_a_handler_whose_client_does_not_read_waits(serve: Serve) -> None:
    served = await serve()
    sent: list[int] = []

    async def talk(call: StreamCall) -> None:
        for number in range(1000):
            await call.send(bytes(100_000))
            sent.append(number)

    served.server.add_stream("/test.Service/Talk", talk)
    peer = await served.peer()
    peer.send(*peer.request(1, headers("/test.Service/Talk")))
    await peer.until(DataFrame)
    await peer.pong()
    assert len(sent) < 30
    await peer.close()


async def test_a_message_that_is_not_taken_closes_the_window(serve: Serve) -> None:
    served = await serve(stream_window_bytes=65_535)
    peer = await served.peer()
    peer.send(*peer.request(1, headers("/test.Service/Idle"), end=False))
    window, connection, sent = 65_535, 65_535, 0
    body = framed(bytes(10_000))
    while sent < 10_000_000:
        if window < len(body) or connection < len(body):
            seen = len(peer.frames)
            await peer.pong()
            for frame in peer.frames[seen:]:
                if isinstance(frame, WindowUpdateFrame) and frame.stream_id:
                    window += frame.window_increment
                elif isinstance(frame, WindowUpdateFrame):
                    connection += frame.window_increment
            if window < len(body) or connection < len(body):
                break
        peer.send(DataFrame(1, body))
        window, connection, sent = window - len(body), connection - len(body), sent + len(body)
    assert 1_000_000 < sent < 2_000_000
    await peer.close()
    await served.until(lambda: served.cancelled == 1)


async def test_a_client_that_vanishes_in_the_middle_of_everything_leaves_nothing(serve: Serve) -> None:
    served = await serve()
    for cut in range(0, 120, 7):
        peer = await served.peer()
        frames: list[Frame] = [
            *peer.request(1, headers("/test.Service/Hold"), HELLO),
            *peer.request(3, headers("/test.Service/Idle"), HELLO),
            *peer.request(5, body=HELLO[:7], end=False),
        ]  # fmt: skip
        data = b"".join(frame.serialize() for frame in frames)
        await peer.send_all(data[: len(data) - cut])
        await peer.close()
    await served.until(lambda: served.server.connections == 1)
    assert served.server.calls == 0
