"""Requests passed on between servers of one loop: what the client sees is what the holder answers."""

from __future__ import annotations

import asyncio
import gc
import gzip
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from mmcore._ext.h2 import live_objects
from mmcore.errors import Overloaded, RpcError, Status
from mmcore.routing.forwarding import Forwarding, Unanswered
from mmcore.routing.hops import Mode, arrival_of, not_here
from mmcore.routing.peers import Peer
from mmcore.transport import Channel, Metadata, Server, ServerCall, StreamCall
from tests.echoing import EchoService

EVERY_LOOP = True
WITHIN_S = 20.0
UNARY = "/echo.Echo/Unary"
METHODS = ("Unary", "Fail", "Hold", "Size", "Compressed", "Where")
STREAMS = ("Bidi", "Count", "Sum", "HoldStream")


async def until(condition: Callable[[], object], what: str) -> None:
    ends_at = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < ends_at, f"not within {WITHIN_S} s: {what}"
        await asyncio.sleep(0.002)


class Holder:
    """An instance that holds the model, or does not: ``answer`` may take the place of its unary handler."""

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.service = EchoService()
        self.server = Server()
        self.service.add_to(self.server)
        self.server.add_unary("/echo.Echo/Where", self.where)
        self.answer: Callable[[ServerCall, bytes], bytes | None] = lambda call, body: instance.encode()
        self.asked = 0
        self.address = ""

    def where(self, call: ServerCall, body: bytes) -> bytes | None:
        self.asked += 1
        return self.answer(call, body)

    async def listen(self) -> None:
        self.address = await self.server.listen_tcp("127.0.0.1", 0, internal=True)

    def not_here(self, call: ServerCall, body: bytes) -> None:
        not_here(call, self.instance)


class Front:
    """The instance that clients call; it has nothing itself and passes all on to ``holders``."""

    def __init__(self) -> None:
        self.server = Server()
        self.stale: list[tuple[str, str]] = []
        self.down: list[str] = []
        self.unanswered: list[Unanswered] = []
        self.forwarding = Forwarding(
            "front", on_not_here=lambda *what: self.stale.append(what), on_down=self.down.append
        )
        self.forwarding.working = self.server.working
        self.holders: tuple[Peer, ...] = ()
        self.options: dict[str, Any] = {}
        self.kept: list[bytes] | None = None
        for name in METHODS:
            self.server.add_unary(f"/echo.Echo/{name}", self.unary)
        for name in STREAMS:
            self.server.add_stream(f"/echo.Echo/{name}", self.stream)

    def unary(self, call: ServerCall, body: bytes) -> None:
        self.forwarding.unary(call, body, "m", self.holders, **self.options)

    async def stream(self, call: StreamCall) -> None:
        self.kept = await self.forwarding.stream(call, "m", self.holders)
        if self.kept is not None:
            raise RpcError(Status.NOT_FOUND, f"nobody takes the stream; {len(self.kept)} messages kept")

    def holds(self, *holders: Holder) -> None:
        for holder in holders:
            self.forwarding.update(holder.instance, holder.address)
        self.holders = self.forwarding.holders(holder.instance for holder in holders)

    def instead(self, call: ServerCall, body: bytes, unanswered: Unanswered) -> None:
        self.unanswered.append(unanswered)
        call.reply(b"instead of " + body)


