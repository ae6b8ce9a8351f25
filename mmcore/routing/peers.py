"""The other instances as they are seen from here: a channel to each, how it does, and whether it is to be asked."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable
from typing import Final

from mmcore._ext.forward import Traffic
from mmcore.config import TransportSettings
from mmcore.errors import RpcError
from mmcore.log import event
from mmcore.transport import Channel
from mmcore.transport.channel import ClientConnection

log = logging.getLogger(__name__)

#: Of channels between instances: answers may be as long as they are, and one that hangs or cannot be reached any more
#: is found out, within some seconds while requests wait for it.
PEER_SETTINGS: Final = TransportSettings(
    max_message_bytes=2**31 - 1,
    keepalive_s=10.0,
    keepalive_waiting_s=1.0,
    keepalive_timeout_s=4.0,
    connect_timeout_s=2.0,
)
#: How long a peer may take for its first word on a connection.
GREETING_S: Final = 2.0
#: Pauses before a peer that has failed is tried again: the first, and the longest; each is twice the last.
PROBE_FIRST_S: Final = 0.05
PROBE_LONGEST_S: Final = 5.0


class Peer(Traffic):
    """One other instance.

    Requests share one connection, which gathers the frames of many into one write. A peer whose connection breaks, or
    cannot be opened, is not :attr:`usable` until a connection was opened again, which is tried in the background at
    growing intervals; those shrink only after an answer, so one that breaks each time it is asked is asked seldom. One
    that hangs is :attr:`silent` some seconds before that is taken for a broken connection.

    Attributes:
        instance: its id.
        address: ``host:port`` or ``unix:PATH``.
    """

    def __init__(
        self,
        instance: str,
        address: str,
        *,
        settings: TransportSettings = PEER_SETTINGS,
        ssl: Callable[[], ssl.SSLContext] | None = None,
        on_down: Callable[[str], object] | None = None,
    ) -> None:
        self.instance = instance
        self.address = address
        self.usable = True
        self._on_down = on_down
        self._channel = Channel(address, settings=settings, ssl=ssl, on_silence=self._heard)
        self._timer: asyncio.TimerHandle | None = None
        self._probe: asyncio.Task[None] | None = None
        self._closed = False

    def connection(self) -> ClientConnection | None:
        """The connection, if it is open and takes calls."""
        self.session = connection = self._channel.pick()
        return connection

    async def connect(self) -> None:
        """Open the connection.

        Raises:
            RpcError: UNAVAILABLE; the peer is no longer usable.
        """
        try:
            await self._channel.greeted(GREETING_S)
        except RpcError as error:
            self.mark_down(error.details)
            raise

    async def unary(self, path: str, message: bytes, *, timeout_s: float) -> bytes:
        """Call a method of the instance itself, no request's; RpcError for any status but OK."""
        return await self._channel.unary(path, message, timeout_s=timeout_s)

    def mark_down(self, reason: str) -> None:
        """Ask it nothing until it can be reached again."""
        if self._closed or not self.usable:
            return
        self.usable = False
        log.warning(
            "instance %s at %s is not reachable: %s", self.instance, self.address, reason,
            extra=event("unreachable", instance=self.instance, address=self.address, reason=reason),
        )  # fmt: skip
        self._probe_later()
        if self._on_down is not None:
            self._on_down(self.instance)

    async def close(self) -> None:
        """Ask it nothing any more; what is in flight ends as if the connection had broken."""
        self._closed = True
        self.usable = False
        if self._timer is not None:
            self._timer.cancel()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        await self._channel.close()
        self.session = None

    def _heard(self, silent: bool) -> None:
        self.silent = silent

    def _probe_later(self) -> None:
        pause = min(PROBE_LONGEST_S, PROBE_FIRST_S * 2 ** min(self.failures, 16))
        self.failures += 1
        loop = asyncio.get_running_loop()
        spread = random.uniform(0.8, 1.2)  # noqa: S311  # spreads, hides nothing
        self._timer = loop.call_later(pause * spread, self._start_probe, loop)

    def _start_probe(self, loop: asyncio.AbstractEventLoop) -> None:
        self._probe = loop.create_task(self._try_again(), name=f"probe instance {self.instance}")

    async def _try_again(self) -> None:
        try:
            await self._channel.greeted(GREETING_S)
        except RpcError:
            if not self._closed:
                self._probe_later()
        else:
            self.usable = True
            log.info(
                "instance %s at %s is reachable again", self.instance, self.address,
                extra=event("reachable", instance=self.instance, address=self.address),
            )  # fmt: skip
