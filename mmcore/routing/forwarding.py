"""Requests passed on to the instances that hold a model, and what is done when one of them does not answer.

A request goes to one of the holders as it came (``ext/forward.pyx``). It goes to another one only where that is safe:

* a holder that certainly did nothing (the connection is not to be had or was lost before the request had left, the
  stream was refused, the copy is not there any more) is followed by the next;
* a holder that may have run it (the connection broke, or it answers UNAVAILABLE) is followed by one other, and only
  where running twice does no harm, which inference is taken for;
* a holder that refuses for want of room (RESOURCE_EXHAUSTED) is followed by one other;
* every other answer is the answer.

When no holder is left, the caller of :meth:`Forwarding.unary` hears of it and may load the model somewhere. A request
that was passed on to be answered from a copy is never passed on again, others at most twice (``hops.py``): no loops.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from mmcore._ext.forward import Forwarded, Forwards
from mmcore._ext.h2client import ClientCall
from mmcore.config import TransportSettings
from mmcore.errors import MmcoreError, RpcError, Status
from mmcore.routing.hops import Arrival, Mode, arrival_of, hop_headers, not_here, says_not_here
from mmcore.routing.peers import PEER_SETTINGS, Peer
from mmcore.transport import ClientStream, StreamCall
from mmcore.transport.server import status_of

log = logging.getLogger(__name__)

#: Messages of a stream that are kept until the first answer, in case another holder has to be asked, in bytes.
REPLAY_BYTES: Final = 2**20
#: Answers of a holder, not of the model, that another holder may improve on.
OTHERS_MAY_ANSWER: Final = (Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED)
#: Answers of an instance that was to load the model and has not, or has no room for it.
_NOT_LOADED: Final = (Status.FAILED_PRECONDITION, Status.RESOURCE_EXHAUSTED)
#: How long a peer that has left may take for what is in flight.
LEAVE_S: Final = 30.0


class Unanswered(NamedTuple):
    """Why no holder answered a request: the last one's status and text, who was asked, and how many may have run it."""

    status: Status
    details: str
    tried: tuple[str, ...]
    ran: int = 0


#: Given the call, its message and what was tried, answers a request that no holder has answered.
Instead = Callable[[Any, bytes, Unanswered], object]