Start = Callable[..., Awaitable[tuple[Channel, Front, list[Holder]]]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    gc.collect()
    before = live_objects()
    ends: list[Callable[[], Awaitable[None]]] = []

    async def begin(holders: int = 1) -> tuple[Channel, Front, list[Holder]]:
        made = [Holder(f"holder{number}") for number in range(holders)]
        for holder in made:
            await holder.listen()
            ends.append(holder.server.close)
        front = Front()
        channel = Channel(await front.server.listen_tcp("127.0.0.1", 0))
        ends.extend((front.server.close, front.forwarding.close, channel.close))
        front.holds(*made)
        return channel, front, made

    yield begin
    for end in reversed(ends):
        await end()
    # The loop lets go of a connection one turn after it is closed.
    await until(lambda: gc.collect() >= 0 and live_objects() == before, "nothing is left")


def unwanted(metadata: Metadata) -> list[str]:
    return [name for name, _ in metadata if name.startswith("mmcore-")]


# -- what passes


async def test_message_metadata_and_trailers_pass_both_ways(start: Start) -> None:
    channel, _, (holder,) = await start()
    metadata = [("echo-a", "1"), ("echo-b-bin", b"\x00\xff"), ("echo-a", "2"), ("mm-model-id", "m")]
    stream = channel.start  # the plain call tells no metadata
    outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    await channel.connect()
    call = stream(UNARY, b"body", outcome.set_result, metadata=metadata)
    await asyncio.wait_for(outcome, WITHIN_S)
    echoed = tuple(pair for pair in metadata if pair[0].startswith("echo-"))
    assert (call.status, call.message) == (Status.OK, b"body")
    assert call.initial_metadata == (("initial", "yes"), *echoed)
    assert call.trailers == echoed
    seen = [pair for pair in holder.service.seen[0] if pair[0] != "user-agent" and not pair[0].startswith("mmcore-")]
    assert seen == metadata


@pytest.mark.parametrize("size", [0, 1, 5000, 700_000, 9_000_000])
async def test_messages_of_any_size_pass_whole(start: Start, size: int) -> None:
    channel, _, _ = await start()
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert await channel.unary(UNARY, body, timeout_s=WITHIN_S) == body


async def test_an_error_passes_with_its_text_and_trailers(start: Start) -> None:
    channel, _, _ = await start()
    for request, status in ((b"9 no f\xc3\xbcn", 9), (b"raise ouch", 3)):
        with pytest.raises(RpcError) as failed:
            await channel.unary("/echo.Echo/Fail", request, timeout_s=WITHIN_S)
        assert failed.value.status == status
        assert failed.value.details == request.decode().split(" ", 1)[1]
        assert failed.value.trailers == (("why", "because"), ("why-bin", b"\x00\x01"))


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_message_stays_compressed_and_so_does_its_answer(start: Start, encoding: str) -> None:
    channel, front, _ = await start()
    text = b"compress me " * 1000
    await channel.unary(UNARY, b"", timeout_s=WITHIN_S)
    before = front.holders[0].connection()
    assert before is not None
    sent, received = before.bytes_sent, before.bytes_received
    body = encoding.encode() + b" " + text
    answer = await channel.unary("/echo.Echo/Compressed", body, encoding=encoding, timeout_s=WITHIN_S)
    assert answer == text
    assert before.bytes_sent - sent < len(gzip.compress(body)) + 500
    assert before.bytes_received - received < len(gzip.compress(text)) + 500


async def test_the_deadline_passes_and_ends_the_work_at_the_holder(start: Start) -> None:
    channel, front, (holder,) = await start()
    with pytest.raises(RpcError) as failed:
        await channel.unary("/echo.Echo/Hold", b"", timeout_s=0.2)
    assert failed.value.status == Status.DEADLINE_EXCEEDED
    await until(lambda: "cancelled" in holder.service.events, "the holder hears of it")
    assert holder.service.held[0].deadline is not None
    await until(lambda: front.holders[0].in_flight == 0, "nothing is in flight")
    holder.service.held.clear()


async def test_a_caller_that_goes_away_ends_the_work_at_the_holder(start: Start) -> None:
    channel, front, (holder,) = await start()
    await channel.connect()
    calls = [channel.start("/echo.Echo/Hold", b"", lambda call: None) for _ in range(3)]
    await until(lambda: len(holder.service.held) == 3, "the holder has them")
    calls[0].cancel()
    await until(lambda: holder.service.events.count("cancelled") == 1, "one is taken back")
    assert front.holders[0].in_flight == 2
    await channel.close()
    await until(lambda: holder.service.events.count("cancelled") == 3, "the others are")
    assert front.holders[0].in_flight == 0
    holder.service.held.clear()


async def test_latency_and_requests_in_flight_are_measured(start: Start) -> None:
    channel, front, (holder,) = await start()
    peer = front.holders[0]
    assert (peer.in_flight, peer.latency_s, peer.answered) == (0, 0.0, 0)
    asked = asyncio.create_task(channel.unary("/echo.Echo/Hold", b"", timeout_s=WITHIN_S))
    await until(lambda: holder.service.held, "the holder has it")
    assert peer.in_flight == 1
    holder.service.release()
    assert await asked == b"released"
    assert (peer.in_flight, peer.answered) == (0, 1)
    measured = peer.latency_s
    assert 0 < measured < WITHIN_S
    # It fades, so that a peer that was slow once is tried again.
    await until(lambda: peer.latency_s < 0.99 * measured, "it counts for less")


async def test_what_a_peer_works_at_comes_with_its_answers_and_goes_no_further(start: Start) -> None:
    channel, front, (holder,) = await start()
    peer = front.holders[0]
    assert peer.others == -1
    direct = Channel(holder.address)
    await direct.connect()
    await channel.connect()
    for expected in (0, 3, 20):
        for _ in range(expected):
            direct.start("/echo.Echo/Hold", b"", lambda call: None)
        await until(lambda expected=expected: len(holder.service.held) == expected, "they are held")
        answers: list[Any] = []
        channel.start("/echo.Echo/Where", b"", answers.append)
        await until(lambda answers=answers: answers, "it is answered")
        assert peer.others == holder.server.working.count == expected
        (answer,) = answers
        assert [name for name, _ in (*answer.initial_metadata, *answer.trailers) if name.startswith("mmcore")] == []
        holder.service.release()
        await until(lambda: holder.server.working.count == 0, "they have been answered")
    # A failed answer tells too, and what the instance has others answer does not count to what it works at.
    forwarded = asyncio.create_task(channel.unary("/echo.Echo/Hold", b"", timeout_s=WITHIN_S))
    await until(lambda: holder.service.held, "the holder has it")
    assert (front.server.working.count, holder.server.working.count) == (0, 1)
    with pytest.raises(RpcError):
        await channel.unary("/echo.Echo/Fail", b"9 no", timeout_s=WITHIN_S)
    assert (peer.in_flight, peer.others) == (1, 0)
    holder.service.release()
    await forwarded
    assert front.server.working.count == holder.server.working.count == 0
    await direct.close()


# -- which holder


async def test_the_holder_with_the_fewest_in_flight_is_asked(start: Start) -> None:
    channel, front, holders = await start(3)
    await channel.connect()
    for _ in range(6):
        channel.start("/echo.Echo/Hold", b"", lambda call: None)
    await until(lambda: sum(len(holder.service.held) for holder in holders) == 6, "all are held")
    assert [len(holder.service.held) for holder in holders] == [2, 2, 2]
    for holder in holders:
        holder.service.release()
    await until(lambda: not any(peer.in_flight for peer in front.holders), "all are answered")


async def test_a_holder_without_the_copy_is_passed_over_and_told_of(start: Start) -> None:
    channel, front, (first, second) = await start(2)
    first.answer = first.not_here
    front.forwarding.choose = lambda peers: peers[0]
    assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"holder1"
    assert front.stale == [("m", "holder0")]
    assert (first.asked, second.asked) == (1, 1)


async def test_when_no_holder_has_it_the_mesh_is_asked_instead(start: Start) -> None:
    channel, front, holders = await start(2)
    for holder in holders:
        holder.answer = holder.not_here
    front.options = {"instead": front.instead}
    assert await channel.unary("/echo.Echo/Where", b"it", timeout_s=WITHIN_S) == b"instead of it"
    assert front.unanswered[0].status is Status.UNAVAILABLE
    assert sorted(front.unanswered[0].tried) == ["holder0", "holder1"]
    front.options = {}
    with pytest.raises(RpcError, match="has no copy of the model") as failed:
        await channel.unary("/echo.Echo/Where", b"it", timeout_s=WITHIN_S)
    assert failed.value.status == Status.UNAVAILABLE
    assert unwanted(failed.value.trailers) == []


async def test_a_full_holder_is_followed_by_one_other(start: Start) -> None:
    channel, front, holders = await start(3)
    front.forwarding.choose = lambda peers: peers[0]

    def full(call: ServerCall, body: bytes) -> None:
        call.fail(Status.RESOURCE_EXHAUSTED, "queue full")

    holders[0].answer = full
    assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"holder1"
    holders[1].answer = full
    with pytest.raises(RpcError, match="queue full"):
        await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S)
    assert [holder.asked for holder in holders] == [2, 2, 0]


