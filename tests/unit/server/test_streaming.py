from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from mmcore._ext.v2codec import encode_infer_request, encode_infer_response
from mmcore.errors import InvalidRequest, RpcError, Status, Unavailable
from mmcore.pb import inference_pb2
from mmcore.server.calls import Answer, Body
from mmcore.server.streaming import IN_FLIGHT_LIMIT, StreamInference

X = np.ones((1, 2), np.float32)


class FakeCall:
    """A stream whose requests a test puts in and whose answers it takes out."""

    def __init__(self, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        self.metadata = metadata
        self.deadline: float | None = None
        self.cancelled = False
        self.requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.answers: asyncio.Queue[inference_pb2.ModelStreamInferResponse] = asyncio.Queue()
        self.taken = 0

    def ask(self, *names: str) -> None:
        for name in names:
            self.requests.put_nowait(encode_infer_request("m", [("x", "FP32", X)], request_id=name))

    def end(self) -> None:
        self.requests.put_nowait(None)

    def __aiter__(self) -> FakeCall:
        return self

    async def __anext__(self) -> bytes:
        body = await self.requests.get()
        if body is None:
            raise StopAsyncIteration
        self.taken += 1
        return body

    async def send(self, message: Body) -> None:
        joined = b"".join(message) if isinstance(message, list) else bytes(message)
        self.answers.put_nowait(inference_pb2.ModelStreamInferResponse.FromString(joined))


def id_of(body: bytes) -> str:
    return inference_pb2.ModelInferRequest.FromString(body).id


def answer_to(body: bytes) -> Body:
    return encode_infer_response("m", "1", id_of(body), [("y", "FP32", X)], raw=True)


class Later:
    """Answers when told to; remembers who went away."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Answer, bytes]] = {}
        self.gone: list[str] = []

    def __call__(self, call: Answer, body: bytes) -> None:
        name = id_of(body)
        self.calls[name] = call, body
        call.on_cancel = lambda: self.gone.append(name)

    def answer(self, name: str) -> None:
        call, body = self.calls[name]
        call.reply(answer_to(body))


def serve(call: FakeCall, infer: Callable[[Any, bytes], Body | None]) -> tuple[StreamInference, asyncio.Task[None]]:
    streams = StreamInference(infer)
    work: Awaitable[None] = streams.serve(call)  # type: ignore[arg-type]  # as much of a StreamCall as is used
    return streams, asyncio.ensure_future(work)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_requests_are_answered_in_order_and_marked_final() -> None:
    call = FakeCall()
    _, task = serve(call, lambda _, body: answer_to(body))
    call.ask("a", "b", "c")
    call.end()
    await task
    answers = [call.answers.get_nowait() for _ in range(3)]
    assert [answer.infer_response.id for answer in answers] == ["a", "b", "c"]
    assert all(answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers)
    assert answers[0].infer_response.raw_output_contents[0] == X.tobytes()
    assert answers[0].error_message == ""


async def test_large_answers_keep_their_parts() -> None:
    call = FakeCall()
    large = np.random.default_rng(0).standard_normal((1, 100_000), dtype=np.float32)
    _, task = serve(call, lambda _, body: encode_infer_response("m", "1", "", [("y", "FP32", large)], raw=True))
    call.ask("a")
    call.end()
    await task
    assert call.answers.get_nowait().infer_response.raw_output_contents[0] == large.tobytes()


async def test_a_later_answer_waits_for_the_earlier_ones() -> None:
    call, later = FakeCall(), Later()
    _, task = serve(call, later)
    call.ask("a", "b")
    await turns()
    later.answer("b")
    await turns()
    assert call.answers.empty()
    later.answer("a")
    call.end()
    await task
    assert [call.answers.get_nowait().infer_response.id for _ in range(2)] == ["a", "b"]


async def test_errors_are_messages_with_the_requests_id_and_the_stream_goes_on() -> None:
    call = FakeCall()

    def infer(_: Answer, body: bytes) -> Body:
        if id_of(body) == "bad":
            raise InvalidRequest("no such tensor")
        if id_of(body) == "worse":
            raise ZeroDivisionError("division by zero")
        return answer_to(body)

    _, task = serve(call, infer)
    call.ask("bad", "worse", "good")
    call.end()
    await task
    answers = [call.answers.get_nowait() for _ in range(3)]
    assert [answer.error_message for answer in answers] == [
        "no such tensor",
        "ZeroDivisionError: division by zero",
        "",
    ]
    assert [answer.infer_response.id for answer in answers] == ["bad", "worse", "good"]


async def test_an_error_ends_the_stream_when_the_client_asked_for_that() -> None:
    call, later = FakeCall((("triton_grpc_error", "true"),)), Later()
    _, task = serve(call, later)
    call.ask("a", "b")
    await turns()
    later.calls["a"][0].fail(Status.INVALID_ARGUMENT, "no such tensor")
    with pytest.raises(RpcError, match="no such tensor") as error:
        await task
    assert error.value.status is Status.INVALID_ARGUMENT
    # The client has not ended its side; whoever works on the rest is told.
    assert later.gone == ["b"]


async def test_a_stream_is_not_read_ahead_without_limit() -> None:
    call, later = FakeCall(), Later()
    _, task = serve(call, later)
    call.ask(*map(str, range(1000)))
    for _ in range(IN_FLIGHT_LIMIT + 10):
        await turns()
    assert IN_FLIGHT_LIMIT <= call.taken <= IN_FLIGHT_LIMIT + 3
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(later.gone) == call.taken


async def test_a_drain_ends_idle_streams_and_lets_the_others_finish() -> None:
    call, later = FakeCall(), Later()
    streams, task = serve(call, later)
    call.ask("a")
    await turns()
    streams.drain()
    await turns()
    assert not task.done()
    later.answer("a")
    with pytest.raises(Unavailable, match="shutting down"):
        await task
    assert call.answers.get_nowait().infer_response.id == "a"
    idle = FakeCall()
    with pytest.raises(Unavailable, match="shutting down"):
        await streams.serve(idle)  # type: ignore[arg-type]  # as above
