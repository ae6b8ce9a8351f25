"""One HTTP/1.1 connection: bytes to requests by httptools (llhttp), one answered at a time, everything bounded.

A handler gets a whole request and may answer at once or later, without a task of its own. Requests sent ahead wait for
the answer before theirs, and the connection is not read meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import httptools

from mmcore._ext.h2server import Working
from mmcore.config import TransportSettings
from mmcore.server.rest.request import HTTP_STATUS, Part, Request
from mmcore.transport.connection import peer_name
from mmcore.transport.server import status_of

log = logging.getLogger(__name__)

#: How long a connection without a request may stay.
IDLE_S: Final = 120.0
#: How long what a client still sends is thrown away after its request was refused: it may read the answer only then.
LINGER_S: Final = 2.0
#: Answers up to this length go out in one piece with their head.
_JOINED_BYTES: Final = 65536


class Owner(Protocol):
    """The listener, as its connections see it."""

    settings: TransportSettings
    handle: Callable[[Request], None]
    draining: bool
    refused: int

    @property
    def working(self) -> Working:
        """Counts the requests that are being answered."""

    def joined(self, connection: Connection) -> None:
        """A connection was accepted."""

    def left(self, connection: Connection) -> None:
        """A connection has ended."""


class Refused(Exception):
    """What comes cannot be taken: the HTTP status, and why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Connection(asyncio.Protocol):
    """One accepted connection.

    Attributes:
        lost: whether it is closed.
    """

    def __init__(self, owner: Owner) -> None:
        self.lost = False
        self._owner = owner
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._ready: deque[Request] = deque()
        self._current: Request | None = None
        self._reading = True
        self._writable = True
        self._deaf = False
        self._refusal: Refused | None = None
        self._since = time.monotonic()  # something came or went
        self._began: float | None = None  # a head that is being received
        self._receiving = False
        self._start()

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self._current is not None

    # What the loop calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvloop's is no subclass
        """Join the listener's connections."""
        self._transport = transport
        self._owner.joined(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell whoever works on a request that nobody waits for it any more."""
        self.lost = True
        self._owner.left(self)
        self._ready.clear()
        if self._current is not None:
            self._current.left()
            self._end_current()

    def data_received(self, data: bytes) -> None:
        """Take bytes, and answer the requests that are complete."""
        if self._deaf:
            return
        self._since = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Nothing is upgraded to: it is answered like any other, and the connection ends there.
            self._ready[-1].keep_alive = False
            self._deaf = True
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, MemoryError):
                self._refuse(Refused(429, "there is no memory for this request"))
            else:
                self._refuse(self._refusal or Refused(400, f"malformed HTTP: {error}"))
        self._next()

    def eof_received(self) -> None:
        """A client that ends its side is gone, as nginx has it: clients whose time is up look no different."""

    def pause_writing(self) -> None:
        """The client does not read."""
        self._writable = False

    def resume_writing(self) -> None:
        """It does again."""
        self._writable = True
        self._since = time.monotonic()
        self._next()

    # What the parser calls.

    def _start(self) -> None:
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._head_bytes = self._body_bytes = 0

    def on_message_begin(self) -> None:
        """A request begins."""
        self._start()
        self._began = self._since
        self._receiving = True

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._target += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; also one behind a chunked body."""
        self._headers[name.lower()] = value
        self._count_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Refuse a body that is announced as too long before any of it is read."""
        self._began = None
        limit = self._owner.settings.max_message_bytes
        length = self._headers.get(b"content-length", b"0")
        if int(length) > limit:
            raise self._refused(413, f"the body of {length.decode()} bytes is above the limit of {limit} bytes")
        if self._headers.get(b"expect", b"").lower() == b"100-continue" and self._current is None and not self._ready:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body_bytes += len(body)
        limit = self._owner.settings.max_message_bytes
        if self._body_bytes > limit:
            raise self._refused(413, f"the body is above the limit of {limit} bytes")
        self._body.append(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        self._receiving = False
        self._ready.append(
            Request(
                self,
                self._parser.get_method().decode("ascii"),
                self._target.decode("latin-1"),
                self._headers,
                self._body,
                keep_alive=self._parser.should_keep_alive(),
            )
        )
        self._start()

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._owner.settings.max_header_bytes:
            limit = self._owner.settings.max_header_bytes
            raise self._refused(431, f"the request's line and headers are above the limit of {limit} bytes")

    def _refused(self, status: int, text: str) -> Refused:
        # The parser hides what its callbacks raise.
        self._refusal = Refused(status, text)
        return self._refusal

    # Requests and answers.

    def _next(self) -> None:
        """Start on the next request, if the one before is answered and the client takes its answers."""
        while self._ready and self._current is None and self._writable and not self.lost:
            request = self._current = self._ready.popleft()
            self._owner.working.count += 1
            if not request.method and self._refusal is not None:
                request.fail(self._refusal.status, str(self._refusal))
                return
            try:
                self._owner.handle(request)
            except Exception as error:
                log.error("request failed", exc_info=error, extra={"method": request.target})
                status, text = status_of(error)
                request.fail(HTTP_STATUS[status], text)
        reading = not self._ready
        if reading is not self._reading and not self._transport.is_closing():
            self._reading = reading
            if reading:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _end_current(self) -> None:
        if self._current is not None:
            self._current = None
            self._owner.working.count -= 1

    def answer(self, request: Request, head: bytes, parts: Sequence[Part]) -> None:
        """Send an answer: its head, to which what concerns the connection is added, and its body."""
        closing = not request.keep_alive or self._owner.draining
        head += b"connection: close\r\n\r\n" if closing else b"\r\n"
        if sum(map(len, parts)) <= _JOINED_BYTES:
            self._transport.write(b"".join((head, *parts)))
        else:
            self._transport.writelines([head, *parts])
        self._since = time.monotonic()
        self._end_current()
        if not closing:
            # Not from within the handler of the request before: many sent ahead would nest as deep.
            if self._ready:
                asyncio.get_running_loop().call_soon(self._next)
        elif self._refusal is not None:
            if self._transport.can_write_eof():
                self._transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER_S, self._transport.close)
        else:
            self._transport.close()

    def _refuse(self, refusal: Refused) -> None:
        """Answer what cannot be read as a request, behind those that could; nothing more is read."""
        self._deaf = True
        self._receiving = False
        self._owner.refused += 1
        self._refusal = refusal
        self._ready.append(Request(self, "", "", {}, [], keep_alive=False))

    @property
    def peer(self) -> str:
        """Who has connected, ``host:port`` or ``unix``."""
        return peer_name(self._transport)

    # What the listener calls.

    def leave(self) -> None:
        """End once what is being received or answered is answered; at once if nothing is."""
        if self._current is None and not self._ready and not self._receiving:
            self._transport.close()

    def tick(self, now: float) -> None:
        """Close it when its client stalls, or has had no request for long."""
        settings = self._owner.settings
        silent_s = now - self._since
        if self._current is not None and self._writable:
            return
        if self._began is not None:
            if now - self._began > settings.handshake_timeout_s:
                self._transport.abort()
        elif not self._writable or self._receiving:
            if silent_s > settings.send_stall_timeout_s:
                self._transport.abort()
        elif silent_s > IDLE_S:
            self._transport.close()

    def abort(self) -> None:
        """Close it now."""
        self._transport.abort()