async def test_an_answer_that_is_no_failure_of_the_holder_is_not_asked_for_twice(start: Start) -> None:
    channel, _, holders = await start(2)
    for holder in holders:
        holder.answer = lambda call, body: call.fail(Status.INTERNAL, "the model raised")  # type: ignore[func-returns-value]
    with pytest.raises(RpcError, match="the model raised"):
        await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S)
    assert sum(holder.asked for holder in holders) == 1


async def test_what_may_have_run_runs_again_once_and_only_where_that_does_no_harm(start: Start) -> None:
    channel, front, holders = await start(3)

    def crash(call: ServerCall, body: bytes) -> None:
        call.fail(Status.UNAVAILABLE, "the worker crashed")

    for holder in holders:
        holder.answer = crash
    front.options = {"instead": front.instead}
    with pytest.raises(RpcError, match="the worker crashed"):
        await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S)
    assert sum(holder.asked for holder in holders) == 2
    front.options = {"instead": front.instead, "idempotent": False}
    with pytest.raises(RpcError, match="the worker crashed"):
        await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S)
    assert sum(holder.asked for holder in holders) == 3
    assert front.unanswered == []


async def test_a_holder_that_dies_loses_no_request_and_is_asked_again_when_it_is_back(start: Start) -> None:
    channel, front, (first, second) = await start(2)
    front.forwarding.choose = lambda peers: peers[0]
    dying = asyncio.create_task(channel.unary("/echo.Echo/Hold", b"", timeout_s=WITHIN_S))
    await until(lambda: first.service.held, "the first holder has it")
    first.service.held.clear()
    await first.server.close()
    await until(lambda: second.service.held, "the second holder has it")
    assert not front.holders[0].usable
    assert front.down == ["holder0"]
    second.service.release()
    assert await dying == b"released"
    assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"holder1"
    back = Holder("holder0")
    host, _, port = first.address.rpartition(":")
    await back.server.listen_tcp(host, int(port), internal=True)
    await until(lambda: front.holders[0].usable, "the first holder is back")
    assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"holder0"
    assert front.holders[0].failures == 0
    await back.server.close()