class Forwarding(Forwards):
    """Passes requests on to other instances.

    :meth:`unary` passes a unary request on, :meth:`stream` a stream.

    Attributes:
        choose: given the usable ones of several holders, returns the one to be asked; None: by requests in flight.
        on_not_here: told (model, instance) when a holder has no copy any more, so that the table is corrected.
        on_lost: told (model, instance) when an instance was lost that was to load the model for a request.
        on_lost_alone: the same of one that was to answer a request from a copy, the only one that it had from here.
        passed_over: holders that were asked and have not answered a request, so that another one had to be found.
        unanswered: requests for which no holder was left.

    Args:
        instance: this one's id; it is never among the holders that are asked.
        on_down: told the instance that cannot be reached, once each time.
        settings, ssl: of the channel to each peer.
    """

    def __init__(
        self,
        instance: str,
        *,
        choose: Callable[[Sequence[Peer]], Peer] | None = None,
        on_not_here: Callable[[str, str], object] | None = None,
        on_down: Callable[[str], object] | None = None,
        settings: TransportSettings = PEER_SETTINGS,
        ssl: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        super().__init__()
        self.choose = choose
        self.first_hop = hop_headers(Mode.HIT, 1, (instance,))
        self.instance = instance
        self.on_not_here = on_not_here
        self.on_lost: Callable[[str, str], object] | None = None
        self.on_lost_alone: Callable[[str, str], object] | None = None
        self._on_down = on_down
        self._settings = settings
        self._ssl = ssl
        self._peers: dict[str, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.passed_over = 0
        self.unanswered = 0

    # Who there is.

    @property
    def peers(self) -> dict[str, Peer]:
        """The other instances by id."""
        return self._peers

    def update(self, instance: str, address: str | None) -> None:
        """Note where an instance can be reached, ``host:port`` or ``unix:PATH``; None when it has left.

        What is in flight to one that has left, or moved, may end.
        """
        known = self._peers.get(instance)
        if instance == self.instance or (known is not None and known.address == address):
            return
        if known is not None:
            del self._peers[instance]
            known.usable = False
            self._start(_leave(known), f"let go of instance {instance}")
        if address is not None:
            self._peers[instance] = Peer(
                instance, address, settings=self._settings, ssl=self._ssl, on_down=self._on_down
            )

    def holders(self, instances: Iterable[str]) -> tuple[Peer, ...]:
        """The peers of these ids, without this instance and without those that are not known."""
        return tuple(peer for instance in instances if (peer := self._peers.get(instance)) is not None)

    async def close(self) -> None:
        """Close all connections; what is in flight ends with UNAVAILABLE."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for peer in self._peers.values():
            await peer.close()
        self._peers.clear()

    # Unary calls that are not common.

    def begin(self, request: Forwarded) -> None:
        """Send a request to the first holder, unless it has come so far already."""
        request.arrival = arrival = arrival_of(request.call)
        if arrival is not None:
            request.tried = (*arrival.tried, *request.tried)
            if not arrival.goes_on:
                not_here(request.call, self.instance)
                return
        self._next(request)

    def failed(self, request: Forwarded, answer: ClientCall) -> None:
        """A holder's answer is not OK: ask another one, or pass it on."""
        peer = request.peer
        assert isinstance(peer, Peer)
        not_loaded = request.mode == Mode.LOAD and answer.status in _NOT_LOADED
        if answer.lost and not answer.refused:
            self._lost_with(request, peer)
        if not self._has_done_nothing(request.model, peer, answer) and not not_loaded:
            if answer.status not in OTHERS_MAY_ANSWER:
                request.refuse(answer)
                return
            request.ran += 1
            if not request.idempotent or request.ran > 1:
                request.refuse(answer)
                return
        self._pass_over(request, peer, Status(answer.status), answer.details)
        self._again(request, None if answer.lost or not request.ran else answer)

    def _lost_with(self, request: Forwarded, peer: Peer) -> None:
        """An instance was lost that may have run a request: it may be the request that has ended it."""
        # The first of several finds the others still in flight, and those after it a peer that is not usable any more.
        alone = peer.usable and not peer.in_flight
        told = self.on_lost if request.mode == Mode.LOAD else self.on_lost_alone if alone else None
        if told is not None:
            told(request.model, peer.instance)

    def _again(self, request: Forwarded, answer: ClientCall | None) -> None:
        """Ask the next holder, after the one that asked has returned; without one pass this answer on, if there is one.

        What goes wrong here is answered here, as nobody else is left to do so.
        """
        try:
            if answer is not None and self._next_holder(request) is None:
                request.refuse(answer)
            else:
                self._next(request)
        except Exception as error:
            status, text = status_of(error)
            if not isinstance(error, MmcoreError):
                log.error("passing a request on failed", exc_info=error)
            request.call.fail(status, text)

    def _next(self, request: Forwarded) -> None:
        while (peer := self._next_holder(request)) is not None:
            connection = peer.connection()
            if connection is None:
                request.call.on_cancel = request.cancel
                self._start(self._connect(request, peer), f"connect to instance {peer.instance}")
                return
            try:
                request.send(peer, connection, self._headers(request))
                return
            except ConnectionError as error:
                self._pass_over(request, peer, Status.UNAVAILABLE, str(error))
        self._exhausted(request)

    async def _connect(self, request: Forwarded, peer: Peer) -> None:
        try:
            await peer.connect()
        except RpcError as error:
            self._pass_over(request, peer, error.status, error.details)
        if not request.over:
            self._again(request, None)

    def _next_holder(self, request: Forwarded) -> Peer | None:
        left = [one for one in request.holders if one.instance not in request.tried]
        if request.ran:
            # It has one more chance; whoever may be lost like the last one is none.
            left = [one for one in left if not one.silent]
        peer: Peer | None = self.one(left)
        return peer

    def _headers(self, request: Forwarded) -> list[tuple[bytes, bytes]]:
        return self._hop_headers(
            Mode(request.mode), request.arrival, request.tried, request.model if request.resolved else ""
        )

    def _hop_headers(
        self, mode: Mode, arrival: Arrival | None, tried: tuple[str, ...], model: str
    ) -> list[tuple[bytes, bytes]]:
        hops = 1 if arrival is None else arrival.hops + 1
        return hop_headers(mode, hops, (*tried, self.instance), model)

    def _pass_over(self, request: Forwarded, peer: Peer, status: Status, details: str) -> None:
        self.passed_over += 1
        request.tried = (*request.tried, peer.instance)
        request.last = (status, details)

    def _has_done_nothing(self, model: str, peer: Peer, answer: ClientCall) -> bool:
        """Whether a peer has certainly not run the request; notes what its answer says of it."""
        if answer.lost:
            peer.mark_down(answer.details)
        if answer.refused:
            return True
        if says_not_here(answer):
            if self.on_not_here is not None:
                self.on_not_here(model, peer.instance)
            return True
        return False

    def _exhausted(self, request: Forwarded) -> None:
        self.unanswered += 1
        status, details = request.last or (
            Status.UNAVAILABLE, f"no instance that holds model {request.model!r} can be reached"
        )  # fmt: skip
        if request.instead is None:
            request.call.fail(status, details)
        else:
            request.instead(request.call, request.body, Unanswered(status, details, request.tried, request.ran))

    # Streams.

    async def stream(
        self,
        call: StreamCall,
        model: str,
        holders: Sequence[Peer],
        *,
        first: Sequence[bytes] = (),
        mode: Mode = Mode.HIT,
        resolved: bool = False,
        tried: tuple[str, ...] = (),
    ) -> list[bytes] | None:
        """Pass a whole stream on, message by message, as fast as the slower side takes them.

        Args:
            first: messages that were taken from ``call`` already.
            tried: ids of the instances that the holders are not to ask.

        Returns:
            None when it was answered to its end; the messages taken from ``call`` when no holder would have it.

        Raises:
            RpcError: what a holder ended it with.
        """
        arrival = arrival_of(call)
        if arrival is not None and not arrival.goes_on:
            not_here(call, self.instance)
            return None
        if arrival is not None:
            tried = (*arrival.tried, *tried)
        taken: list[bytes] | None = list(first)
        while taken is not None:
            peer: Peer | None = self.one([one for one in holders if one.instance not in tried])
            if peer is None:
                return taken
            try:
                connection = peer.connection()
                if connection is None:
                    await peer.connect()
                    connection = peer.connection()
                if connection is None:
                    raise ConnectionError(f"instance {peer.instance} closed the connection at once")
                out = call.pass_on(connection, self._hop_headers(mode, arrival, tried, model if resolved else ""))
            except (RpcError, ConnectionError):
                tried = (*tried, peer.instance)
                continue
            except ValueError as error:
                raise RpcError(Status.RESOURCE_EXHAUSTED, f"the request cannot be passed on: {error}") from error
            passing = _Passing(call, out, taken)
            try:
                await passing.run()
                return None
            except RpcError:
                answer = out.call
                if mode is Mode.LOAD and answer.lost and not answer.refused and self.on_lost is not None:
                    self.on_lost(model, peer.instance)
                nothing_done = self._has_done_nothing(model, peer, answer)
                nothing_done |= mode is Mode.LOAD and answer.status in _NOT_LOADED
                taken = passing.taken
                if taken is None or not nothing_done:
                    call.end_like(out)
                    raise
                tried = (*tried, peer.instance)
        return None

    def _start(self, work: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Passing:
    """One stream between its client and the holder that answers it.

    Attributes:
        taken: what the client has sent, while all of it is kept and nothing was answered; None after that.
    """

    def __init__(self, call: StreamCall, out: ClientStream, taken: list[bytes]) -> None:
        self._call = call
        self._out = out
        self.taken: list[bytes] | None = taken
        self._kept_bytes = sum(map(len, taken))

    async def run(self) -> None:
        """Pass messages both ways until the holder ends the stream.

        Raises:
            RpcError: its status is not OK.
        """
        call, out = self._call, self._out
        loop = asyncio.get_running_loop()
        sending = loop.create_task(self._send(list(self.taken or ())), name=f"pass on {call.method}")
        begun = False
        try:
            async for message in out:
                if not begun:
                    begun = True
                    self.taken = None
                    call.begin_like(out)
                await call.send(message)
            call.end_like(out)
        finally:
            sending.cancel()
            out.cancel()
            await asyncio.wait([sending])

    async def _send(self, first: list[bytes]) -> None:
        call, out = self._call, self._out
        try:
            for message in first:
                await out.send(message)
            async for message in call:
                self._keep(message)
                await out.send(message)
            await out.end()
        except RpcError as error:  # what the client sends cannot be taken
            call.fail(error.status, error.details)
            out.cancel()

    def _keep(self, message: bytes) -> None:
        if self.taken is None:
            return
        self._kept_bytes += len(message)
        if self._kept_bytes > REPLAY_BYTES:
            self.taken = None
        else:
            self.taken.append(message)


async def _leave(peer: Peer) -> None:
    """Close a peer once it has answered what it has, or has had its time."""
    ends_at = time.monotonic() + LEAVE_S
    try:
        while peer.in_flight and time.monotonic() < ends_at:  # noqa: ASYNC110  # counted where nobody is woken
            await asyncio.sleep(0.1)
    finally:
        await peer.close()
