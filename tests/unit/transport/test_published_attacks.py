"""Attacks on HTTP/2 that were published, by their names, where test_hostile_peer.py does not have them already.

There: rapid reset (CVE-2023-44487), floods of PING, SETTINGS and empty frames (CVE-2019-9512, 9515, 9518), of
CONTINUATION (2024), header bombs (CVE-2016-6581), answers that are not read (CVE-2019-9517), slow prefaces.
Each ends the connection or costs little, and another connection is served all the while.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

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
from tests.rawh2 import RawPeer, framed, headers
from tests.served import Serve, Served, grown_since

EVERY_LOOP = True
INITIAL_WINDOW_SIZE, HEADER_TABLE_SIZE = 4, 1
ENHANCE_YOUR_CALM, LAST_STREAM = 11, 2**31 - 1
HELLO = framed(b"hello")
HOLD = headers("/test.Service/Hold")


async def ended(served: Served, peer: RawPeer) -> int | None:
    """The code of the GOAWAY that ended the connection; None when it was closed without. Others are served."""
    await served.others_are_served()
    frames = await peer.until_end()
    codes = [frame.error_code for frame in frames if isinstance(frame, GoAwayFrame)]
    return codes[-1] if codes else None


# What makes a server reset a stream by itself, each with the frames that open the call.
PROVOKED: dict[str, Callable[[RawPeer, int], list[Frame]]] = {
    "window overflow": lambda peer, stream: [
        *peer.request(stream, HOLD, HELLO), WindowUpdateFrame(stream, window_increment=2**31 - 1),
    ],
    "other length than stated": lambda peer, stream: [
        *peer.request(stream, [*HOLD, ("content-length", "3")], HELLO),
    ],
    "malformed trailers": lambda peer, stream: [
        *peer.request(stream, HOLD, HELLO, end=False),
        HeadersFrame(stream, peer.encode([(":path", "/again")]), flags=["END_HEADERS", "END_STREAM"]),
    ],
    "malformed headers": lambda peer, stream: peer.request(stream, [*HOLD, (":path", "/again")], HELLO),
}  # fmt: skip


@pytest.mark.parametrize("how", PROVOKED)
async def test_provoked_resets_are_ended_as_rapid_ones_are(serve: Serve, how: str) -> None:
    """MadeYouReset, CVE-2025-8671."""
    served = await serve()
    peer = await served.peer()
    for stream in range(1, 10_000, 2):
        data = b"".join(frame.serialize() for frame in PROVOKED[how](peer, stream))
        if not await peer.send_all(data):
            break
        if stream % 400 == 1:  # slow enough to stay below the limit of open calls
            peer.send(PingFrame(0, b"12345678"))
            while not peer.ended and not isinstance(await peer.read(), PingFrame):
                pass
    assert await ended(served, peer) == ENHANCE_YOUR_CALM
    await served.until(lambda: served.server.calls == 0)
    assert len(served.held) < 2000


async def test_a_few_provoked_resets_fail_their_calls_alone(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    for stream in range(1, 41, 2):
        peer.send(*PROVOKED["window overflow"](peer, stream))
    peer.send(*peer.request(41, body=HELLO))
    assert await peer.status(41) == (0, "")


async def test_refused_calls_of_a_peer_that_does_not_read_are_bounded(serve: Serve) -> None:
    """Each costs a reset, which waits; a peer that has not acknowledged our SETTINGS may open any number."""
    served = await serve(max_concurrent_streams=3, send_stall_timeout_s=60.0, max_message_bytes=2**25)
    peer = await served.peer(acknowledge=False, settings={INITIAL_WINDOW_SIZE: 2**31 - 1})
    peer._writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's transports of sockets have it
    peer.send(WindowUpdateFrame(0, window_increment=2**31 - 1 - 65_535))
    # More than the kernel's own buffers hold.
    peer.send(*peer.request(1, headers("/test.Service/Size"), framed(b"30000000")))
    for stream in (3, 5):
        peer.send(*peer.request(stream, HOLD, HELLO))
    await served.until(lambda: len(served.held) == 2)
    before = psutil.Process().memory_info().rss
    for stream in range(7, 200_000, 2):
        if not await peer.send_all(b"".join(frame.serialize() for frame in peer.request(stream, HOLD))):
            break
        if served.server.connections == 1:
            break
    assert grown_since(before) < 40_000_000
    await served.others_are_served()
    assert len(served.held) == 2


async def test_dribbled_windows_send_dribbles_alone(serve: Serve) -> None:
    """Data dribble, CVE-2019-9511: a byte of window at a time."""
    served = await serve()
    peer = await served.peer(settings={INITIAL_WINDOW_SIZE: 0})
    peer.send(*peer.request(1, headers("/test.Service/Size"), framed(b"500000")))
    await peer.until(HeadersFrame)
    for _ in range(300):
        peer.send(WindowUpdateFrame(1, window_increment=1))
        assert len((await peer.until(DataFrame)).data) == 1
    await served.others_are_served()


@pytest.mark.parametrize("toggled", [INITIAL_WINDOW_SIZE, HEADER_TABLE_SIZE], ids=["window", "table"])
async def test_settings_that_change_to_and_fro_are_ended(serve: Serve, toggled: int) -> None:
    """Each makes every stream's window, or the table of headers, anew."""
    served = await serve()
    peer = await served.peer()
    for stream in range(1, 401, 2):
        peer.send(*peer.request(stream, HOLD, HELLO))
    for times in range(3000):
        if not await peer.send_all(SettingsFrame(0, settings={toggled: times % 2 * 4096}).serialize()):
            break
        if times % 100 == 0:
            await asyncio.sleep(0)
    assert await ended(served, peer) == ENHANCE_YOUR_CALM
    await served.until(lambda: served.cancelled == 200)


