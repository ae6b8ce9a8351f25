"""Answers of the gRPC methods' handlers on their way to HTTP; each an :class:`mmcore.server.calls.Answer`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import re
from collections.abc import Callable
from typing import Final

from mmcore.errors import RpcError, Status
from mmcore.server.calls import Answer, Body
from mmcore.server.rest.request import HTTP_STATUS, Request

#: A gRPC method's handler: ``(call, encoded request)`` to the encoded answer, or None when it comes through the call.
UnaryHandler = Callable[[Answer, bytes], Body | None]

#: Headers of the HTTP request itself, which would mislead the instance that it is passed on to.
_OF_HTTP: Final = frozenset({
    *(b"accept", b"accept-charset", b"accept-encoding", b"accept-language", b"cache-control", b"connection"),
    *(b"content-encoding", b"content-length", b"content-type", b"cookie", b"expect", b"host", b"keep-alive", b"origin"),
    *(b"inference-header-content-length", b"pragma", b"proxy-connection", b"referer", b"te", b"trailer"),
    *(b"transfer-encoding", b"upgrade", b"user-agent"),
})  # fmt: skip
#: What names and values of metadata may be (gRPC over HTTP/2).
_NAME: Final = re.compile(rb"[0-9a-z_.-]+")
_TEXT: Final = re.compile(rb"[\x20-\x7e]*")


class HttpAnswer:
    """Where the answer to one HTTP request goes; what an encoded one becomes is the subclass's to say."""

    __slots__ = ("_request",)

    def __init__(self, request: Request) -> None:
        self._request = request

    @property
    def peer(self) -> str:
        """Who sent the request, ``host:port`` or ``unix``."""
        return self._request.peer

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The request's headers."""
        return metadata_of(self._request)

    @property
    def deadline(self) -> float | None:
        """HTTP has none; the parameter ``timeout`` of an inference limits its wait."""
        return None

    @property
    def cancelled(self) -> bool:
        """Whether the client is gone."""
        return self._request.gone

    @property
    def on_cancel(self) -> Callable[[], object] | None:
        """Called when the client goes away."""
        return self._request.on_cancel

    @on_cancel.setter
    def on_cancel(self, call: Callable[[], object] | None) -> None:
        self._request.on_cancel = call

    def reply(self, message: Body) -> None:
        """Answer with JSON that is ready."""
        self._request.send(joined(message))

    def fail(self, status: int, details: str) -> None:
        """Answer with an error."""
        self._request.code = status
        self._request.fail(HTTP_STATUS[status], details or Status(status).name)


class _Awaited:
    """An answer that a coroutine waits for."""

    __slots__ = ("_answered", "_request", "on_cancel")

    def __init__(self, request: Request) -> None:
        self.on_cancel: Callable[[], object] | None = None
        self._request = request
        self._answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    @property
    def peer(self) -> str:
        """Who sent the request, ``host:port`` or ``unix``."""
        return self._request.peer

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return metadata_of(self._request)

    @property
    def deadline(self) -> float | None:
        return None

    @property
    def cancelled(self) -> bool:
        return self._answered.cancelled()

    def reply(self, message: Body) -> None:
        if not self._answered.done():
            self._answered.set_result(joined(message))

    def fail(self, status: int, details: str) -> None:
        if not self._answered.done():
            self._answered.set_exception(RpcError(Status(status), details))

    async def answer(self) -> bytes:
        try:
            return await self._answered
        except asyncio.CancelledError:
            if self.on_cancel is not None:
                self.on_cancel()
            raise


async def answer_of(handler: UnaryHandler, request: Request, message: bytes) -> bytes:
    """What a method answers to an encoded request; cancelling it takes the call back.

    Raises:
        RpcError, MmcoreError: the method refused.
    """
    call = _Awaited(request)
    answer = handler(call, message)
    return await call.answer() if answer is None else joined(answer)


def joined(message: Body) -> bytes:
    """An encoded message in one piece."""
    if isinstance(message, bytes):
        return message
    return b"".join(message) if isinstance(message, list) else bytes(message)


def metadata_of(request: Request) -> tuple[tuple[str, str | bytes], ...]:
    """The headers as gRPC metadata: that is where a client names a model in another way, and who it is.

    Without those that are about the HTTP request itself, those that only instances send each other, and what no
    metadata can be; values of names that end in ``-bin`` are base64.
    """
    found: list[tuple[str, str | bytes]] = []
    for raw_name, raw_value in request.headers.items():
        if raw_name in _OF_HTTP or raw_name.startswith((b"mmcore-", b"grpc-")) or _NAME.fullmatch(raw_name) is None:
            continue
        name = raw_name.decode("ascii")
        if raw_name.endswith(b"-bin"):
            with contextlib.suppress(binascii.Error):
                found.append((name, base64.b64decode(raw_value + b"=" * (-len(raw_value) % 4))))
        elif _TEXT.fullmatch(raw_value) is not None:
            found.append((name, raw_value.decode("ascii")))
    return tuple(found)
