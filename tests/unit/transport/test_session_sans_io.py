"""The compiled session without sockets: both sides joined through bytes, however those are cut."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmcore._ext.h2 import live_objects
from mmcore._ext.h2client import ClientCall
from mmcore._ext.h2server import ServerCall
from mmcore._ext.outbuf import Buffers
from mmcore.errors import InvalidRequest, Status
from tests.sessions import SETTINGS, Client, Echo, Outlet, Pair, Server, Sink, methods, pieces

UNARY = "/test.Service/Unary"
STREAM = "/test.Service/Stream"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Each test ends its connections; then no stream and no session may be left, by reference counts alone."""
    before = live_objects()
    yield
    gc.collect()
    assert all(count <= before[kind] for kind, count in live_objects().items())


@pytest.fixture
def pair() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(*args: Any, **options: Any) -> Pair:
        made.append(Pair(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.end()
        assert one.client.errors == []
        assert one.server.errors == []
        assert (one.client.unsent, one.server.unsent) == (0, 0)
        assert (one.client.open_streams, one.server.open_streams) == (0, 0)
    made.clear()


MakePair = Callable[..., Pair]


def backwards(call: ServerCall, body: bytes) -> bytes:
    return body[::-1]


# -- unary calls


def test_a_unary_call_carries_message_metadata_and_trailers_both_ways(pair: MakePair) -> None:
    seen: list[Any] = []

    def handler(call: ServerCall, body: bytes) -> bytes:
        seen.append((call.method, call.metadata, body, call.peer, call.cancelled))
        call.set_initial_metadata([("first", "1"), ("raw-bin", b"\x00\xff")])
        call.set_trailers([("last", "2"), ("last", "3"), ("tail-bin", b"")])
        return body * 2

    both = pair(methods({UNARY: handler}))
    metadata = [("a", "1"), ("b-bin", bytes(range(256))), ("a", "2"), ("c", "x y"), ("d", "4"), ("e", "5"), ("f", "6")]
    call = both.call(UNARY, b"abc", metadata=metadata)
    assert call.status == -1
    both.run()
    assert (call.status, call.details, call.message) == (Status.OK, "", b"abcabc")
    method, got, body, peer, cancelled = seen[0]
    assert (method, body, peer, cancelled) == (UNARY, b"abc", "client", False)
    assert [pair_ for pair_ in got if pair_[0] != "user-agent"] == metadata
    assert call.initial_metadata == (("first", "1"), ("raw-bin", b"\x00\xff"))
    assert call.trailers == (("last", "2"), ("last", "3"), ("tail-bin", b""))


@pytest.mark.parametrize("message", [
    b"", [], [b""], [b"", b"", b"a", b""], bytearray(b"abc"), memoryview(b"abcdef")[1:3],
    [b"head", memoryview(bytes(100_000)), b"tail"], [bytes([n]) * 16384 for n in range(200)], b"x" * 3_000_000,
    [b"y" * 20_000, b"z"] * 100,
], ids=range(10))  # fmt: skip
def test_any_form_of_message_arrives_whole(pair: MakePair, message: Any) -> None:
    plain = bytes(message) if not isinstance(message, list) else b"".join(message)
    both = pair(methods({UNARY: lambda call, body: message if body == plain else b"differs"}))
    call = both.call(UNARY, message)
    both.run()
    assert (call.status, call.message) == (Status.OK, plain)


def test_many_calls_at_once_get_their_own_answers(pair: MakePair) -> None:
    both = pair(methods({UNARY: backwards}))
    calls = [(b"message %d" % n, both.call(UNARY, b"message %d" % n)) for n in range(1500)]
    both.run()
    assert all(call.message == body[::-1] for body, call in calls)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("text", ["plain", "snow ☃ 100% \r\n", "", "ünï", "\ud800"])
def test_an_error_carries_its_status_and_text(pair: MakePair, text: str, later: bool) -> None:
    calls: list[ServerCall] = []

    def handler(call: ServerCall, body: bytes) -> None:
        if not later:
            raise InvalidRequest(text)
        calls.append(call)

    both = pair(methods({UNARY: handler}))
    call = both.call(UNARY, b"")
    both.run()
    for waiting in calls:
        waiting.fail(Status.INVALID_ARGUMENT, text)
    both.run()
    expected = text.encode("utf-8", "replace").decode()
    assert (call.status, call.details, call.message) == (Status.INVALID_ARGUMENT, expected, None)


def test_a_very_long_error_text_still_arrives(pair: MakePair) -> None:
    both = pair(methods({UNARY: lambda call, body: call.fail(Status.INTERNAL, "é" * 200_000)}))
    call = both.call(UNARY, b"")
    both.run()
    assert call.status == Status.INTERNAL
    assert call.details.startswith("é" * 100)


def test_an_answer_that_is_no_message_is_an_internal_error(pair: MakePair) -> None:
    both = pair(methods({UNARY: lambda call, body: "text"}))
    call = both.call(UNARY, b"")
    both.run()
    assert call.status == Status.INTERNAL
    both.server.errors.clear()


@pytest.mark.parametrize(
    "name", [":path", "grpc-status", "content-type", "content-length", "Upper Case", "new\nline", ""]
)
def test_metadata_names_that_would_break_the_call_are_refused(pair: MakePair, name: str) -> None:
    refused: list[str] = []

    def handler(call: ServerCall, body: bytes) -> bytes:
        for setter in (call.set_trailers, call.set_initial_metadata):
            with pytest.raises(ValueError, match="metadata") as caught:
                setter([(name, "x")])
            refused.append(str(caught.value))
        return b"fine"

    both = pair(methods({UNARY: handler}))
    with pytest.raises(ValueError, match="metadata"):
        both.call(UNARY, b"", metadata=[(name, "x")])
    call = both.call(UNARY, b"")
    both.run()
    assert call.message == b"fine"
    assert len(refused) == 2


@pytest.mark.parametrize("metadata", [
    [("a", "line\nbreak")], [("a", "nul\0")], [("a", "ü")], [("a-bin", "text")], [("a", 5)],
    [("a", "x" * 70_000)], [(f"n{n}", "x") for n in range(200)],
], ids=range(7))  # fmt: skip
def test_metadata_that_cannot_be_sent_is_refused_where_it_is_given(pair: MakePair, metadata: Any) -> None:
    def handler(call: ServerCall, body: bytes) -> bytes:
        with pytest.raises((ValueError, TypeError)):
            call.set_trailers(metadata)
        return b"fine"

    both = pair(methods({UNARY: handler}))
    with pytest.raises((ValueError, TypeError)):
        both.call(UNARY, b"", metadata=metadata)
    call = both.call(UNARY, b"")
    both.run()
    assert call.message == b"fine"


def test_an_unknown_method_is_unimplemented_until_it_is_added(pair: MakePair) -> None:
    served = methods({})
    both = pair(served)
    unknown = both.call(UNARY, b"")
    both.run()
    assert unknown.status == Status.UNIMPLEMENTED
    served.update(methods({UNARY: backwards}))
    known = both.call(UNARY, b"ab")
    both.run()
    assert known.message == b"ba"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_compression_of_requests_and_of_answers_that_ask_for_it(pair: MakePair, encoding: str) -> None:
    def handler(call: ServerCall, body: bytes) -> list[bytes | memoryview]:
        assert call.set_compression(encoding)
        assert not call.set_compression("snappy")
        return [body, memoryview(body)]

    both = pair(methods({UNARY: handler}))
    call = both.call(UNARY, [b"a" * 50_000, b"b" * 50_000], encoding=encoding)
    both.run()
    assert call.message == (b"a" * 50_000 + b"b" * 50_000) * 2
    assert (len(both.to_server) < 2000) == (encoding != "identity")
    assert (len(both.to_client) < 2000) == (encoding != "identity")


def test_an_unknown_encoding_is_refused_where_it_is_given(pair: MakePair) -> None:
    both = pair(methods({UNARY: backwards}))
    with pytest.raises(ValueError, match="snappy"):
        both.call(UNARY, b"", encoding="snappy")


def test_a_compression_the_client_does_not_take_is_not_used(pair: MakePair) -> None:
    used: list[bool] = []

    def handler(call: ServerCall, body: bytes) -> bytes:
        used.append(call.set_compression("gzip"))
        return body

    both = pair(methods({UNARY: handler}))
    call = both.call(UNARY, b"a" * 1000)
    both.run()
    assert call.message == b"a" * 1000
    assert used == [False]


# -- limits


@pytest.mark.parametrize("encoding", [None, "gzip"])
def test_a_request_above_the_limit_is_refused_and_the_connection_goes_on(pair: MakePair, encoding: str | None) -> None:
    both = pair(methods({UNARY: backwards}), settings=replace(SETTINGS, max_message_bytes=1000))
    long = both.call(UNARY, b"a" * 1001, encoding=encoding)
    exact = both.call(UNARY, b"b" * 1000, encoding=encoding)
    both.run()
    assert (long.status, exact.message) == (Status.RESOURCE_EXHAUSTED, b"b" * 1000)
    assert "1000" in long.details


@pytest.mark.parametrize("encoding", [None, "gzip"])
def test_an_answer_above_the_clients_limit_fails_the_call_alone(pair: MakePair, encoding: str | None) -> None:
    def handler(call: ServerCall, body: bytes) -> bytes:
        call.set_compression(encoding or "identity")
        return bytes(int(body))

    both = pair(methods({UNARY: handler}), client_settings=replace(SETTINGS, max_message_bytes=1000))
    long, exact = (both.call(UNARY, size, encoding="gzip") for size in (b"1001", b"1000"))
    both.run()
    assert (long.status, exact.message) == (Status.RESOURCE_EXHAUSTED, bytes(1000))


def test_whole_messages_whose_calls_do_not_end_count_as_being_received(pair: MakePair) -> None:
    limits = replace(SETTINGS, max_message_bytes=1000, max_receiving_bytes=10_640)
    both = pair(methods({UNARY: backwards}), settings=limits)
    calls = [both.call(UNARY, None) for _ in range(30)]
    for call in calls:
        call.send(bytes(1000))
    both.run()
    refused = [call for call in calls if call.status == Status.RESOURCE_EXHAUSTED]
    assert len(refused) == 20
    for call in calls:
        call.end()
    both.run()
    assert sum(call.status == Status.OK for call in calls) == 10
    again = [both.call(UNARY, bytes(1000)) for _ in range(10)]
    both.run()
    assert all(call.status == Status.OK for call in again)


def test_a_compressed_message_counts_by_its_real_length(pair: MakePair) -> None:
    limits = replace(SETTINGS, max_message_bytes=1000, max_receiving_bytes=10_640)
    both = pair(methods({UNARY: backwards}), settings=limits)
    calls = [both.call(UNARY, None, encoding="gzip") for _ in range(30)]
    for call in calls:
        call.send(bytes(1000))
    both.run()
    assert sum(call.status == Status.RESOURCE_EXHAUSTED for call in calls) >= 19


def test_messages_a_streaming_handler_does_not_take_are_held_back_or_refused(pair: MakePair) -> None:
    class Idle(Sink):
        def on_message(self, message: bytes) -> None:
            self.events.append("message")

    sinks: list[Idle] = []

    def handler(call: ServerCall) -> Idle:
        sinks.append(Idle(call))
        return sinks[-1]

    limits = replace(SETTINGS, stream_window_bytes=100_000)
    both = pair(methods({}, {STREAM: handler}), settings=limits)
    call = both.call(STREAM, None, sink=Sink())
    for _ in range(100_000):
        call.send(b"")  # five bytes each on the wire: the messages' number must count, not only their bytes
    both.run()
    held_back = call.unsent
    assert held_back > 0
    taken = len(sinks[0].events)
    assert taken < 70_000
    for _ in range(taken):
        sinks[0].call.taken(0)  # type: ignore[union-attr]  # a Sink of a server has a call
    both.run()
    assert call.unsent < held_back
    call.cancel()
    both.run()


def test_answers_that_are_not_read_make_the_server_refuse_new_calls(pair: MakePair) -> None:
    limits = replace(SETTINGS, max_unsent_bytes=200_000, max_message_bytes=50_000)
    both = pair(methods({UNARY: lambda call, body: bytes(50_000)}), settings=limits)
    both.run()
    both.server.outlet.full = True
    calls = [both.call(UNARY, b"") for _ in range(100)]
    both.server.feed_bytes(both.client.outlet.take())
    assert both.server.unsent <= 300_000
    both.server.outlet.full = False
    both.run()
    statuses = {call.status for call in calls}
    assert statuses == {Status.OK, Status.RESOURCE_EXHAUSTED}


# -- streams


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_a_bidirectional_stream_keeps_order_and_ends_with_trailers(pair: MakePair, chunk: int) -> None:
    both = pair(methods({}, {STREAM: Echo}))
    sink = Sink()
    call = both.call(STREAM, None, sink=sink, metadata=[("k", "v")])
    sent = [b"", b"one", b"two" * 10_000, b"", b"three"]
    for message in sent:
        call.send(message)
        both.run(chunk)
    call.end()
    both.run(chunk)
    assert sink.messages == [message[::-1] for message in sent]
    assert sink.events[-1] == "close"
    assert (call.status, call.trailers) == (Status.OK, (("count", "5"),))


def test_a_stream_sender_is_told_when_its_bytes_have_left(pair: MakePair) -> None:
    both = pair(methods({}, {STREAM: Sink}), settings=replace(SETTINGS, stream_window_bytes=100_000))
    sink = Sink()
    call = both.call(STREAM, None, sink=sink)
    for _ in range(40):
        call.send(bytes(100_000))
    call.notify_writable()
    assert "writable" not in sink.events
    both.run()
    assert sink.events == ["writable"]
    assert call.unsent == 0


def test_a_server_that_ends_a_stream_early_is_heard_and_the_stream_closes(pair: MakePair) -> None:
    class Done(Sink):
        def on_message(self, message: bytes) -> None:
            assert isinstance(self.call, ServerCall)
            self.call.send(b"enough")
            self.call.end()

    both = pair(methods({}, {STREAM: Done}))
    sink = Sink()
    call = both.call(STREAM, None, sink=sink)
    call.send(b"1")
    both.run()
    assert (call.status, sink.messages) == (Status.OK, [b"enough"])
    assert (both.client.open_streams, both.server.open_streams) == (0, 0)


@pytest.mark.parametrize("path", [UNARY, "/unknown/Method"])
def test_a_call_refused_before_its_end_holds_no_stream(pair: MakePair, path: str) -> None:
    both = pair(methods({UNARY: backwards}), settings=replace(SETTINGS, max_message_bytes=10))
    call = both.call(path, None)
    call.send(bytes(100_000))
    for _ in range(3):
        both.step()
    assert call.status in (Status.RESOURCE_EXHAUSTED, Status.UNIMPLEMENTED)
    assert both.server.open_streams == 0


# -- cancellation and deadlines


def test_a_cancelled_call_tells_the_handler_and_a_late_reply_is_dropped(pair: MakePair) -> None:
    waiting: list[ServerCall] = []
    told: list[str] = []

    def handler(call: ServerCall, body: bytes) -> None:
        call.on_cancel = lambda: told.append(call.method)
        waiting.append(call)

    both = pair(methods({UNARY: handler}))
    outcomes: list[tuple[int, str]] = []
    call = both.call(UNARY, b"", on_done=lambda call: outcomes.append((call.status, call.details)))
    both.run()
    call.cancel()
    call.cancel()
    assert told == []
    both.run()
    assert told == [UNARY]
    assert waiting[0].cancelled
    waiting[0].reply(b"too late")
    waiting[0].fail(Status.INTERNAL, "too late")
    both.run()
    assert outcomes == [(Status.CANCELLED, "cancelled by the caller")]


def test_a_call_cancelled_before_it_was_sent_costs_the_server_nothing(pair: MakePair) -> None:
    both = pair(methods({UNARY: backwards}), settings=replace(SETTINGS, max_concurrent_streams=1))
    both.run()
    both.server.outlet.full = True
    outcomes: list[int] = []
    calls = [both.call(UNARY, b"", on_done=lambda call: outcomes.append(call.status)) for _ in range(5)]
    for call in calls[1:]:
        call.cancel()
    del call
    both.run()
    assert sorted(outcomes) == [Status.OK] + [Status.CANCELLED] * 4
    assert both.client.open_streams == 0
    assert both.server.calls == 1


def test_calls_above_the_servers_limit_wait_for_a_place(pair: MakePair) -> None:
    waiting: list[ServerCall] = []
    both = pair(methods({UNARY: lambda call, body: waiting.append(call)}),
                settings=replace(SETTINGS, max_concurrent_streams=2))  # fmt: skip
    both.run()
    calls = [both.call(UNARY, b"") for _ in range(5)]
    both.run()
    assert len(waiting) == 2
    for place in range(5):
        waiting[place].reply(b"ok")
        both.run()
    assert [call.message for call in calls] == [b"ok"] * 5


def test_a_waiting_call_ends_at_its_deadline(pair: MakePair) -> None:
    waiting: list[ServerCall] = []
    both = pair(methods({UNARY: lambda call, body: waiting.append(call)}),
                settings=replace(SETTINGS, max_concurrent_streams=1))  # fmt: skip
    both.run()
    outcomes: list[int] = []
    both.call(UNARY, b"")
    both.call(UNARY, b"", deadline=time.monotonic(), on_done=lambda call: outcomes.append(call.status))
    both.run()
    both.client.expire()
    assert outcomes == [Status.DEADLINE_EXCEEDED]
    waiting[0].reply(b"")
    both.run()
    assert both.client.open_streams == 0


def pass_time(deadline: float) -> None:
    """Until it has passed by the other side's clock, too: what is sent of it is rounded."""
    while time.monotonic() < deadline + 0.002:
        pass


def test_a_deadline_ends_the_call_on_both_sides(pair: MakePair) -> None:
    cancelled: list[ServerCall] = []

    def handler(call: ServerCall, body: bytes) -> None:
        assert call.deadline is not None
        call.on_cancel = lambda: cancelled.append(call)

    both = pair(methods({UNARY: handler}))
    deadline = time.monotonic() + 0.02
    call = both.call(UNARY, b"", deadline=deadline)
    both.run()
    pass_time(deadline)
    both.server.expire()
    assert len(cancelled) == 1
    both.run()
    assert (call.status, call.details) == (Status.DEADLINE_EXCEEDED, "deadline exceeded")
    cancelled.clear()


def test_a_deadline_ends_a_request_that_is_still_being_received(pair: MakePair) -> None:
    both = pair(methods({UNARY: backwards}))
    deadline = time.monotonic() + 0.02
    call = both.call(UNARY, None, deadline=deadline)
    both.run()
    pass_time(deadline)
    both.server.expire()
    both.run()
    assert call.status == Status.DEADLINE_EXCEEDED
    assert both.server.open_streams == 0


def test_a_deadline_that_has_passed_already_is_no_missing_deadline(pair: MakePair) -> None:
    handled: list[bytes] = []
    both = pair(methods({UNARY: lambda call, body: handled.append(body)}))
    call = both.call(UNARY, b"", deadline=time.monotonic() - 1)
    both.run()
    assert call.status == Status.DEADLINE_EXCEEDED
    assert handled == []


def test_a_failing_on_cancel_keeps_nobody_else_waiting(pair: MakePair) -> None:
    cancelled: list[int] = []

    def handler(call: ServerCall, body: bytes) -> None:
        def on_cancel() -> None:
            cancelled.append(1)
            raise RuntimeError("on_cancel fails")

        call.on_cancel = on_cancel

    both = pair(methods({UNARY: handler}))
    deadline = time.monotonic() + 0.02
    calls = [both.call(UNARY, b"", deadline=deadline) for _ in range(3)]
    both.run()
    pass_time(deadline)
    both.server.expire()
    both.run()
    assert len(cancelled) == 3
    assert all(call.status == Status.DEADLINE_EXCEEDED for call in calls)
    assert len(both.server.errors) == 3
    both.server.errors.clear()


# -- the connection's end


def test_a_lost_connection_ends_calls_on_both_sides(pair: MakePair) -> None:
    cancelled: list[int] = []

    def handler(call: ServerCall, body: bytes) -> None:
        call.on_cancel = lambda: cancelled.append(1)

    both = pair(methods({UNARY: handler}, {STREAM: Sink}))
    sink = Sink()
    calls = [both.call(UNARY, b"") for _ in range(3)] + [both.call(STREAM, None, sink=sink)]
    both.run()
    both.client.shut("cable cut")
    both.server.shut("cable cut")
    assert len(cancelled) == 3
    assert [(call.status, call.details) for call in calls] == [(Status.UNAVAILABLE, "cable cut")] * 4
    assert sink.events == ["close"]


def test_a_call_started_while_the_connection_ends_is_refused_at_once(pair: MakePair) -> None:
    both = pair(methods({UNARY: lambda call, body: None}))
    refused: list[Exception] = []

    def again(call: ClientCall) -> None:
        assert not both.client.request_allowed()
        try:
            both.call(UNARY, b"")
        except ConnectionError as error:
            refused.append(error)

    both.call(UNARY, b"", on_done=again)
    both.run()
    both.client.shut("gone")
    assert len(refused) == 1


def test_a_reply_after_the_connection_is_lost_does_nothing(pair: MakePair) -> None:
    waiting: list[ServerCall] = []
    both = pair(methods({UNARY: lambda call, body: waiting.append(call)}))
    both.call(UNARY, b"")
    both.run()
    both.server.shut("gone")
    waiting[0].reply(b"x")
    waiting[0].fail(13, "x")
    waiting[0].send(b"x")
    waiting[0].end()
    waiting[0].taken(3)
    assert waiting[0].metadata[0][0] == "user-agent"


def test_callbacks_may_answer_other_calls_and_end_their_own(pair: MakePair) -> None:
    waiting: list[ServerCall] = []

    def handler(call: ServerCall, body: bytes) -> bytes | None:
        if body == b"hold":
            waiting.append(call)
            return None
        if body == b"fail and answer":
            call.fail(Status.ABORTED, "first word counts")
            return b"second"
        if body == b"reply and raise":
            call.reply(b"answered")
            raise InvalidRequest("second")
        for held in waiting:
            held.reply(b"released")
        return b"last"

    both = pair(methods({UNARY: handler}))
    bodies = (b"hold", b"hold", b"fail and answer", b"reply and raise", b"go")
    done: list[ClientCall] = []

    def and_again(call: ClientCall) -> None:
        done.append(call)
        if len(done) < 20:
            both.call(UNARY, b"go", on_done=and_again)

    calls = [both.call(UNARY, body, on_done=and_again) for body in bodies]
    both.run()
    assert [(call.status, call.message) for call in calls] == [
        (0, b"released"), (0, b"released"), (Status.ABORTED, None), (0, b"answered"), (0, b"last"),
    ]  # fmt: skip
    assert len(done) >= 20


def test_a_callback_that_raises_is_reported_and_harms_no_other_call(pair: MakePair) -> None:
    both = pair(methods({UNARY: backwards}))

    def broken(call: ClientCall) -> None:
        raise RuntimeError("on_done fails")

    both.call(UNARY, b"ab", on_done=broken)
    call = both.call(UNARY, b"ab")
    both.run()
    assert call.message == b"ba"
    assert [str(error) for error in both.client.errors] == ["on_done fails"]
    both.client.errors.clear()


def test_an_interrupt_in_a_handler_leaves_the_connection_usable(pair: MakePair) -> None:
    def handler(call: ServerCall, body: bytes) -> bytes:
        if body == b"interrupt":
            raise KeyboardInterrupt
        return body

    both = pair(methods({UNARY: handler}))
    both.run()
    both.call(UNARY, b"interrupt")
    other = both.call(UNARY, b"other")
    with pytest.raises(KeyboardInterrupt):
        both.run()
    both.server.flush()
    both.run()
    later = both.call(UNARY, b"later")
    both.run()
    assert (other.message, later.message) == (b"other", b"later")


def test_a_graceful_end_finishes_open_calls_and_refuses_new_ones(pair: MakePair) -> None:
    waiting: list[ServerCall] = []
    both = pair(methods({UNARY: lambda call, body: waiting.append(call)}))
    before = both.call(UNARY, b"")
    both.run()
    both.server.announce_shutdown()
    both.run()
    assert both.server.pongs == 1
    assert not both.client.request_allowed()
    both.server.refuse_new()
    both.run()
    assert not both.server.outlet.closed
    waiting[0].reply(b"finished")
    both.run()
    assert before.message == b"finished"
    assert both.server.outlet.closed
    assert both.client.outlet.closed


def test_calls_on_their_way_when_the_server_leaves_are_marked_safe_to_repeat(pair: MakePair) -> None:
    both = pair(methods({UNARY: backwards}))
    both.run()
    both.server.refuse_new()
    late = both.call(UNARY, b"")
    goaway = both.server.outlet.take()
    both.client.outlet.take()
    both.client.feed_bytes(goaway)
    assert (late.status, late.refused) == (Status.UNAVAILABLE, True)


def test_calls_waiting_for_a_place_are_marked_safe_to_repeat_when_the_server_leaves(pair: MakePair) -> None:
    waiting: list[ServerCall] = []
    both = pair(methods({UNARY: lambda call, body: waiting.append(call)}),
                settings=replace(SETTINGS, max_concurrent_streams=1))  # fmt: skip
    both.run()
    first, second = both.call(UNARY, b""), both.call(UNARY, b"")
    both.run()
    both.server.refuse_new()
    both.run()
    assert (second.status, second.refused) == (Status.UNAVAILABLE, True)
    waiting[0].reply(b"ok")
    both.run()
    assert first.message == b"ok"


# -- a full socket


def test_what_a_full_socket_does_not_take_is_sent_later_and_whole(pair: MakePair) -> None:
    both = pair(methods({UNARY: lambda call, body: body * 40}))
    both.run()
    both.server.outlet.full = True
    call = both.call(UNARY, bytes(range(256)) * 256)
    for _ in range(200):
        both.server.pause_writing()
        both.step()
    assert call.message == bytes(range(256)) * 256 * 40


def test_an_outcome_is_told_while_the_socket_is_full(pair: MakePair) -> None:
    both = pair(methods({UNARY: backwards}))
    both.run()
    outcomes: list[int] = []
    both.client.outlet.full = True
    calls = [both.call(UNARY, bytes(100_000), on_done=lambda call: outcomes.append(call.status)) for _ in range(20)]
    both.client.pause_writing()
    calls[-1].cancel()
    assert outcomes == [Status.CANCELLED]


# -- every cut gives the same


def conversation(both: Pair) -> tuple[list[ClientCall], Sink]:
    """Starts calls of each kind; the same bytes leave the client each time."""
    sink = Sink()
    calls = [
        both.call(UNARY, b"first", metadata=[("k-bin", b"\x01\x02"), ("k", "v")]),
        both.call(UNARY, b"fail"),
        both.call("/unknown/Method", b"x"),
        both.call(UNARY, b"z" * 300, encoding="gzip"),
        both.call(UNARY, b""),
    ]
    stream = both.call(STREAM, None, sink=sink)
    for message in (b"one", b"", b"three" * 20):
        stream.send(message)
    stream.end()
    cancelled = both.call(UNARY, None)
    cancelled.send(b"never whole")
    cancelled.cancel()
    return [*calls, stream, cancelled], sink


def outcome(calls: list[ClientCall], sink: Sink) -> list[Any]:
    told = [(call.status, call.details, call.message, call.initial_metadata, call.trailers) for call in calls]
    return [told, sink.messages, sink.events[-1:]]


def serve_conversation(seen: list[Any]) -> dict[bytes, Any]:
    def handler(call: ServerCall, body: bytes) -> bytes:
        seen.append((call.metadata, body))
        call.set_initial_metadata([("i", "1")])
        call.set_trailers([("t-bin", b"\xff")])
        if body == b"fail":
            raise InvalidRequest("nö")
        call.set_compression("gzip")
        return body + b"!"

    return methods({UNARY: handler}, {STREAM: Echo})


def recorded() -> tuple[bytes, bytes, list[Any], list[Any]]:
    """Bytes to the server, bytes to the client, what the server saw, what the client got."""
    seen: list[Any] = []
    both = Pair(serve_conversation(seen))
    calls, sink = conversation(both)
    both.run()
    got = outcome(calls, sink)
    both.end()
    assert [call.status for call in calls] == [0, 3, 12, 0, 0, 0, 1]
    return bytes(both.to_server), bytes(both.to_client), seen, got


BUFFERS = Buffers(), Buffers()


def replay_to_server(chunks: list[bytes]) -> tuple[list[Any], list[Any]]:
    seen: list[Any] = []
    server = Server(BUFFERS[0], SETTINGS, serve_conversation(seen))
    for chunk in chunks:
        server.feed_bytes(chunk)
    got = replay_to_client([server.outlet.take()])
    server.shut("end")
    assert server.errors == []
    assert not server.dropped
    return seen, got


def replay_to_client(chunks: list[bytes]) -> list[Any]:
    both = Pair.__new__(Pair)
    both.client = Client(BUFFERS[1], SETTINGS)
    calls, sink = conversation(both)
    both.client.outlet.take()
    for chunk in chunks:
        both.client.feed_bytes(chunk)
    got = outcome(calls, sink)
    both.client.shut("end")
    assert both.client.errors == []
    return got


def test_every_split_of_what_the_server_gets_gives_the_same_result() -> None:
    to_server, _, seen, got = recorded()
    for cut in range(len(to_server) + 1):
        assert replay_to_server(pieces(to_server, [cut])) == (seen, got), cut
    assert replay_to_server([bytes([byte]) for byte in to_server]) == (seen, got)


def test_every_split_of_what_the_client_gets_gives_the_same_result() -> None:
    _, to_client, _, got = recorded()
    for cut in range(len(to_client) + 1):
        assert replay_to_client(pieces(to_client, [cut])) == got, cut
    assert replay_to_client([bytes([byte]) for byte in to_client]) == got


def test_every_truncation_is_survived_by_both_sides() -> None:
    to_server, to_client, _, _ = recorded()
    for size in range(0, len(to_server), 3):
        server = Server(BUFFERS[0], SETTINGS, serve_conversation([]))
        server.feed_bytes(to_server[:size])
        server.shut("cut off")
        assert server.errors == []
        assert server.open_streams == 0
    for size in range(0, len(to_client), 3):
        replay_to_client([to_client[:size]])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bodies=st.lists(st.binary(max_size=40) | st.integers(0, 80_000).map(bytes), max_size=6),
    seed=st.integers(0, 2**32),
    encoding=st.sampled_from([None, "gzip", "deflate"]),
    window=st.sampled_from([65_535, 4 * 2**20]),
)
def test_random_messages_in_random_chunks_arrive_in_order(
    bodies: list[bytes], seed: int, encoding: str | None, window: int
) -> None:
    chance = random.Random(seed)
    limits = replace(SETTINGS, stream_window_bytes=window)
    both = Pair(methods({UNARY: backwards}, {STREAM: Echo}), settings=limits, client_settings=limits)
    sink = Sink()
    stream = both.call(STREAM, None, sink=sink, encoding=encoding)
    unary = [both.call(UNARY, body, encoding=encoding) for body in bodies]
    for body in bodies:
        if chance.random() < 0.5:
            cut = chance.randrange(len(body) + 1)
            stream.send([body[:cut], memoryview(body)[cut:]])
        else:
            stream.send(body)
        both.step(chance.choice((1000, 10_000, 100_000)))
    stream.end()
    both.run(chance.choice((977, 1 << 18)))
    assert sink.messages == [body[::-1] for body in bodies]
    assert [call.message for call in unary] == [body[::-1] for body in bodies]
    assert stream.trailers == (("count", str(len(bodies))),)
    both.end()


def test_a_session_whose_transport_stays_full_writes_no_more_than_it_must(pair: MakePair) -> None:
    windows = replace(SETTINGS, max_message_bytes=2**25, stream_window_bytes=2**25)
    both = pair(methods({UNARY: lambda call, body: bytes(30_000_000)}), client_settings=windows)
    both.run()
    outlet: Outlet = both.server.outlet
    outlet.full = True
    call = both.call(UNARY, b"")
    both.server.feed_bytes(both.client.outlet.take())
    both.server.flush()
    both.server.flush()
    assert len(outlet.written) < 2_000_000
    outlet.full = False
    both.run()
    assert call.message == bytes(30_000_000)
