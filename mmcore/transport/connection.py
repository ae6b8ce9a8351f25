"""One connection of either side: the compiled session tied to an event loop, its timers and its transport."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from mmcore._ext.h2 import Session, Stream
from mmcore._ext.outbuf import Buffers
from mmcore.config import TransportSettings
from mmcore.transport.listening import named

log = logging.getLogger(__name__)

#: (name, value) pairs; names in lower case, values bytes where the name ends in ``-bin`` and str elsewhere.
Metadata = Sequence[tuple[str, str | bytes]]
#: One gRPC message; a list is sent as one message without joining its parts.
Message = bytes | bytearray | memoryview | list[bytes | memoryview]

#: How often connections are looked at for the slow things: keepalive, stalls, age.
TICK_S = 1.0
#: How long a connection that has said its last word waits for the peer to close it.
LINGER_S = 1.0

_buffers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Buffers] = weakref.WeakKeyDictionary()


def loop_buffers(loop: asyncio.AbstractEventLoop) -> Buffers:
    """The read and write buffers that all connections of a loop share."""
    found = _buffers.get(loop)
    if found is None:
        found = _buffers[loop] = Buffers()
    return found


if TYPE_CHECKING:
    _Base = Session
else:
    # At run time the session comes from the other base: CPython takes the layout of the first base that has one.
    _Base = object


class Connection(_Base):
    """What server and client connections have in common; mixed into either kind of session, before it.

    Attributes:
        dropped: whether it was closed from here since its peer was gone or stuck.
    """

    def __init__(self, buffers: Buffers, settings: TransportSettings, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._made_at = self._heard_at = self._progress_at = time.monotonic()
        self._heard_bytes = self._sent_seen = 0
        self._pinged_at: float | None = None
        self.dropped = False

    # -- asyncio.BufferedProtocol; get_buffer, buffer_updated, pause_writing and resume_writing are the session's

    def connection_made(self, base: asyncio.BaseTransport) -> None:
        """Attach the session to its socket and greet the peer."""
        transport = cast(asyncio.Transport, base)  # uvloop's are transports without being subclasses
        self._transport = transport
        secure = transport.get_extra_info("ssl_object") is not None
        # The low-water mark is then 0: resume_writing means that everything handed over is written. TLS transports
        # pause at the high-water mark, others above it; one that pauses while empty has nothing to resume after.
        transport.set_write_buffer_limits(high=1 if secure else 0)
        socket = transport.get_extra_info("socket")
        fd = -1 if secure or socket is None else socket.fileno()
        self.attach(transport, fd, peer_name(transport), self.authority_name(), secure)
        self.flush()

    def authority_name(self) -> bytes | None:
        """What ``:authority`` is to say; None where nothing is sent."""
        return None

    def eof_received(self) -> bool:
        """The peer ended its side; neither side of gRPC does that halfway."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """End every call that is open."""
        for timer in (self._deadline_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self.shut(f"connection lost: {error}" if error else "connection closed by the other side")
        self._transport = None

    # -- hooks of the session

    def plan_flush(self) -> None:
        """Flush once, at the end of this loop iteration."""
        self._loop.call_soon(self.flush)

    def continue_later(self) -> None:
        """The transport holds bytes; by the next iteration it has written them or paused us."""
        self._loop.call_soon(self.flush)

    def abort(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def finish(self) -> None:
        """Close our side; the rest when the peer has closed its own.

        Closing at once, with bytes of the peer's unread, would make the kernel drop our last frames at its side: a
        flooding peer would never read the GOAWAY that tells it why.
        """
        transport = self._transport
        if transport is None:
            return
        if not transport.can_write_eof():  # TLS says its own goodbye
            transport.close()
            return
        try:
            transport.write_eof()
        except OSError:  # the peer was faster
            transport.abort()
            return
        self._linger_timer = self._loop.call_later(LINGER_S, transport.abort)

    def deadline_changed(self, deadline: float) -> None:
        """Wake up when the earliest deadline has passed."""
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        # Half a millisecond later, as loops round their clocks: waking early would only mean waking twice.
        delay = max(0.0, deadline - time.monotonic()) + 0.0005
        self._deadline_timer = self._loop.call_later(delay, self.expire)

    def callback_failed(self, call: Stream, error: Exception) -> None:
        """A callback of ours raised: its fault is logged, the connection goes on."""
        log.error("callback of a call failed", exc_info=error)

    def on_pong(self) -> None:
        """The peer lives."""
        self._pinged_at = None

    def owes_pong(self, now: float) -> bool:
        """Whether the peer has left a PING unanswered from one look to the next."""
        return self._pinged_at is not None and now - self._pinged_at >= TICK_S / 2

    # -- the slow checks

    def tick(self, now: float) -> str | None:
        """Look for a peer that is gone or stuck; the reason if the connection was dropped."""
        settings = self._settings
        if not self.settled and now - self._made_at > settings.handshake_timeout_s:
            return self._drop("no HTTP/2 preface and SETTINGS in time")
        if self.bytes_received != self._heard_bytes:
            self._heard_bytes, self._heard_at = self.bytes_received, now
        # Counted in messages' bytes: answers to PINGs are no progress. Our own calls may wait as long as they like.
        if self.client or not self.waiting or self.data_sent != self._sent_seen:
            self._sent_seen, self._progress_at = self.data_sent, now
        elif now - self._progress_at > settings.send_stall_timeout_s:
            return self._drop("the peer does not read what it asked for")
        if self._pinged_at is not None:
            if now - self._pinged_at > settings.keepalive_timeout_s:
                return self._drop("a keepalive PING was not answered")
        elif now - self._heard_at > self._silence_s():
            self._pinged_at = now
            self.ping()
        return None

    def _silence_s(self) -> float:
        """How long the peer may be silent before it is asked whether it lives."""
        settings = self._settings
        if self.client and self.open_streams:
            return min(settings.keepalive_s, settings.keepalive_waiting_s)
        return settings.keepalive_s

    def _drop(self, reason: str) -> str:
        log.info("connection dropped: %s", reason, extra={"peer": self.peer})
        self.dropped = True
        self.abort()
        return reason


def peer_name(transport: asyncio.Transport) -> str:
    """Who is at the other end, ``host:port`` or ``unix``."""
    name = transport.get_extra_info("peername")
    if isinstance(name, tuple):
        return named(name)
    return "unix"


def require_h2(context: ssl.SSLContext) -> ssl.SSLContext:
    """Offer HTTP/2 by ALPN, as gRPC needs."""
    context.set_alpn_protocols(["h2"])
    return context
