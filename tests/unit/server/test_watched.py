"""That looking at calls costs nothing while nobody looks, and that who looks hears of each end once."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mmcore.errors import InvalidRequest, Status
from mmcore.server.watched import Ended, WatchedCall, watched
from mmcore.transport import Server

PATH = "/a.A/Ask"


class Call:
    """What a transport's call is to its handler."""

    def __init__(self, deadline: float | None = None) -> None:
        self.metadata = (("a", "b"),)
        self.deadline = deadline
        self.cancelled = False
        self.on_cancel: Any = None
        self.answers: list[Any] = []

    def reply(self, message: Any) -> None:
        self.answers.append(message)

    def fail(self, status: int, details: str) -> None:
        self.answers.append((status, details))


class Seen:
    """Watches every call."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    def begin(self, path: str, call: Any, body: bytes) -> Ended | None:
        return lambda status, details, message: self.ends.append((path, body, status, details, message))


def test_what_is_not_surrounded_is_the_handler_itself() -> None:
    def handler(call: Any, body: bytes) -> bytes:
        return body

    server = Server()
    server.add_unary(PATH, handler)
    [method] = server.methods
    assert method.handler is handler
    server.surround(lambda path, inner: lambda call, body: path.encode())
    assert server.unary(PATH)(Call(), b"x") == PATH.encode()
    server.surround(None)
    assert method.handler is handler
    assert server.unary(PATH) is handler


def handle(handler: Any, call: Call, seen: Seen) -> Any:
    return watched(PATH, handler, handler, lambda path, call: None, [seen])(call, b"body")


def test_an_answer_at_once_one_later_and_an_error_are_told() -> None:
    seen, call = Seen(), Call()
    assert handle(lambda one, body: b"now", call, seen) == b"now"
    kept: list[WatchedCall] = []
    assert handle(lambda one, body: kept.append(one), call, seen) is None
    assert len(seen.ends) == 1
    kept[0].reply(b"later")
    kept[0].fail(Status.INTERNAL, "too late")

    def refuses(one: Any, body: bytes) -> None:
        raise InvalidRequest("no")

    with pytest.raises(InvalidRequest):
        handle(refuses, call, seen)
    assert [(status, details, message) for _, _, status, details, message in seen.ends] == [
        (Status.OK, "", b"now"), (Status.OK, "", b"later"), (Status.INVALID_ARGUMENT, "no", None),
    ]  # fmt: skip
    assert call.answers[0] == b"later"


@pytest.mark.parametrize(
    ("deadline", "status"), [(None, Status.CANCELLED), (1.0, Status.DEADLINE_EXCEEDED), (1e12, Status.CANCELLED)]
)
def test_a_call_that_is_taken_back_is_told_and_its_handler_too(deadline: float | None, status: Status) -> None:
    assert time.monotonic() > 1.0
    seen, call = Seen(), Call(deadline)
    told: list[str] = []

    def waits(one: Any, body: bytes) -> None:
        one.on_cancel = lambda: told.append("stop")

    handle(waits, call, seen)
    call.on_cancel()
    assert told == ["stop"]
    assert [end[2] for end in seen.ends] == [status]
