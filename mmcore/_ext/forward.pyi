"""A unary request passed on to another instance as it came."""

from collections.abc import Callable, Sequence
from typing import Any, final

from mmcore._ext.h2client import ClientCall, ClientSession
from mmcore._ext.h2server import ServerCall, Working

class Traffic:
    usable: bool
    silent: bool
    session: ClientSession | None
    in_flight: int
    @property
    def others(self) -> int: ...
    @property
    def latency_s(self) -> float: ...
    answered: int
    failures: int

@final
class Forwarded:
    call: Any
    body: bytes
    model: str
    holders: tuple[Any, ...]
    mode: str
    resolved: bool
    idempotent: bool
    instead: Callable[..., object] | None
    peer: Traffic
    over: bool
    arrival: Any
    tried: tuple[str, ...]
    ran: int
    last: Any
    def send(self, peer: Traffic, session: ClientSession, headers: list[tuple[bytes, bytes]]) -> None: ...
    def cancel(self) -> None: ...
    def answered(self, call: ClientCall) -> None: ...
    def refuse(self, call: ClientCall) -> None: ...

class Forwards:
    choose: Callable[..., Any] | None
    first_hop: list[tuple[bytes, bytes]]
    sent: int
    working: Working | None
    def __init__(self) -> None: ...
    def unary(
        self,
        call: Any,
        body: bytes,
        model: str,
        holders: Sequence[Traffic],
        *,
        mode: str = "hit",
        resolved: bool = False,
        idempotent: bool = True,
        instead: Callable[..., object] | None = None,
        path: str | None = None,
        ran: int = 0,
        tried: tuple[str, ...] = (),
    ) -> None: ...
    def one(self, holders: Sequence[Traffic]) -> Any: ...
    def begin(self, request: Forwarded) -> None: ...
    def failed(self, request: Forwarded, answer: ClientCall) -> None: ...

def pass_stream(
    asked: ServerCall, session: ClientSession, headers: list[tuple[bytes, bytes]], sink: object
) -> ClientCall: ...
