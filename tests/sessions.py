"""A client and a server session joined through bytes: what tests of the transport without sockets share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from mmcore._ext.h2 import Method, Stream
from mmcore._ext.h2client import ClientCall, ClientSession
from mmcore._ext.h2server import ServerCall, ServerSession
from mmcore._ext.outbuf import Buffers
from mmcore.config import TransportSettings
from mmcore.errors import MmcoreError
from mmcore.transport.server import status_of

SETTINGS = TransportSettings()


class Outlet:
    """Stands for an asyncio transport: keeps what is written, or holds it back as a full socket would."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.held = 0
        self.full = False
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data
        if self.full:
            self.held += len(data)

    def get_write_buffer_size(self) -> int:
        return self.held

    def close(self) -> None:
        self.closed = True

    def take(self) -> bytes:
        data = bytes(self.written)
        self.written.clear()
        self.held = 0
        return data


class Faults:
    """What went wrong in callbacks, kept for the test to look at."""

    errors: list[Exception]

    def callback_failed(self, call: Stream, error: Exception) -> None:
        self.errors.append(error)


class Client(Faults, ClientSession):
    """A client session whose bytes go to its outlet."""

    def __init__(self, buffers: Buffers, settings: TransportSettings) -> None:
        self.errors = []
        self.dropped = False
        self.outlet = Outlet()
        self.attach(self.outlet, -1, "server", b"test")  # type: ignore[arg-type]  # as much of one as is used
        self.flush()

    def abort(self) -> None:
        self.dropped = True


class Server(Faults, ServerSession):
    """A server session whose bytes go to its outlet; streaming calls get the sink their method's handler makes."""

    def __init__(self, buffers: Buffers, settings: TransportSettings, methods: dict[bytes, Method]) -> None:
        self.errors = []
        self.dropped = False
        self.pongs = 0
        self.outlet = Outlet()
        self.attach(self.outlet, -1, "client")  # type: ignore[arg-type]  # as much of one as is used
        self.flush()

    def abort(self) -> None:
        self.dropped = True

    def on_pong(self) -> None:
        self.pongs += 1

    def handler_failed(self, call: ServerCall, error: Exception) -> None:
        call.fail(*status_of(error))
        if not isinstance(error, MmcoreError):
            self.errors.append(error)

    def open_stream_call(self, call: ServerCall, handler: Callable[[ServerCall], Any]) -> Any:
        return handler(call)


class Sink:
    """Takes a streaming call's events and notes them; ``then`` may do more with each message."""

    def __init__(self, call: ServerCall | None = None) -> None:
        self.call = call
        self.messages: list[bytes] = []
        self.events: list[str] = []
        self.error: tuple[int, str] | None = None

    def on_message(self, message: bytes) -> None:
        self.messages.append(message)
        self.events.append("message")
        if self.call is not None:
            self.call.taken(len(message))

    def on_end(self) -> None:
        self.events.append("end")

    def on_writable(self) -> None:
        self.events.append("writable")

    def on_error(self, status: int, details: str) -> None:
        self.error = (status, details)

    def on_close(self) -> None:
        self.events.append("close")


class Echo(Sink):
    """Answers each message with itself backwards, and the end with the end."""

    def on_message(self, message: bytes) -> None:
        super().on_message(message)
        assert isinstance(self.call, ServerCall)
        self.call.send(message[::-1])

    def on_end(self) -> None:
        super().on_end()
        assert isinstance(self.call, ServerCall)
        self.call.set_trailers([("count", str(len(self.messages)))])
        self.call.end()


def methods(unary: dict[str, Any], streaming: dict[str, Any] | None = None) -> dict[bytes, Method]:
    served = {path.encode(): Method(path, handler) for path, handler in unary.items()}
    for path, handler in (streaming or {}).items():
        served[path.encode()] = Method(path, handler, True)
    return served


class Pair:
    """Both sides, and the bytes that went between them."""

    def __init__(
        self,
        served: dict[bytes, Method],
        *,
        settings: TransportSettings = SETTINGS,
        client_settings: TransportSettings = SETTINGS,
    ) -> None:
        self.server = Server(Buffers(), settings, served)
        self.client = Client(Buffers(), client_settings)
        self.to_server = bytearray()
        self.to_client = bytearray()

    def call(
        self,
        path: str,
        message: Any,
        *,
        metadata: list[tuple[str, str | bytes]] | None = None,
        sink: Any = None,
        deadline: float | None = None,
        encoding: str | None = None,
        on_done: Callable[[ClientCall], object] | None = None,
    ) -> ClientCall:
        return self.client.request(Method(path), message, on_done, metadata, deadline, sink, encoding)

    def step(self, chunk: int = 1 << 18) -> bool:
        """Carry what is written on both sides across; whether there was any."""
        moved = False
        for source, target, log in (
            (self.client, self.server, self.to_server),
            (self.server, self.client, self.to_client),
        ):
            data = source.outlet.take()
            log += data
            for start in range(0, len(data), chunk):
                target.feed_bytes(data[start : start + chunk])
                moved = True
            source.resume_writing()
        return moved

    def run(self, chunk: int = 1 << 18) -> None:
        """Carry bytes until neither side has more to say."""
        while self.step(chunk):
            pass

    def end(self) -> None:
        """Lose the connection on both sides."""
        self.client.shut("test over")
        self.server.shut("test over")


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The data cut at these offsets."""
    edges = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]
