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
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from mmcore._ext.forward import Forwarded
from mmcore._ext.h2 import Method
from mmcore._ext.h2client import ClientCall
from mmcore.config import TransportSettings
from mmcore.errors import RpcError, Status
from mmcore.routing.hops import Arrival, Mode, arrival_of, hop_headers, not_here, says_not_here
from mmcore.routing.peers import PEER_SETTINGS, Peer, least_busy
from mmcore.transport import ClientStream, StreamCall

#: Messages of a stream that are kept until the first answer, in case another holder has to be asked, in bytes.
REPLAY_BYTES: Final = 2**20
#: How long a peer that has left may take for what is in flight.
LEAVE_S: Final = 30.0


class Unanswered(NamedTuple):
    """Why no holder answered a request: the last one's status and text, and the instances that were asked."""

    status: Status
    details: str
    tried: tuple[str, ...]


#: Given the call, its message and what was tried, answers a request that no holder has answered.
Instead = Callable[[Any, bytes, Unanswered], object]


def refuse_unanswered(call: Any, body: bytes, unanswered: Unanswered) -> None:
    """Answer with the last holder's status: where nothing else can be done."""
    call.fail(unanswered.status, unanswered.details)


class _Route:
    """Where one request may go and what became of it so far."""

    __slots__ = ("arrival", "holders", "idempotent", "instead", "last", "mode", "model", "ran", "resolved", "tried")

    def __init__(
        self,
        model: str,
        holders: Sequence[Peer],
        mode: Mode,
        resolved: bool,
        idempotent: bool,
        instead: Instead,
        arrival: Arrival | None,
    ) -> None:
        self.model = model
        self.holders = holders
        self.mode = mode
        self.resolved = resolved
        self.idempotent = idempotent
        self.instead = instead
        self.arrival = arrival
        self.tried: tuple[str, ...] = arrival.tried if arrival is not None else ()
        #: Holders that may have run it, or were full.
        self.ran = 0
        self.last = (Status.UNAVAILABLE, f"no instance that holds model {model!r} can be reached")

    def candidates(self) -> list[Peer]:
        """The holders that may still be asked."""
        tried = self.tried
        return [peer for peer in self.holders if peer.usable and peer.instance not in tried]


