"""Calls that are looked at on their way: traced, logged, or written out with their payloads.

While nothing is to be looked at, the transport calls the methods' handlers themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from mmcore.errors import Status
from mmcore.server.calls import Answer, Body
from mmcore.tracing import RequestTrace
from mmcore.transport.server import status_of

#: A unary method's handler: ``(call, encoded request)`` to the encoded answer, or None when it comes through the call.
Handler = Callable[[Answer, bytes], Body | None]
#: Told the status, its text, and the answer if it has one.
Ended = Callable[[int, str, Body | None], object]


class Watcher(Protocol):
    """Something that looks at calls."""

    def begin(self, path: str, call: Answer, body: bytes) -> Ended | None:
        """What is to be told of the end of a call that begins; None: nothing."""


class WatchedCall:
    """A call as its handler sees it while others hear of its end. Satisfies :class:`mmcore.server.calls.Answer`.

    Attributes:
        trace: its spans, where it is traced.
        internal: whether another instance sent it.
    """

    def __init__(self, call: Answer, trace: RequestTrace | None) -> None:
        self.trace = trace
        self.internal: bool = getattr(call, "internal", False)
        self.ended: list[Ended] = []
        self._call = call
        self._over = False
        self._on_cancel: Callable[[], object] | None = None

    @property
    def peer(self) -> str:
        """The call's: who sent it."""
        peer: str = getattr(self._call, "peer", "")
        return peer

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The request's metadata, with the span that is the parent of what others do for it."""
        metadata = self._call.metadata
        if self.trace is None:
            return metadata
        kept = tuple(pair for pair in metadata if pair[0] not in ("traceparent", "tracestate"))
        return (*kept, *self.trace.headers())

    @property
    def deadline(self) -> float | None:
        """The call's."""
        return self._call.deadline

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._call.cancelled

    @property
    def on_cancel(self) -> Callable[[], object] | None:
        """Called when nobody does."""
        return self._on_cancel

    @on_cancel.setter
    def on_cancel(self, call: Callable[[], object] | None) -> None:
        self._on_cancel = call
        self.listen()

    def listen(self) -> None:
        """Hear of its end in any case."""
        self._call.on_cancel = self._cancelled

    def _cancelled(self) -> None:
        deadline = self._call.deadline
        if deadline is not None and time.monotonic() >= deadline:
            self.end(Status.DEADLINE_EXCEEDED, "deadline exceeded", None)
        else:
            self.end(Status.CANCELLED, "the caller has gone", None)
        if self._on_cancel is not None:
            self._on_cancel()

    def set_trailers(self, metadata: list[tuple[str, str | bytes]]) -> None:
        """Metadata sent with the status, where the call has such."""
        self._call.set_trailers(metadata)  # type: ignore[attr-defined]  # those of other instances alone are asked to

    def reply(self, message: Body) -> None:
        """Answer with OK."""
        self.end(Status.OK, "", message)
        self._call.reply(message)

    def fail(self, status: int, details: str) -> None:
        """Answer with an error."""
        self.end(status, details, None)
        self._call.fail(status, details)

    def end(self, status: int, details: str, message: Body | None) -> None:
        """Tell those who want to know, once."""
        if self._over:
            return
        self._over = True
        for ended in self.ended:
            ended(status, details, message)
        if self.trace is not None:
            self.trace.end(status, details)


def watched(
    path: str, handler: Handler, apart: Handler, trace: Callable[[str, Answer], RequestTrace | None],
    watchers: list[Watcher],
) -> Handler:  # fmt: skip
    """A handler that lets others look at calls; those that are traced are answered by ``apart``."""

    def handle(call: Answer, body: bytes) -> Body | None:
        traced = trace(path, call)
        told = [ended for watcher in watchers if (ended := watcher.begin(path, call, body)) is not None]
        if traced is None and not told:
            return handler(call, body)
        one = WatchedCall(call, traced)
        one.ended = told
        try:
            answer = (handler if traced is None else apart)(one, body)
        except Exception as error:
            one.end(*status_of(error), None)
            raise
        if answer is not None:
            one.end(Status.OK, "", answer)
        elif one.on_cancel is None:
            one.listen()
        return answer

    return handle
