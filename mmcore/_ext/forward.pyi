"""A unary request passed on to another instance as it came."""

from collections.abc import Callable
from typing import Any, final

from mmcore._ext.h2 import Method
from mmcore._ext.h2client import ClientCall, ClientSession
from mmcore._ext.h2server import ServerCall

class Traffic:
    in_flight: int
    latency_s: float
    answered: int
    failures: int

@final
class Forwarded:
    call: Any
    body: bytes
    state: Any
    peer: Traffic
    over: bool
    def __init__(
        self,
        call: object,
        body: bytes,
        state: object,
        failed: Callable[[Forwarded, ClientCall], object],
        method: Method | None = None,
    ) -> None: ...
    def send(self, peer: Traffic, session: ClientSession, headers: list[tuple[bytes, bytes]]) -> None: ...
    def cancel(self) -> None: ...
    def answered(self, call: ClientCall) -> None: ...
    def refuse(self, call: ClientCall) -> None: ...

def pass_stream(
    asked: ServerCall, session: ClientSession, headers: list[tuple[bytes, bytes]], sink: object
) -> ClientCall: ...
def pass_head(asked: ServerCall, call: ClientCall) -> None: ...
def pass_trailers(asked: ServerCall, call: ClientCall) -> None: ...