async def test_an_instance_that_cannot_be_reached_is_passed_over_before_anything_is_sent(start: Start) -> None:
    channel, front, holders = await start(2)
    await holders[0].server.close()
    front.options = {"idempotent": False}
    front.forwarding.choose = lambda peers: peers[0]
    assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"holder1"
    await holders[1].server.close()
    front.options = {"instead": front.instead}
    assert await channel.unary("/echo.Echo/Where", b"x", timeout_s=WITHIN_S) == b"instead of x"


async def test_a_draining_holder_finishes_what_it_has_and_is_asked_nothing_more(start: Start) -> None:
    channel, front, (first, _) = await start(2)
    front.forwarding.choose = lambda peers: peers[0]
    front.options = {"idempotent": False}
    held = asyncio.create_task(channel.unary("/echo.Echo/Hold", b"", timeout_s=WITHIN_S))
    await until(lambda: first.service.held, "the first holder has it")
    draining = asyncio.create_task(first.server.drain(WITHIN_S))
    await until(lambda: front.holders[0].connection() is None, "it asks us to go")
    for _ in range(20):
        assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"holder1"
    first.service.release()
    assert await held == b"released"
    await draining


async def test_a_slow_holder_does_not_hold_up_the_others(start: Start) -> None:
    channel, front, (first, _) = await start(2)
    await channel.connect()
    front.holders = front.forwarding.holders(["holder0"])
    for _ in range(100):
        channel.start("/echo.Echo/Hold", bytes(100_000), lambda call: None)
    await until(lambda: len(first.service.held) == 100, "the slow one has many")
    front.holders = front.forwarding.holders(["holder0", "holder1"])
    began = time.monotonic()
    for _ in range(50):
        assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"holder1"
    assert time.monotonic() - began < WITHIN_S
    first.service.held.clear()


# -- no loops, no spoofing


async def test_the_holder_learns_how_a_request_came(start: Start) -> None:
    channel, front, (holder,) = await start()
    seen: list[Any] = []

    def look(call: ServerCall, body: bytes) -> bytes:
        seen.append(arrival_of(call))
        return b""

    holder.answer = look
    await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S)
    front.options = {"mode": Mode.LOAD, "resolved": True}
    await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S)
    assert seen == [(Mode.HIT, 1, ("front",), ""), (Mode.LOAD, 1, ("front",), "m")]
    assert [arrival.goes_on for arrival in seen] == [False, True]