async def test_one_settings_frame_of_very_many_is_refused(serve: Serve) -> None:
    """CVE-2020-11080: 2,400 entries in each."""
    served = await serve()
    peer = await served.peer()
    payload = struct.pack(">HI", INITIAL_WINDOW_SIZE, 65_535) * 2400
    peer.raw((struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", 4, 0, 0) + payload) * 20)
    await ended(served, peer)
    assert peer.ended


async def test_calls_that_depend_on_each_other_or_themselves_are_calls_as_others(serve: Serve) -> None:
    """Dependency cycles (CVE-2015-8659) and reshuffled trees (CVE-2019-9513)."""
    served = await serve()
    peer = await served.peer()
    last = 1
    for stream in range(1, 1001, 2):
        opened = HeadersFrame(stream, peer.encode(headers()), depends_on=stream + 2, stream_weight=255, exclusive=True,
                              flags=["END_HEADERS", "PRIORITY"])  # fmt: skip
        peer.send(opened, DataFrame(stream, HELLO, flags=["END_STREAM"]))
        peer.send(*(PriorityFrame(other, depends_on=other % 7, exclusive=True) for other in range(1, 9, 2)))
        last = stream
    assert await peer.status(last) == (0, "")
    peer.send(HeadersFrame(last + 2, peer.encode(headers()), depends_on=last + 2, flags=["END_HEADERS", "PRIORITY"]))
    await served.others_are_served()


async def test_nameless_headers_leak_nothing(serve: Serve) -> None:
    """0-length headers leak, CVE-2019-9516."""
    served = await serve()
    peer = await served.peer()
    before = psutil.Process().memory_info().rss
    stream = 1
    while stream < 2001 and not peer.ended:
        block = peer.encode(headers("/test.Service/Hold")) + b"\x00\x00\x00" * 500
        if not await peer.send_all(HeadersFrame(stream, block, flags=["END_HEADERS"]).serialize()):
            break
        stream += 2
    await served.others_are_served()
    assert grown_since(before) < 20_000_000
    assert served.held == []


async def test_table_sizes_again_and_again_in_a_block_are_an_error(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    # RFC 7541, 4.2: two updates at most between two blocks; the first frame holds 16,000.
    peer.send(HeadersFrame(1, peer.encode(headers()) + b"\x20" * 16_000, flags=["END_HEADERS", "END_STREAM"]))
    await ended(served, peer)
    assert peer.ended


async def test_headers_that_never_end_are_given_up_with_the_connection(serve: Serve) -> None:
    """Slow headers: nothing can be said on the connection before they end, so a PING is not answered either."""
    served = await serve(keepalive_s=0.1, keepalive_timeout_s=0.1)
    peer = await served.peer()
    peer.send(HeadersFrame(1, peer.encode(headers()[:2])))
    await served.others_are_served()
    await peer.until_end()


async def test_the_last_id_of_a_stream_is_served_and_none_behind_it(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, HOLD, HELLO))
    peer.send(*peer.request(LAST_STREAM, body=HELLO))
    assert await peer.status(LAST_STREAM) == (0, "")
    peer.send(*peer.request(3, HOLD, HELLO))  # passed over: it is below
    await peer.pong()
    assert len(served.held) == 1
    served.held[0].reply(b"late")
    assert await peer.status(1) == (0, "")


async def test_a_channel_whose_ids_run_out_opens_another_connection(serve: Serve) -> None:
    """After 2**30 calls."""
    served = await serve()
    [connection] = served.good._open
    connection.skip_to(LAST_STREAM)
    await served.others_are_served()
    assert not connection.request_allowed()
    await served.others_are_served()
    assert any(one.request_allowed() for one in served.good._open)
    # The one without ids is of no more use to anybody.
    await served.until(lambda: connection not in served.good._open)


async def test_frames_of_unknown_kinds_cost_nothing(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    unknown = b"".join(b"\0\0\x08" + bytes([kind]) + b"\0\0\0\0\0" + bytes(8) for kind in (11, 13, 99, 255))
    before = psutil.Process().memory_info().rss
    for _ in range(50):
        await peer.send_all(unknown * 500)
    await peer.pong()
    assert grown_since(before) < 20_000_000
    await served.others_are_served()


async def test_a_flood_of_goaway_is_ended(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, HOLD, HELLO))
    for _ in range(50):
        if not await peer.send_all(GoAwayFrame(0, last_stream_id=0).serialize() * 100):
            break
    assert await ended(served, peer) == ENHANCE_YOUR_CALM


async def test_padding_alone_is_given_back_to_the_window(serve: Serve) -> None:
    """DATA of nothing but padding counts in the windows; a call behind 20 MB of it is served."""
    served = await serve()
    peer = await served.peer()
    peer.send(*peer.request(1, headers("/test.Service/Stream"), end=False))
    padding = DataFrame(1, b"", flags=["PADDED"], pad_length=255).serialize()
    for _ in range(80):
        await peer.send_all(padding * 100)
        await peer.pong()
    peer.send(DataFrame(1, HELLO, flags=["END_STREAM"]))
    assert await peer.status(1) == (0, "")
    await served.others_are_served()


async def test_headers_in_frames_of_a_byte_are_a_flood(serve: Serve) -> None:
    served = await serve()
    peer = await served.peer()
    block = peer.encode([*headers(), ("x", "y" * 3000)])
    peer.send(HeadersFrame(1, block[:1]), *(ContinuationFrame(1, block[at : at + 1]) for at in range(1, len(block))))
    await ended(served, peer)
    assert peer.ended


async def test_a_crowd_of_connections_that_say_nothing_keeps_nobody_out(serve: Serve) -> None:
    served = await serve(handshake_timeout_s=0.3)
    silent = [await served.peer(greet=False) for _ in range(200)]
    await served.others_are_served()
    for peer in silent:
        await peer.until_end()
    await served.until(lambda: served.server.connections == 1)


async def test_calls_opened_and_left_are_ended_at_their_deadline_and_else_bounded(serve: Serve) -> None:
    served = await serve(max_concurrent_streams=50)
    peer = await served.peer()
    for stream in range(1, 101, 2):
        peer.send(*peer.request(stream, headers(grpc_timeout="30m"), end=False))
    assert (await peer.status(1))[0] == Status.DEADLINE_EXCEEDED
    await served.until(lambda: served.server.calls == 0)
    await peer.pong()
    assert not [frame for frame in peer.frames if isinstance(frame, RstStreamFrame) and frame.error_code == 7]