class Forwarding:
    """Passes requests on to other instances.

    Args:
        instance: this one's id; it is never among the holders that are asked.
        choose: one of the holders that may be asked.
        on_not_here: told (model, instance) when a holder has no copy any more, so that the table is corrected.
        on_down: told the instance that cannot be reached, once each time.
        settings, connections: of the channel to each peer.
    """

    def __init__(
        self,
        instance: str,
        *,
        choose: Callable[[Sequence[Peer]], Peer] = least_busy,
        on_not_here: Callable[[str, str], object] | None = None,
        on_down: Callable[[str], object] | None = None,
        settings: TransportSettings = PEER_SETTINGS,
        connections: int = 1,
    ) -> None:
        self.instance = instance
        self._choose = choose
        self._on_not_here = on_not_here
        self._on_down = on_down
        self._settings = settings
        self._connections = connections
        self._peers: dict[str, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._methods: dict[str, Method] = {}
        self._hit = hop_headers(Mode.HIT, 1, (instance,))

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
                instance, address, settings=self._settings, connections=self._connections, on_down=self._on_down
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

    # Unary calls.

    def unary(
        self,
        call: Any,
        body: bytes,
        model: str,
        holders: Sequence[Peer],
        *,
        mode: Mode = Mode.HIT,
        resolved: bool = False,
        idempotent: bool = True,
        instead: Instead = refuse_unanswered,
        path: str | None = None,
    ) -> None:
        """Have a request answered by one of the holders; the answer, or ``instead``, comes later through ``call``.

        Args:
            call: a call of the transport, or one request of a stream.
            model: the concrete model's name; it travels along where ``resolved`` says that ``body`` does not hold it.
            idempotent: whether running it twice does no harm.
            path: the method to call, where it is not the call's own.
        """
        arrival = arrival_of(call)
        if arrival is not None and not arrival.goes_on:
            not_here(call, self.instance)
            return
        route = _Route(model, holders, mode, resolved, idempotent, instead, arrival)
        self._next(Forwarded(call, body, route, self._failed, self._method(path) if path is not None else None))

    def _method(self, path: str) -> Method:
        method = self._methods.get(path)
        if method is None:
            method = self._methods[path] = Method(path)
        return method

    def _next(self, request: Forwarded) -> None:
        """Send a request to the next holder, if there is one."""
        route: _Route = request.state
        while candidates := route.candidates():
            peer = candidates[0] if len(candidates) == 1 else self._choose(candidates)
            connection = peer.connection()
            if connection is None:
                request.call.on_cancel = request.cancel
                self._start(self._connect(request, peer), f"connect to instance {peer.instance}")
                return
            try:
                request.send(peer, connection, self._headers(route))
            except ConnectionError as error:
                self._passed_over(route, peer, Status.UNAVAILABLE, str(error))
                continue
            except ValueError as error:
                request.call.fail(Status.RESOURCE_EXHAUSTED, f"the request cannot be passed on: {error}")
            return
        self._exhausted(request)

    async def _connect(self, request: Forwarded, peer: Peer) -> None:
        route: _Route = request.state
        try:
            await peer.connect()
        except RpcError as error:
            self._passed_over(route, peer, error.status, error.details)
        if not request.over:
            self._next(request)

    def _headers(self, route: _Route) -> list[tuple[bytes, bytes]]:
        if route.mode is Mode.HIT and not route.tried and not route.resolved:
            return self._hit
        hops = 1 if route.arrival is None else route.arrival.hops + 1
        return hop_headers(route.mode, hops, (*route.tried, self.instance), route.model if route.resolved else "")

    def _passed_over(self, route: _Route, peer: Peer, status: Status, details: str) -> None:
        route.tried = (*route.tried, peer.instance)
        route.last = (status, details)

    def _failed(self, request: Forwarded, answer: ClientCall) -> None:
        """A holder's answer is not OK: ask another one, or pass it on."""
        route: _Route = request.state
        peer = request.peer
        assert isinstance(peer, Peer)
        if not self._next_may_run(route, peer, answer):
            request.refuse(answer)
            return
        self._passed_over(route, peer, Status(answer.status), answer.details)
        if route.ran and not answer.lost and not route.candidates():
            request.refuse(answer)  # the answer of the last one that had the model, and room or not
        else:
            self._next(request)

    def _next_may_run(self, route: _Route, peer: Peer, answer: ClientCall) -> bool:
        """Whether a request with this answer may be sent to another holder; notes what it says of this one."""
        if answer.lost:
            peer.mark_down(answer.details)
        if answer.refused:
            return True
        if says_not_here(answer):
            if self._on_not_here is not None:
                self._on_not_here(route.model, peer.instance)
            return True
        if answer.status not in (Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED):
            return False
        route.ran += 1
        return route.idempotent and route.ran < 2

    def _exhausted(self, request: Forwarded) -> None:
        route: _Route = request.state
        status, details = route.last
        route.instead(request.call, request.body, Unanswered(status, details, route.tried))

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
    ) -> list[bytes] | None:
        """Pass a whole stream on, message by message, as fast as the slower side takes them.

        Args:
            first: messages that were taken from ``call`` already.

        Returns:
            None when it was answered to its end; the messages taken from ``call`` when no holder would have it.

        Raises:
            RpcError: what a holder ended it with.
        """
        arrival = arrival_of(call)
        route = _Route(model, holders, mode, resolved, False, refuse_unanswered, arrival)
        if arrival is not None and not arrival.goes_on:
            not_here(call, self.instance)
            return None
        taken: list[bytes] | None = list(first)
        while taken is not None and (candidates := route.candidates()):
            peer = candidates[0] if len(candidates) == 1 else self._choose(candidates)
            try:
                if peer.connection() is None:
                    await peer.connect()
                connection = peer.connection()
                if connection is None:
                    raise RpcError(Status.UNAVAILABLE, f"instance {peer.instance} closed the connection at once")
                out = call.pass_on(connection, self._headers(route))
            except (RpcError, ConnectionError) as error:
                self._passed_over(route, peer, Status.UNAVAILABLE, str(error))
                continue
            except ValueError as error:
                raise RpcError(Status.RESOURCE_EXHAUSTED, f"the request cannot be passed on: {error}") from error
            passing = _Passing(call, out, taken)
            try:
                await passing.run()
                return None
            except RpcError as error:
                taken = passing.taken
                if taken is None or not self._next_may_run(route, peer, out.call):
                    call.end_like(out)
                    raise
                self._passed_over(route, peer, error.status, error.details)
        return taken

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