async def test_clients_cannot_pretend_to_be_instances(start: Start) -> None:
    channel, _, (holder,) = await start()
    seen: list[Any] = []

    def look(call: ServerCall, body: bytes) -> bytes:
        seen.append([pair for pair in call.metadata if pair[0].startswith("mmcore-")])
        return b""

    holder.answer = look
    metadata = [("mmcore-forward", "load 2 holder0"), ("mmcore-model-bin", b"other"), ("mmcore-anything", "x")]
    await channel.unary("/echo.Echo/Where", b"", metadata=metadata, timeout_s=WITHIN_S)
    assert seen == [[("mmcore-forward", "hit 1 front")]]


async def test_two_instances_that_believe_in_each_other_do_not_send_a_request_in_circles(start: Start) -> None:
    channel, front, _ = await start(0)
    other = Front()
    other.forwarding.instance = "other"
    address = await other.server.listen_tcp("127.0.0.1", 0, internal=True)
    back = await front.server.listen_tcp("127.0.0.1", 0, internal=True)
    front.forwarding.update("other", address)
    other.forwarding.update("front", back)
    front.holders, other.holders = front.forwarding.holders(["other"]), other.forwarding.holders(["front"])
    for mode in Mode:
        front.options = other.options = {"mode": mode}
        with pytest.raises(RpcError, match=r"no copy of the model|no instance that holds") as failed:
            await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S)
        assert failed.value.status == Status.UNAVAILABLE
    assert other.holders[0].answered == 0
    await other.server.close()
    await other.forwarding.close()


async def test_an_instance_that_was_to_load_a_model_may_pass_the_request_on_once_more(start: Start) -> None:
    channel, front, (holder,) = await start()
    middle = Front()
    middle.forwarding = Forwarding("middle")
    middle.forwarding.update("holder0", holder.address)
    middle.holders = middle.forwarding.holders(["holder0"])
    seen: list[Any] = []

    def look(call: ServerCall, body: bytes) -> bytes:
        seen.append(arrival_of(call))
        return b"found"

    holder.answer = look
    front.forwarding.update("middle", await middle.server.listen_tcp("127.0.0.1", 0, internal=True))
    front.holders = front.forwarding.holders(["middle"])
    front.options = {"mode": Mode.LOAD}
    assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"found"
    assert seen == [(Mode.HIT, 2, ("front", "middle"), "")]
    await middle.server.close()
    await middle.forwarding.close()


async def test_a_fault_in_what_is_done_instead_is_answered(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    channel, front, (holder,) = await start()
    holder.answer = holder.not_here

    def no_room(call: ServerCall, body: bytes, unanswered: Unanswered) -> None:
        raise Overloaded("no room anywhere")

    def broken(call: ServerCall, body: bytes, unanswered: Unanswered) -> None:
        raise KeyError("a fault of ours")

    for instead, status, text in ((no_room, Status.RESOURCE_EXHAUSTED, "no room"), (broken, Status.INTERNAL, "KeyErr")):
        front.options = {"instead": instead}
        with pytest.raises(RpcError, match=text) as failed:
            await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S)
        assert failed.value.status == status
    faults = [record.message for record in caplog.records if record.levelname == "ERROR"]
    caplog.clear()  # their tracebacks hold the call
    assert faults == ["passing a request on failed"]


