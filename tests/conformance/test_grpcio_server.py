"""Our channel against grpcio's aio server."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from mmcore.errors import RpcError, Status
from mmcore.transport import Channel, ClientCall
from tests.echoing import WITHIN_S, LoopThread
from tests.sessions import SETTINGS

#: grpcio's server has a thread and an asyncio loop of its own, whatever ours is.
EVERY_LOOP = True
LARGE = replace(SETTINGS, max_message_bytes=64 * 2**20)
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Service(grpc.GenericRpcHandler):
    """An echo service of grpcio's; ``cancelled`` counts the calls that were."""

    def __init__(self) -> None:
        self.held = 0
        self.cancelled = 0
        self.metadata: list[tuple[str, Any]] = []
        self.release = asyncio.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        name = details.method.rpartition("/")[2].lower()
        kinds = {
            "unary": grpc.unary_unary_rpc_method_handler, "fail": grpc.unary_unary_rpc_method_handler,
            "hold": grpc.unary_unary_rpc_method_handler, "compressed": grpc.unary_unary_rpc_method_handler,
            "size": grpc.unary_unary_rpc_method_handler, "peer": grpc.unary_unary_rpc_method_handler,
            "bidi": grpc.stream_stream_rpc_method_handler, "count": grpc.unary_stream_rpc_method_handler,
            "sum": grpc.stream_unary_rpc_method_handler,
        }  # fmt: skip
        return kinds[name](getattr(self, name)) if name in kinds else None

    async def unary(self, body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        metadata = list(context.invocation_metadata() or ())
        self.metadata = metadata
        echoed = [pair for pair in metadata if pair[0].startswith("echo-")]
        await context.send_initial_metadata((("initial", "yes"), *echoed))
        context.set_trailing_metadata(tuple(echoed))
        return body

    async def peer(self, body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return context.peer().encode()

    async def size(self, body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return bytes(int(body))

    async def fail(self, body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        code, _, text = body.decode().partition(" ")
        kind = next(kind for kind in grpc.StatusCode if kind.value[0] == int(code))
        await context.abort(kind, text, (("why", "because"), ("why-bin", b"\x00\x01")))
        raise AssertionError

    async def hold(self, body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        self.held += 1
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return b"released"

    async def compressed(self, body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        context.set_compression(grpc.Compression.Gzip)
        return body

    async def bidi(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for body in requests:
            yield body
        context.set_trailing_metadata((("last", "word"),))

    async def count(self, body: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        for number in range(int(body)):
            yield b"%d" % number
        if int(body) == 13:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "unlucky")

    async def sum(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        total = 0
        async for body in requests:
            total += len(body)
        return b"%d" % total


class Peer:
    """grpcio's server, in a thread with an asyncio loop."""

    def __init__(self) -> None:
        self.thread = LoopThread("asyncio")
        self.target = ""
        self._server: grpc.aio.Server

    async def _start(self, address: str, credentials: grpc.ServerCredentials | None, options: Any) -> None:
        self.service = Service()
        self._server = grpc.aio.server(options=[*UNLIMITED, *options])
        self._server.add_generic_rpc_handlers((self.service,))
        if credentials is not None:
            port = self._server.add_secure_port(address, credentials)
        else:
            port = self._server.add_insecure_port(address)
        await self._server.start()
        self.target = address if address.startswith("unix:") else f"127.0.0.1:{port}"

    def start(
        self,
        address: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
        options: list[tuple[str, Any]] | tuple[()] = (),
    ) -> None:
        self.thread.run(self._start(address, credentials, options))

    async def stop(self, grace_s: float | None = None) -> None:
        await asyncio.wrap_future(self.thread.start(self._server.stop(grace_s)))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the service's counters say so."""
        async with asyncio.timeout(WITHIN_S):
            while not condition():
                await asyncio.sleep(0.002)

    def end(self) -> None:
        self.thread.run(self._server.stop(None))
        self.thread.end()


StartPeer = Callable[..., Peer]
Open = Callable[..., Channel]


@pytest.fixture
def start() -> Any:
    running: list[Peer] = []

    def begin(*args: Any, **options: Any) -> Peer:
        running.append(Peer())
        running[-1].start(*args, **options)
        return running[-1]

    yield begin
    for one in running:
        one.end()


@pytest.fixture
def peer(start: StartPeer) -> Peer:
    return start()


@pytest.fixture
async def open_channel() -> AsyncIterator[Open]:
    opened: list[Channel] = []

    def make(target: str, **options: Any) -> Channel:
        opened.append(Channel(target, **options))
        return opened[-1]

    yield make
    for channel in opened:
        await channel.close()


@pytest.fixture
async def channel(peer: Peer, open_channel: Open) -> Channel:
    return open_channel(peer.target, settings=LARGE)


async def failure(call: Awaitable[Any]) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await call
    return caught.value


# -- unary


async def test_metadata_goes_both_ways_with_binary_and_repeated_names(peer: Peer, channel: Channel) -> None:
    sent: list[tuple[str, str | bytes]] = [
        ("echo-a", "1"), ("echo-bin", bytes(range(256))), ("echo-a", "2"), ("x", "kept"),
    ]  # fmt: skip
    await channel.connect()
    done: asyncio.Future[ClientCall] = asyncio.get_running_loop().create_future()
    channel.start("/e.E/Unary", b"body", done.set_result, metadata=sent)
    call = await done
    assert (call.status, call.message) == (Status.OK, b"body")
    assert sorted(call.initial_metadata) == sorted([("initial", "yes"), *sent[:3]])
    assert sorted(call.trailers) == sorted(sent[:3])
    assert set(sent) <= {tuple(pair) for pair in peer.service.metadata}


@pytest.mark.parametrize("text", ["plain", "sn☃w 😀", "50% \r\n\ttabs", ""])
async def test_errors_keep_status_text_and_trailers(channel: Channel, text: str) -> None:
    for code in (1, 5, 16):
        error = await failure(channel.unary("/e.E/Fail", f"{code} {text}".encode()))
        assert (error.status, error.details) == (code, text)
        assert set(error.trailers) >= {("why", "because"), ("why-bin", b"\x00\x01")}


async def test_an_unknown_method_is_unimplemented(channel: Channel) -> None:
    assert (await failure(channel.unary("/e.E/Nothing", b""))).status == Status.UNIMPLEMENTED


@pytest.mark.parametrize("size", [0, 1, 602_112, 64 * 2**20])
async def test_messages_of_any_size_come_back(channel: Channel, size: int) -> None:
    body = (bytes(range(256)) * (size // 256 + 1))[:size]
    assert await channel.unary("/e.E/Unary", body, timeout_s=WITHIN_S) == body
    halves: list[bytes | memoryview] = [memoryview(body)[: size // 2], memoryview(body)[size // 2 :]]
    assert await channel.unary("/e.E/Unary", halves, timeout_s=WITHIN_S) == body


async def test_an_answer_above_the_limit_fails_without_harming_others(peer: Peer, open_channel: Open) -> None:
    channel = open_channel(peer.target, settings=replace(SETTINGS, max_message_bytes=1000))
    calls = [channel.unary("/e.E/Size", size, timeout_s=WITHIN_S) for size in (b"1001", b"1000", b"50000000")]
    long, exact, longer = await asyncio.gather(*calls, return_exceptions=True)
    assert exact == bytes(1000)
    for error in (long, longer):
        assert isinstance(error, RpcError)
        assert error.status == Status.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("encoding", ["gzip", "deflate", None])
async def test_compression_of_requests_and_answers(channel: Channel, encoding: str | None) -> None:
    body = b"compressible " * 5000
    assert await channel.unary("/e.E/Compressed", body, encoding=encoding, timeout_s=WITHIN_S) == body


async def test_many_concurrent_calls_get_their_own_answers(peer: Peer, open_channel: Open) -> None:
    channel = open_channel(peer.target, connections=3)
    await channel.connect()
    answers = await asyncio.gather(*(channel.unary("/e.E/Unary", b"%d" % n) for n in range(1000)))
    assert answers == [b"%d" % n for n in range(1000)]


async def test_a_deadline_ends_the_call_on_both_sides(peer: Peer, channel: Channel) -> None:
    await channel.connect()
    started = time.monotonic()
    error = await failure(channel.unary("/e.E/Hold", b"", timeout_s=0.4))
    assert error.status == Status.DEADLINE_EXCEEDED
    assert 0.39 < time.monotonic() - started < 5
    await peer.until(lambda: peer.service.cancelled == 1)


async def test_a_cancelled_caller_cancels_the_call(peer: Peer, channel: Channel) -> None:
    task = asyncio.create_task(channel.unary("/e.E/Hold", b""))
    await peer.until(lambda: peer.service.held == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await peer.until(lambda: peer.service.cancelled == 1)


async def test_more_calls_than_the_server_allows_wait_for_a_place(start: StartPeer, open_channel: Open) -> None:
    peer = start(options=[("grpc.max_concurrent_streams", 2)])
    channel = open_channel(peer.target)
    await channel.unary("/e.E/Unary", b"")  # the server's limit is known from here on
    calls = [asyncio.create_task(channel.unary("/e.E/Hold", b"")) for _ in range(5)]
    late = asyncio.create_task(channel.unary("/e.E/Unary", b"", timeout_s=0.05))
    assert (await failure(late)).status == Status.DEADLINE_EXCEEDED
    await peer.until(lambda: peer.service.held == 2)
    peer.thread.call(peer.service.release.set)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    # grpcio counts one that it has answered for a moment longer; what it refuses twice for that fails.
    others = [answer for answer in answers if answer != b"released"]
    assert len(others) <= 2
    assert all(isinstance(one, RpcError) and one.status == Status.UNAVAILABLE for one in others), others


# -- streams


async def test_a_bidirectional_stream_is_answered_message_by_message(channel: Channel) -> None:
    stream = await channel.stream("/e.E/Bidi", timeout_s=WITHIN_S)
    for size in (0, 5, 700_000, 1):
        await stream.send(b"m" * size)
        assert await anext(stream) == b"m" * size
    await stream.end()
    assert [one async for one in stream] == []
    assert stream.trailers == (("last", "word"),)


async def test_server_and_client_streams(channel: Channel) -> None:
    stream = await channel.stream("/e.E/Count", timeout_s=WITHIN_S)
    await stream.send(b"1000")
    await stream.end()
    assert [one async for one in stream] == [b"%d" % n for n in range(1000)]
    stream = await channel.stream("/e.E/Sum", timeout_s=WITHIN_S)
    for _ in range(20):
        await stream.send(bytes(3_000_000))
    await stream.end()
    assert [one async for one in stream] == [b"60000000"]


async def test_a_streams_error_comes_after_its_messages(channel: Channel) -> None:
    stream = await channel.stream("/e.E/Count", timeout_s=WITHIN_S)
    await stream.send(b"13")
    await stream.end()
    got = []
    with pytest.raises(RpcError) as caught:
        async for one in stream:
            got.append(one)
    assert len(got) == 13
    assert (caught.value.status, caught.value.details) == (Status.FAILED_PRECONDITION, "unlucky")


async def test_a_cancelled_stream_ends_iteration_and_waiting_senders(channel: Channel) -> None:
    stream = await channel.stream("/e.E/Hold")
    await stream.send(b"")

    async def send_for_ever() -> None:
        while not stream._call.cancelled:
            await stream.send(bytes(1_000_000))

    sender = asyncio.create_task(send_for_ever())
    await asyncio.sleep(0)
    stream.cancel()
    with pytest.raises(RpcError) as caught:
        await anext(stream)
    assert caught.value.status == Status.CANCELLED
    await asyncio.wait_for(sender, WITHIN_S)


# -- the connection


async def test_a_target_that_is_not_there_fails_fast_and_says_why(open_channel: Open) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{unused.getsockname()[1]}"
        channel = open_channel(target)
        for _ in range(3):
            error = await failure(channel.unary("/e.E/Unary", b""))
            assert error.status == Status.UNAVAILABLE
            assert target in error.details
        error = await failure(channel.unary("/e.E/Unary", b"", wait_for_ready=True, timeout_s=0.3))
        assert error.status == Status.DEADLINE_EXCEEDED


async def test_wait_for_ready_lasts_until_the_server_comes(
    start: StartPeer, open_channel: Open, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/socket"
    channel = open_channel(address, settings=replace(SETTINGS, backoff_s=0.01, max_backoff_s=0.02))
    assert (await failure(channel.unary("/e.E/Unary", b""))).status == Status.UNAVAILABLE
    call = asyncio.create_task(channel.unary("/e.E/Unary", b"patience", wait_for_ready=True, timeout_s=WITHIN_S))
    await asyncio.to_thread(start, address)
    assert await call == b"patience"


async def test_a_restarted_server_is_found_again(start: StartPeer, open_channel: Open, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    channel = open_channel(address, settings=replace(SETTINGS, backoff_s=0.01, max_backoff_s=0.02), connections=2)
    for restart in range(3):
        peer = await asyncio.to_thread(start, address)
        body = b"%d" % restart
        assert await channel.unary("/e.E/Unary", body, wait_for_ready=True, timeout_s=WITHIN_S) == body
        await peer.stop()


async def test_calls_in_flight_end_with_unavailable_when_the_server_stops(peer: Peer, channel: Channel) -> None:
    call = asyncio.create_task(channel.unary("/e.E/Hold", b""))
    await peer.until(lambda: peer.service.held == 1)
    await peer.stop()
    assert (await failure(call)).status in (Status.UNAVAILABLE, Status.CANCELLED)


async def test_a_leaving_server_answers_what_it_has(peer: Peer, channel: Channel) -> None:
    call = asyncio.create_task(channel.unary("/e.E/Hold", b""))
    await peer.until(lambda: peer.service.held == 1)
    stopping = asyncio.create_task(peer.stop(WITHIN_S))
    await peer.until(lambda: not channel._usable())
    assert not call.done()
    peer.thread.call(peer.service.release.set)
    assert await call == b"released"
    await stopping


async def test_an_old_connection_is_replaced_without_failing_a_call(start: StartPeer, open_channel: Open) -> None:
    peer = start(options=[("grpc.max_connection_age_ms", 100), ("grpc.max_connection_age_grace_ms", 5000)])
    channel = open_channel(peer.target)
    seen = set()
    async with asyncio.timeout(WITHIN_S):
        while len(seen) < 3:
            seen.add(await channel.unary("/e.E/Peer", b"", timeout_s=WITHIN_S))


async def test_a_closed_channel_ends_its_calls_and_takes_no_more(peer: Peer, channel: Channel) -> None:
    call = asyncio.create_task(channel.unary("/e.E/Hold", b""))
    await peer.until(lambda: peer.service.held == 1)
    await channel.close()
    assert (await failure(call)).status == Status.UNAVAILABLE
    assert (await failure(channel.unary("/e.E/Unary", b""))).status == Status.UNAVAILABLE
    assert (await failure(channel.connect())).status == Status.UNAVAILABLE
    await peer.until(lambda: peer.service.cancelled == 1)


async def test_a_channel_closed_while_it_connects_says_so(open_channel: Open) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        filler = [socket.socket() for _ in range(3)]  # the queue of connections is full, ours stays half open
        for one in filler:
            one.setblocking(False)
            one.connect_ex(silent.getsockname())
        channel = open_channel(f"127.0.0.1:{silent.getsockname()[1]}")
        call = asyncio.create_task(channel.unary("/e.E/Unary", b""))
        await asyncio.sleep(0.01)
        await channel.close()
        assert (await failure(call)).status == Status.UNAVAILABLE
        for one in filler:
            one.close()


async def test_our_keepalive_is_answered_and_a_dead_peer_noticed(peer: Peer, open_channel: Open) -> None:
    settings = replace(SETTINGS, keepalive_s=0.01, keepalive_timeout_s=0.5)
    channel = open_channel(peer.target, settings=settings)
    assert (await failure(channel.unary("/e.E/Hold", b"", timeout_s=2.5))).status == Status.DEADLINE_EXCEEDED
    with socket.socket() as silent:  # accepts by its queue, and never says a word
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        dead = open_channel(f"127.0.0.1:{silent.getsockname()[1]}", settings=settings)
        error = await failure(dead.unary("/e.E/Unary", b"", timeout_s=WITHIN_S))
        assert error.status == Status.UNAVAILABLE


async def test_a_peer_that_owes_an_answer_is_found_dead_sooner(open_channel: Open) -> None:
    settings = replace(SETTINGS, keepalive_waiting_s=0.01, keepalive_timeout_s=0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        channel = open_channel(f"127.0.0.1:{silent.getsockname()[1]}", settings=settings)
        error = await failure(channel.unary("/e.E/Unary", b"", timeout_s=WITHIN_S))
        assert error.status == Status.UNAVAILABLE


async def test_a_connection_that_is_lost_before_its_first_word_is_not_waited_for(open_channel: Open) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.transport.abort(), "127.0.0.1", 0)
    async with server:
        channel = open_channel(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with asyncio.timeout(WITHIN_S):
            error = await failure(channel.greeted(2 * WITHIN_S))
    assert error.status == Status.UNAVAILABLE


async def test_unix_sockets(start: StartPeer, open_channel: Open, tmp_path: Path) -> None:
    start(f"unix:{tmp_path}/socket")
    assert await open_channel(f"unix:{tmp_path}/socket").unary("/e.E/Unary", b"x") == b"x"


async def test_tls(start: StartPeer, open_channel: Open, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    peer = start(credentials=credentials)
    channel = open_channel(
        peer.target, ssl=ssl.create_default_context(cafile=cert), server_name="localhost", settings=LARGE
    )
    for size in (0, 10, 602_112, 10_000_000):
        assert await channel.unary("/e.E/Unary", bytes(size), timeout_s=WITHIN_S) == bytes(size)
    stream = await channel.stream("/e.E/Bidi", timeout_s=WITHIN_S)

    async def send() -> None:
        for _ in range(20):
            await stream.send(bytes(500_000))
        await stream.end()

    sender = asyncio.create_task(send())  # beside the reader: who does not read is not sent to
    assert sum([len(one) async for one in stream]) == 10_000_000
    await sender
    stranger = open_channel(peer.target, ssl=ssl.create_default_context(), server_name="localhost")
    error = await failure(stranger.unary("/e.E/Unary", b""))
    assert error.status == Status.UNAVAILABLE
    assert "certificate" in error.details.lower()
