"""Between a service's methods and the transport: decoding, encoding, and answers that come later.

Every error leaves through :func:`refuse`, so that a caller sees the right status and never a traceback.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from mmcore.errors import InvalidRequest, MmcoreError, RpcError
from mmcore.transport.server import status_of

log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=Message)

#: What the transport sends as one message; a list is sent without being joined.
Body = bytes | bytearray | memoryview | list[bytes | memoryview]


class Answer(Protocol):
    """Where one request's answer goes: a unary call of the transport, or one request of a stream."""

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The request's metadata, names in lower case."""

    @property
    def deadline(self) -> float | None:
        """On :func:`time.monotonic`'s scale, in seconds; None without one."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""

    on_cancel: Callable[[], object] | None

    def reply(self, message: Body) -> None:
        """Answer with OK."""

    def fail(self, status: int, details: str) -> None:
        """Answer with an error."""


def refuse(call: Answer, error: BaseException, what: str) -> None:
    """Answer ``error`` with its status and text; ``what`` names the work in the log when the error is a surprise."""
    if not isinstance(error, MmcoreError | RpcError):
        log.error("%s failed", what, exc_info=error)
    call.fail(*status_of(error))


def parse(request_type: type[RequestT], body: bytes) -> RequestT:
    """The decoded message.

    Raises:
        InvalidRequest: the bytes are no such message.
    """
    try:
        return request_type.FromString(body)
    except DecodeError as error:
        raise InvalidRequest(f"malformed {request_type.DESCRIPTOR.full_name}: {error}") from None


def immediate(request_type: type[RequestT], method: Callable[[RequestT], Message]) -> Callable[[Answer, bytes], bytes]:
    """A unary handler around a method that answers at once."""

    def handle(call: Answer, body: bytes) -> bytes:
        return method(parse(request_type, body)).SerializeToString()

    return handle


class Waiting:
    """The requests whose answer needs something to happen first, each a task that ends with its caller.

    The transport answers DEADLINE_EXCEEDED when a caller's deadline passes, and calls ``on_cancel`` then and when the
    caller goes away; the task is cancelled by it. Work that several requests share is not harmed by that: each waits
    with a future of its own.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def handler(
        self, request_type: type[RequestT], method: Callable[[RequestT], Coroutine[Any, Any, Message]]
    ) -> Callable[[Answer, bytes], None]:
        """A unary handler around a coroutine method."""

        async def respond(request: RequestT) -> Body:
            return (await method(request)).SerializeToString()

        def handle(call: Answer, body: bytes) -> None:
            self.start(call, respond(parse(request_type, body)), request_type.DESCRIPTOR.name.removesuffix("Request"))

        return handle

    def start(self, call: Answer, work: Coroutine[Any, Any, Body | None], what: str) -> None:
        """Run ``work`` and answer what it returns; None means that it has seen to the answer itself."""
        task = asyncio.get_running_loop().create_task(_run(call, work, what), name=what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        call.on_cancel = task.cancel


async def _run(call: Answer, work: Coroutine[Any, Any, Body | None], what: str) -> None:
    try:
        message = await work
    except Exception as error:
        refuse(call, error, what)
    else:
        if message is not None:
            call.reply(message)