async def test_an_instance_that_takes_connections_and_says_nothing_is_not_asked(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmcore.routing.peers.GREETING_S", 0.1)
    channel, front, (holder,) = await start()
    with socket.socket() as hung:
        hung.bind(("127.0.0.1", 0))
        hung.listen()
        front.forwarding.update("hung", f"127.0.0.1:{hung.getsockname()[1]}")
        front.holders = front.forwarding.holders(["hung", "holder0"])
        front.forwarding.choose = lambda peers: peers[0]
        assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"holder0"
        assert front.down == ["hung"]
        assert holder.asked == 1


async def test_what_instances_answer_each_other_does_not_reach_a_client(start: Start) -> None:
    channel, _, (holder,) = await start()

    def answer(call: ServerCall, body: bytes) -> bytes:
        call.set_initial_metadata([("mmcore-first", "x"), ("kept", "1")])
        call.set_trailers([("mmcore-last", "x"), ("kept-too", "2")])
        return b"ok"

    holder.answer = answer
    await channel.connect()
    outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    call = channel.start("/echo.Echo/Where", b"", outcome.set_result)
    await asyncio.wait_for(outcome, WITHIN_S)
    assert (call.initial_metadata, call.trailers) == ((("kept", "1"),), (("kept-too", "2"),))


# -- streams


async def test_a_stream_passes_message_by_message_both_ways(start: Start) -> None:
    channel, _, _ = await start()
    stream = await channel.stream("/echo.Echo/Bidi", timeout_s=WITHIN_S, metadata=[("a", "b")])
    for number in range(100):
        await stream.send(b"%d" % number)
        assert await anext(stream) == b"%d" % number
    await stream.end()
    assert [message async for message in stream] == []
    assert stream.initial_metadata == (("initial", "yes"),)
    assert stream.trailers == (("last", "word"),)


@pytest.mark.parametrize("encoding", [None, "gzip"])
async def test_streams_of_one_side_pass(start: Start, encoding: str | None) -> None:
    channel, _, _ = await start()
    stream = await channel.stream("/echo.Echo/Sum", timeout_s=WITHIN_S, encoding=encoding)
    for _ in range(50):
        await stream.send(bytes(100_000))
    await stream.end()
    assert [message async for message in stream] == [b"5000000"]
    stream = await channel.stream("/echo.Echo/Count", timeout_s=WITHIN_S, encoding=encoding)
    await stream.send(b"13")
    await stream.end()
    got: list[bytes] = []
    with pytest.raises(RpcError, match="unlucky") as failed:
        async for message in stream:
            got.append(message)
    assert failed.value.status == Status.FAILED_PRECONDITION
    assert got == [b"%d" % number for number in range(13)]


async def test_a_stream_that_is_taken_back_or_too_late_ends_at_the_holder(start: Start) -> None:
    channel, _, (holder,) = await start()
    stream = await channel.stream("/echo.Echo/HoldStream", timeout_s=WITHIN_S)
    assert await anext(stream) == b"started"
    stream.cancel()
    await until(lambda: holder.service.events.count("cancelled") == 1, "the holder hears of it")
    stream = await channel.stream("/echo.Echo/HoldStream", timeout_s=0.2)
    with pytest.raises(RpcError) as failed:
        async for _ in stream:
            pass
    assert failed.value.status == Status.DEADLINE_EXCEEDED
    await until(lambda: holder.service.events.count("cancelled") == 2, "the holder hears of it")


async def test_a_reader_that_does_not_read_holds_up_the_holder(start: Start) -> None:
    channel, front, (holder,) = await start()
    sent = 0

    async def pour(call: StreamCall) -> None:
        nonlocal sent
        await anext(call)
        while True:
            await call.send(bytes(500_000))
            sent += 1

    holder.server.add_stream("/echo.Echo/Pour", pour)
    front.server.add_stream("/echo.Echo/Pour", front.stream)
    stream = await channel.stream("/echo.Echo/Pour", timeout_s=WITHIN_S)
    await stream.send(b"go")
    await until(lambda: sent > 0, "it pours")
    settled, last = 0, -1
    while settled < 20:
        await asyncio.sleep(0.01)
        settled = settled + 1 if sent == last else 0
        last = sent
    assert sent * 500_000 < 100_000_000
    for _ in range(sent):
        assert len(await anext(stream)) == 500_000
    await until(lambda: sent > last, "it goes on")
    stream.cancel()


async def test_a_stream_that_a_holder_does_not_want_goes_to_the_next(start: Start) -> None:
    channel, front, (first, second) = await start(2)
    front.forwarding.choose = lambda peers: peers[0]

    wanted = {"holder1"}

    def serve(holder: Holder) -> Callable[[StreamCall], Awaitable[None]]:
        async def choosy(call: StreamCall) -> None:
            if holder.instance in wanted:
                await holder.service.sum(call)
            else:
                await anext(call)
                not_here(call, holder.instance)

        return choosy

    first.server.add_stream("/echo.Echo/Choosy", serve(first))
    second.server.add_stream("/echo.Echo/Choosy", serve(second))
    front.server.add_stream("/echo.Echo/Choosy", front.stream)
    stream = await channel.stream("/echo.Echo/Choosy", timeout_s=WITHIN_S)
    for _ in range(5):
        await stream.send(bytes(1000))
    await stream.end()
    assert [message async for message in stream] == [b"5000"]
    assert front.stale == [("m", "holder0")]
    wanted.clear()
    stream = await channel.stream("/echo.Echo/Choosy", timeout_s=WITHIN_S)
    await stream.send(b"one")
    with pytest.raises(RpcError, match="1 messages kept"):
        await anext(stream)
    assert front.kept == [b"one"]


async def test_a_thousand_streams_at_once(start: Start) -> None:
    channel, _, _ = await start()

    async def talk(number: int) -> None:
        stream = await channel.stream("/echo.Echo/Bidi", timeout_s=60)
        for turn in range(3):
            await stream.send(b"%d %d" % (number, turn))
            assert await anext(stream) == b"%d %d" % (number, turn)
            await started.wait()
        await stream.end()
        assert [message async for message in stream] == []

    started = asyncio.Event()
    talks = [asyncio.create_task(talk(number)) for number in range(1000)]
    await asyncio.sleep(0)
    started.set()
    await asyncio.gather(*talks)


# -- instances come and go


async def test_an_instance_that_moves_is_followed_and_one_that_leaves_forgotten(start: Start) -> None:
    channel, front, (holder,) = await start()
    moved = Holder("holder0")
    await moved.listen()
    front.forwarding.update("holder0", holder.address)
    assert front.forwarding.holders(["holder0"]) == front.holders
    await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S)
    held = asyncio.create_task(channel.unary("/echo.Echo/Hold", b"", timeout_s=WITHIN_S))
    await until(lambda: holder.service.held, "it is held")
    front.holds(moved)
    assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"holder0"
    assert (holder.asked, moved.asked) == (1, 1)
    holder.service.release()
    assert await held == b"released"
    front.forwarding.update("holder0", None)
    assert front.forwarding.holders(["holder0", "front", "unknown"]) == ()
    assert front.forwarding.peers == {}
    front.forwarding.update("front", "127.0.0.1:1")
    assert front.forwarding.peers == {}
    await moved.server.close()


