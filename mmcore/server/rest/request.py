"""One HTTP request, and the way its answer goes back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from mmcore._ext.calls import CallCounters
from mmcore.errors import Status

if TYPE_CHECKING:
    from mmcore.server.rest.connection import Connection

Part = bytes | bytearray | memoryview

JSON: Final = b"application/json"

#: gRPC status to HTTP status as google/rpc/code.proto gives it; the archived stack's REST proxy went by it as well.
HTTP_STATUS: Final = (200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401)

#: The gRPC status that an answer is counted under where no gRPC method has given it.
_CODES: Final[dict[int, Status]] = {
    200: Status.OK,
    400: Status.INVALID_ARGUMENT,
    413: Status.RESOURCE_EXHAUSTED,
    429: Status.RESOURCE_EXHAUSTED,
    500: Status.INTERNAL,
    503: Status.UNAVAILABLE,
}

_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}
_STATUS_LINES: Final = {
    status: f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii") for status, phrase in _PHRASES.items()
}


class Request:
    """What came, and where its answer goes.

    Attributes:
        method, target: ``GET`` and ``/v2/models?limit=1``, as they came.
        headers: names in lower case; of a repeated one the last value.
        length: of the body as it came.
        on_cancel: called when the client goes away before it has its answer.
        counters: what the answer is counted in; None: nothing.
        code: the gRPC status that the answer is counted under; None: the one that belongs to the HTTP status.
    """

    __slots__ = (
        *("_began", "_connection", "_pieces", "answered", "code", "counters", "headers", "keep_alive", "length"),
        *("method", "on_cancel", "target"),
    )

    def __init__(
        self, connection: Connection, method: str, target: str, headers: dict[bytes, bytes], pieces: list[bytes],
        *, keep_alive: bool,
    ) -> None:  # fmt: skip
        self._connection = connection
        self.method = method
        self.target = target
        self.headers = headers
        self._pieces: list[bytes | bytearray] = [*pieces]
        self.keep_alive = keep_alive
        self.answered = False
        self.on_cancel: Callable[[], object] | None = None
        self.counters: CallCounters | None = None
        self.code: int | None = None
        self._began = time.monotonic()
        self.length = sum(map(len, pieces))

    @property
    def peer(self) -> str:
        """Who sent it, ``host:port`` or ``unix``."""
        return self._connection.peer

    @property
    def body(self) -> bytes | bytearray:
        """The body, not decompressed; whoever asks for a long one calls :meth:`gather` before."""
        if len(self._pieces) != 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]

    @body.setter
    def body(self, body: bytes | bytearray) -> None:
        self._pieces = [body]

    def gather(self) -> None:
        """In a thread: put a long body together, and leave the interpreter to others after each of its pieces."""
        pieces = self._pieces[::-1]
        self._pieces = []
        whole = bytearray()
        while pieces:
            whole += pieces.pop()
            time.sleep(0)
        self._pieces = [whole]

    @property
    def gone(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.answered or self._connection.lost

    def send(
        self,
        body: Part | list[Part] = b"",
        *,
        status: int = 200,
        content_type: bytes = JSON,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        """Answer. The parts of a body go out one behind the other; what comes when nobody waits is dropped."""
        if self.gone:
            return
        self.answered = True
        parts = body if isinstance(body, list) else [body]
        length = 0
        for part in parts:
            length += len(part)
        head = b"%bcontent-type: %b\r\ncontent-length: %d\r\n" % (_STATUS_LINES[status], content_type, length)
        for name, value in headers:
            head += b"%b: %b\r\n" % (name, value)
        self._count(_CODES.get(status, Status.UNKNOWN) if self.code is None else self.code, length)
        self._connection.answer(self, head, [] if self.method == "HEAD" else parts)

    def left(self) -> None:
        """The client is gone."""
        if not self.answered:
            self._count(Status.CANCELLED, 0)
        if self.on_cancel is not None:
            self.on_cancel()

    def _count(self, code: int, length: int) -> None:
        if self.counters is not None:
            self.counters.count(code, time.monotonic() - self._began, self.length, length)

    def fail(self, status: int, text: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Answer with an HTTP status and ``{"error": text}``."""
        self.send(json.dumps({"error": text}).encode(), status=status, headers=headers)
