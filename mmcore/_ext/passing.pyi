"""A unary request passed through to the runtime that holds its model."""

from collections.abc import Callable
from typing import Any, final

from mmcore._ext.h2client import ClientCall, ClientSession
from mmcore._ext.h2server import ServerCall

HTTP_HEADERS: frozenset[str]
MOST_WAITING: int
TRACE_CONTEXT: tuple[bytes, bytes]

def kept_pairs(pairs: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]: ...

@final
class Target:
    copy: Any
    id: str
    headers: list[tuple[bytes, bytes]]
    limit: int
    running: int
    def __init__(self, copy: Any, known_as: str, limit: int = 0) -> None: ...
    def close(self) -> None: ...

@final
class Way:
    name: str
    path: str
    extraction: tuple[int, ...]
    injection: tuple[int, ...] | None
    versioned: bool
    def __init__(
        self, name: str, extraction: tuple[int, ...], injection: tuple[int, ...] | None, versioned: bool
    ) -> None: ...

@final
class Asked:
    way: Way
    name: str
    kind: Any
    version: str
    began: int
    sent: int

@final
class Quick:
    def __init__(
        self,
        owner: Passing,
        method: str,
        kind: Any,
        lookup: Callable[..., Any],
        otherwise: Callable[[Any, bytes, Asked], object],
        shared_from: int = 0,
    ) -> None: ...
    def __call__(self, call: Any, body: bytes) -> None: ...

def asked_by(way: Way, body: bytes, kind: Any, began: int) -> Asked: ...

@final
class Passed:
    call: Any
    body: bytes
    target: Target
    again: Asked | None
    over: bool
    def cancel(self) -> None: ...
    def send(self) -> None: ...
    def answered(self, call: ClientCall) -> None: ...
    def refuse(self, call: ClientCall) -> None: ...

class Passing:
    session: ClientSession | None
    in_flight: int
    ways: dict[str, Way]
    def __init__(self) -> None: ...
    def unary(self, call: Any, body: bytes, target: Target, asked: Asked) -> None: ...
    def describe(self, method: str) -> Way: ...
    def target(self, copy: Any) -> Target: ...
    def give_up(self, passed: Passed, status: int, details: str) -> None: ...
    def connect(self, passed: Passed) -> None: ...
    def failed(self, passed: Passed, answer: ClientCall) -> None: ...

def pass_stream_to(
    asked: ServerCall,
    session: ClientSession,
    target: Target,
    path: str,
    sink: object,
    context: list[tuple[bytes, bytes]] | None = None,
) -> ClientCall: ...
