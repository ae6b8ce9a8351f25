"""ModelStreamInfer: many requests on one stream, answered in their order.

Requests are started as they come, so that a model that runs in a thread works on several of one stream; answers leave
in the order of the requests. A failed request is answered with ``error_message`` and the stream goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from mmcore._ext.v2codec import decode_infer_request
from mmcore.errors import InvalidRequest, RpcError, Status, Unavailable
from mmcore.pb import inference_pb2
from mmcore.server.calls import Answer, Body, refuse
from mmcore.transport import StreamCall

#: Requests of one stream under way at once; beyond it the stream is not read, which holds its client back.
IN_FLIGHT_LIMIT: Final = 64

#: Field 2 of ModelStreamInferResponse, length-delimited.
_INFER_RESPONSE_TAG: Final = b"\x12"

#: What Triton adds to a stream's last response for a request: ``parameters["triton_final_response"] = true``. Parts of
#: one message may be concatenated (protobuf encoding, "Last One Wins"), so this goes behind any encoded response.
_FINAL_RESPONSE: Final = inference_pb2.ModelInferResponse(
    parameters={"triton_final_response": inference_pb2.InferParameter(bool_param=True)}
).SerializeToString()


class StreamAnswer:
    """One request of a stream: takes its answer and keeps it until the ones before it have been sent."""

    __slots__ = ("_body", "_call", "_message", "_status", "_waiter", "on_cancel")

    def __init__(self, call: StreamCall, body: bytes) -> None:
        self.on_cancel: Callable[[], object] | None = None
        self._call = call
        self._body = body
        self._message: Body | None = None
        self._status = Status.OK
        self._waiter: asyncio.Future[None] | None = None

    @property
    def peer(self) -> str:
        """The stream's."""
        return self._call.peer

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The stream's metadata."""
        return self._call.metadata

    @property
    def deadline(self) -> float | None:
        """The stream's deadline."""
        return self._call.deadline

    @property
    def cancelled(self) -> bool:
        """Whether the stream is gone."""
        return self._call.cancelled

    def reply(self, message: Body) -> None:
        """Take the encoded ModelInferResponse."""
        parts = message if isinstance(message, list) else [message]
        length = sum(memoryview(part).nbytes for part in parts) + len(_FINAL_RESPONSE)
        self._settle([_INFER_RESPONSE_TAG + _varint(length), *parts, _FINAL_RESPONSE])

    def fail(self, status: int, details: str) -> None:
        """Take the error; the request's id goes with it, by which a client knows which request failed."""
        try:
            request_id = decode_infer_request(self._body).id
        except InvalidRequest:
            request_id = ""
        self._status = Status(status)
        response = inference_pb2.ModelStreamInferResponse(error_message=details or self._status.name)
        response.infer_response.id = request_id
        self._settle(response.SerializeToString())

    async def answer(self) -> tuple[Status, Body]:
        """Status and encoded ModelStreamInferResponse, once they are there."""
        if self._message is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            assert self._message is not None
        return self._status, self._message

    def abandon(self) -> None:
        """Tell whoever works on it that the stream is gone."""
        if self._message is None and self.on_cancel is not None:
            self.on_cancel()

    def _settle(self, message: Body) -> None:
        self._message = message
        self._body = b""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class StreamInference:
    """The handler of ModelStreamInfer; ``infer`` answers the requests of its streams and may be exchanged.

    A draining instance ends a stream when what came on it is answered: its client may keep it open for hours, and opens
    the next one elsewhere.
    """

    def __init__(self, infer: Callable[[Answer, bytes], Body | None]) -> None:
        self.infer = infer
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """End every stream with UNAVAILABLE once its requests are answered."""
        self._draining.set()

    async def serve(self, call: StreamCall) -> None:
        """Answer the requests of one stream until the client ends it.

        Raises:
            RpcError: a request failed and the client has asked, with the metadata ``triton_grpc_error: true``, that
                an error ends the stream as a status.
            Unavailable: the instance drains.
        """
        started: asyncio.Queue[StreamAnswer | None] = asyncio.Queue(IN_FLIGHT_LIMIT)
        unsent: set[StreamAnswer] = set()
        errors_end_it = ("triton_grpc_error", "true") in call.metadata
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_send(call, started, unsent, errors_end_it), name="ModelStreamInfer answers")
                ending = group.create_task(self._end_when_draining(started), name="ModelStreamInfer drain")
                async for body in call:
                    answer = StreamAnswer(call, body)
                    unsent.add(answer)
                    self._start(answer, body)
                    await started.put(answer)
                ending.cancel()
                await started.put(None)
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            for answer in unsent:
                answer.abandon()

    async def _end_when_draining(self, started: asyncio.Queue[StreamAnswer | None]) -> None:
        await self._draining.wait()
        await started.join()
        raise Unavailable("this instance is shutting down; open a new stream")

    def _start(self, answer: StreamAnswer, body: bytes) -> None:
        try:
            message = self.infer(answer, body)
        except Exception as error:
            refuse(answer, error, "ModelStreamInfer")
        else:
            if message is not None:
                answer.reply(message)


async def _send(
    call: StreamCall, started: asyncio.Queue[StreamAnswer | None], unsent: set[StreamAnswer], errors_end_it: bool
) -> None:
    while (answer := await started.get()) is not None:
        status, message = await answer.answer()
        unsent.discard(answer)
        if errors_end_it and status is not Status.OK:
            assert isinstance(message, bytes)  # fail() has encoded it
            text = inference_pb2.ModelStreamInferResponse.FromString(message).error_message
            raise RpcError(status, text)
        await call.send(message)
        started.task_done()


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