async def test_over_a_unix_socket(start: Start, tmp_path: Any) -> None:
    channel, front, _ = await start(0)
    holder = Holder("worker")
    holder.address = await holder.server.listen_unix(str(tmp_path / "peer.sock"), internal=True)
    front.holds(holder)
    assert await channel.unary("/echo.Echo/Where", b"", timeout_s=WITHIN_S) == b"worker"
    await holder.server.close()


class OneOfAStream:
    """A request that came on a stream, as services see it; its answer is kept."""

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self.metadata = metadata
        self.deadline: float | None = None
        self.cancelled = False
        self.on_cancel: Callable[[], object] | None = None
        self.message: bytes | None = None
        self.failed: tuple[int, str] | None = None

    def reply(self, message: bytes) -> None:
        self.message = message

    def fail(self, status: int, details: str) -> None:
        self.failed = (status, details)


async def test_single_requests_of_a_stream_pass(start: Start) -> None:
    _, front, (holder,) = await start()
    call = OneOfAStream(("user-agent", "somebody"), ("echo-a", "1"), ("mmcore-forward", "load 1 other"))
    front.forwarding.unary(call, b"body", "m", front.holders, mode=Mode.HIT, path=UNARY)
    await until(lambda: call.message is not None, "it is answered")
    assert call.message == b"body"
    assert ("echo-a", "1") in holder.service.seen[0]
    assert ("mmcore-forward", "hit 2 other,front") in holder.service.seen[0]
    call = OneOfAStream()
    front.forwarding.unary(call, b"5 gone", "m", front.holders, path="/echo.Echo/Fail")
    await until(lambda: call.failed is not None, "it is answered")
    assert call.failed == (5, "gone")
    call = OneOfAStream()
    front.forwarding.unary(call, b"", "m", front.holders, path="/echo.Echo/Hold")
    await until(lambda: holder.service.held, "it is held")
    assert call.on_cancel is not None
    call.on_cancel()
    await until(lambda: "cancelled" in holder.service.events, "the holder hears that the stream is gone")
    holder.service.held.clear()


async def test_more_metadata_than_can_be_sent_is_refused(start: Start) -> None:
    _, front, _ = await start()
    call = OneOfAStream(*((f"name-{number}", "x") for number in range(60)))
    front.forwarding.unary(call, b"", "m", front.holders, path="/echo.Echo/Where")
    await until(lambda: call.failed is not None, "it is answered")
    assert call.failed is not None
    assert call.failed[0] == Status.RESOURCE_EXHAUSTED
    assert "metadata may be" in call.failed[1]
