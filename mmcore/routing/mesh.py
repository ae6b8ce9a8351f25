"""Which instance answers a request for a registered model that is not here, and which one loads it.

Holders answer first. Where there is none, placement says who loads the model: this instance, or another one, which
gets the request along and answers it when the model is there. Every instance decides for the requests that reach it;
what is decided is reserved in the view, and the record that the loading instance writes tells the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple

from mmcore import placement
from mmcore.errors import LoadFailed, MmcoreError, NotFound, Overloaded, RpcError, Status, Unavailable
from mmcore.registry import ModelRecord, Registry
from mmcore.routing.actions import Haste
from mmcore.routing.evictions import Evictions
from mmcore.routing.filling import SETTLE_S, Filling
from mmcore.routing.forwarding import Forwarding, Unanswered
from mmcore.routing.handover import hand_over
from mmcore.routing.hops import Mode, arrival_of, not_here
from mmcore.routing.losses import Barred, Losses
from mmcore.routing.members import Members, model_of
from mmcore.routing.peers import Peer
from mmcore.routing.registered import Loads, Registered, wall_ms
from mmcore.routing.router import Router
from mmcore.routing.upkeep import INTERVAL_S, Upkeep
from mmcore.transport import StreamCall

log = logging.getLogger(__name__)

#: What instances call on each other beside loads (:class:`Haste`); the message is the model's name in UTF-8.
UNLOAD_PATH: Final = "/mmcore.Peer/Unload"
#: How long another instance may take to load a model that is asked of it.
LOAD_WAIT_S: Final = 600.0
#: How long a load on its way elsewhere is waited for before its record is looked at again.
LOOK_AGAIN_S: Final = 1.0
#: With so many requests at a copy another one is looked for, where the client does not spread its requests itself.
SHARED_FROM: Final = 4
#: A request is answered elsewhere, though its copy is here, where so many fewer are under way.
HOP_COUNTS: Final = 2
#: Latencies below count as this: they say nothing of the load.
LEAST_LATENCY_S: Final = 0.0005


class _Lost(Unavailable):
    """The instance that was told to do something ended, or its connection did, before it said that it had."""


class _Asked(NamedTuple):
    """A request that is to be answered somewhere, and what is called when that is here; None: here it cannot be."""

    call: Any
    body: bytes
    model: str
    here: Callable[[], object] | None
    path: str
    resolved: bool


class Mesh(Loads):
    """The other instances, for the requests and loads of this one.

    Attributes:
        members: who there is; their :class:`mmcore.placement.Cluster` is what is decided on.
        upkeep: what is done every few seconds.
        filling: what is loaded ahead into instances that have room.
        losses: models that end the instances which load or answer them.
        forwarding: passes requests on.
    """

    def __init__(
        self,
        registry: Registry,
        router: Router,
        registered: Registered,
        forwarding: Forwarding,
        members: Members,
        *,
        upkeep_s: float = INTERVAL_S,
        settle_s: float = SETTLE_S,
        clock_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self.members: Final = members
        self.losses: Final = Losses(registry, self._is_lost, clock_ms)
        self.upkeep: Final = Upkeep(
            registry, router, self, members.cluster, self.losses, interval_s=upkeep_s, clock_ms=clock_ms
        )
        self.filling: Final = Filling(registry, members, self, settle_s=settle_s, clock_ms=clock_ms)
        self._evictions = Evictions(registry, registered, members, self, clock_ms=clock_ms)
        registered.barred = self.losses.barred
        self._registry = registry
        self._router = router
        self._registered = registered
        self.forwarding: Final = forwarding
        self._forwarding = forwarding
        self._clock_ms = clock_ms
        registry.models.listen(self._model_changed)
        router.cache.on_evicted.append(self._evictions.evicted)
        forwarding.choose = self._choose
        forwarding.on_not_here = self._not_there
        forwarding.on_lost = self.losses.note
        forwarding.on_lost_alone = self.losses.note_request

    async def start(self) -> None:
        """Join the others.

        Raises:
            Unavailable: the registry is away.
        """
        await self.members.start()
        self.upkeep.start()
        self.filling.start()

    async def leave(self, timeout_s: float) -> None:
        """Take no new copies, and hand over what is used here within so many seconds; nothing if it has not joined."""
        if not self.members.joined:
            return
        await self.members.announce()
        gone = [peer.instance for peer in self._forwarding.peers.values() if not peer.usable]
        await hand_over(self, self.members, self.upkeep.held(), self._registry.instance, timeout_s, gone)

    async def close(self) -> None:
        """Let go of the others."""
        await self._evictions.close()
        await self.filling.close()
        await self.upkeep.close()
        await self.losses.close()
        await self.members.close()
        await self._forwarding.close()

    # Requests.

    def pass_on(
        self, call: Any, body: bytes, model: str, here: Callable[[], object], *, path: str, resolved: bool = False
    ) -> bool:
        """Have another instance answer a request for a model that is not loaded here; False: this one is to answer.

        ``here`` is called when that turns out only after others were asked. ``path`` is the method that they are asked
        by, and ``resolved`` says that ``body`` does not name the model.

        Raises:
            Overloaded: no instance can host it.
            LoadFailed: it failed to load wherever it could be hosted.
        """
        asked = _Asked(call, body, model, here, path, resolved)
        arrival = arrival_of(call)
        if arrival is None and (known := self._router.table.holders(model)):
            self._ask(asked, known, Mode.HIT)
            return True
        record = self._registry.models.get(model)
        if record is None:
            return False
        if arrival is not None and arrival.mode is Mode.HIT:
            if self._registry.instance in record.copies or self._router.loading(model):
                return False
            not_here(call, self._registry.instance)
            return True
        holders = self._holders(model, record)
        if holders is None:
            return False
        tried = arrival.tried if arrival is not None else ()
        holders = tuple(peer for peer in holders if peer.instance not in tried)
        if holders:
            self._ask(asked, holders, Mode.HIT)
            return True
        # One that was sent here without a copy anywhere is to be answered here: the sender has decided so.
        return arrival is None and self._place(asked, ())

    async def pass_stream_on(self, call: StreamCall, model: str, first: bytes, *, away: bool) -> list[bytes] | None:
        """Have another instance answer a stream for a model that is not loaded here, or cannot be asked (``away``).

        ``first`` is the message that was taken from it. None: it has been answered to its end; else the messages that
        were taken from it, and this instance is to answer.

        Raises:
            Overloaded, LoadFailed: there is no place for the model.
            RpcError: what the instance that was asked ended it with.
        """
        own, arrival = self._registry.instance, arrival_of(call)
        taken: list[bytes] | None = [first]
        if arrival is not None and (away or (arrival.mode is Mode.HIT and not self._has(model))):
            not_here(call, own)
            return None
        tried = arrival.tried if arrival is not None else ()
        if away:
            tried = (*tried, own)
        while taken is not None:
            record = self._registry.models.get(model)
            if record is None or (own not in tried and self._has(model)):
                return taken
            record = self._registered.told(model, record)
            others = replace(record, copies={one: copy for one, copy in record.copies.items() if one not in tried})
            peers, mode = (
                self._heard(placement.serving(self.members.cluster, model_of(model, others, self._clock_ms()))),
                Mode.HIT,
            )
            if not peers:
                if arrival is not None:
                    # Who has sent it here to be loaded has decided so.
                    return taken
                try:
                    target = self._target(model, record, tried)
                except (LoadFailed, Overloaded):
                    if away or (own not in tried and self._is_left_alone(record)):
                        return taken
                    raise
                if target == own:
                    return taken
                peers, mode = self._heard((target,)), Mode.LOAD
                if not peers:
                    tried = (*tried, target)
                    continue
            taken = await self._forwarding.stream(call, model, peers, first=taken, mode=mode, tried=tried)
            tried = (*tried, *(peer.instance for peer in peers))
        return None

    def share(
        self, call: Any, body: bytes, model: str, here: Callable[[], object], *, path: str, resolved: bool = False
    ) -> bool:
        """Have another holder answer a request whose copy is here, where there is less to do; False: it stays.

        Arguments as of :meth:`pass_on`; what came from another instance stays.
        """
        working = self.forwarding.working
        holders = tuple(peer for peer in self._router.table.holders(model) if peer.usable)
        if working is None or not holders or arrival_of(call) is not None:
            return False
        peer = holders[0] if len(holders) == 1 else self._choose(holders)
        if working.count - HOP_COUNTS <= self._work(peer):
            return False
        self._ask(_Asked(call, body, model, here, path, resolved), (peer,), Mode.HIT)
        return True

    def _choose(self, peers: Sequence[Peer]) -> Peer:
        """The cheaper of two holders drawn at random: latency seen, times the requests there.

        Those are told with each answer; where nothing was heard for seconds, the instance's record tells.

        Nearly as even as always the cheapest, and many senders with the same old counts do not all choose the same.
        """
        one, other = random.sample(peers, 2)
        return one if self._cost(one) <= self._cost(other) else other

    def _cost(self, peer: Peer) -> float:
        return max(peer.latency_s, LEAST_LATENCY_S) * (1 + self._work(peer))

    def _work(self, peer: Peer) -> int:
        """The requests that a peer works at, by its last answer or else by its record."""
        if peer.others >= 0:
            return peer.in_flight + peer.others
        member = self.members.cluster.get(peer.instance)
        return max(peer.in_flight, member.instance.in_flight if member is not None else 0)

    def _not_there(self, model: str, instance: str) -> None:
        """A holder has no copy any more: ask it no further until the model's record says otherwise."""
        table = self._router.table
        table.hold(model, tuple(peer for peer in table.holders(model) if peer.instance != instance))

    def ask_another(
        self, call: Any, body: bytes, model: str, instead: Callable[[], object], *, path: str, resolved: bool = False
    ) -> bool:
        """Have another holder answer a request that was refused here for want of room or readiness; False: no other.

        ``instead`` is called when that one cannot be asked. A request that came from another instance stays: who
        passed it on hears of the failure, and decides.
        """
        holders = tuple(peer for peer in self._router.table.holders(model) if peer.usable and not peer.silent)
        if not holders or arrival_of(call) is not None:
            return False
        # It may have run here.
        self._forwarding.unary(
            call, body, model, holders, mode=Mode.HIT, resolved=resolved, path=path, instead=lambda *_: instead(), ran=1
        )
        return True

    def load_elsewhere(
        self, call: Any, body: bytes, model: str, failure: MmcoreError, *, path: str, resolved: bool = False
    ) -> bool:
        """Have another instance load a model whose load has ended here with ``failure``; False: that is the answer.

        Only where the request came in: who passed it on hears of the failure and decides.
        """
        if (arrival := arrival_of(call)) is not None:
            if arrival.mode is Mode.HIT:
                # It waited for a load that it has not asked for.
                not_here(call, self._registry.instance, failure)
            return arrival.mode is Mode.HIT
        asked = _Asked(call, body, model, None, path, resolved)
        try:
            return self._place(asked, (self._registry.instance,))
        except (LoadFailed, Overloaded):
            return False

    def answer_elsewhere(self, call: Any, body: bytes, model: str, *, path: str, resolved: bool = False) -> bool:
        """Have another instance answer, since what answers here is away; False: there is none that can.

        One that came from another instance goes back there, to be sent elsewhere.
        """
        if arrival_of(call) is not None:
            not_here(call, self._registry.instance)
            return True
        record = self._registry.models.get(model)
        if record is None:
            return False
        self.members.refresh()
        serving = placement.serving(self.members.cluster, model_of(model, record, self._clock_ms()))
        asked = _Asked(call, body, model, None, path, resolved)
        if others := self._forwarding.holders(tuple(one for one in serving if one != self._registry.instance)):
            self._ask(asked, others, Mode.HIT)
            return True
        try:
            return self._place(asked, (self._registry.instance,))
        except (LoadFailed, Overloaded):
            return False

    def _ask(
        self, asked: _Asked, peers: tuple[Peer, ...], mode: Mode, tried: tuple[str, ...] = (), ran: int = 0
    ) -> None:
        """Have one of these answer; when none does, one is looked for that can and has not been tried."""
        self._forwarding.unary(
            asked.call,
            asked.body,
            asked.model,
            peers,
            mode=mode,
            resolved=asked.resolved,
            path=asked.path,
            instead=partial(self._place_again, asked),
            ran=ran,
            tried=tried,
        )

    def _holders(self, model: str, record: ModelRecord) -> tuple[Peer, ...] | None:
        """The others that have it, noted in the table; None where this instance has, or is the one to wait with."""
        serving = placement.serving(self.members.cluster, model_of(model, record, self._clock_ms()))
        holders = self._forwarding.holders(serving)
        self._router.table.hold(model, holders)
        return None if self._registry.instance in serving else holders

    def _place(self, asked: _Asked, tried: tuple[str, ...], ran: int = 0) -> bool:
        """Have a model loaded where it fits best, and the request answered there; False: that is here.

        ``ran`` instances may have run it: one that ends whoever runs it is not to end them all.

        Raises:
            Overloaded, LoadFailed: there is no place for it.
        """
        silent: tuple[Peer, ...] = ()
        excluded = tried
        while True:
            record = self._registry.models.get(asked.model)
            if record is None:
                return False
            # One that is on its way here is as good a place as any, and the last one where the others are gone.
            if self._registry.instance not in tried and self._has(asked.model):
                return False
            # Nor is one that has gone from here in the way, though the record tells of it for some moments more.
            record = self._registered.told(asked.model, record)
            # Nor is it loaded once more where it has been loaded since it was asked for, or is on its way to another.
            others = replace(record, copies={one: copy for one, copy in record.copies.items() if one not in tried})
            serving = placement.serving(self.members.cluster, model_of(asked.model, others, self._clock_ms()))
            if holders := self._heard(serving):
                self._ask(asked, holders, Mode.HIT, tried, ran)
                return True
            try:
                target = self._target(asked.model, record, excluded)
            except Barred:
                raise
            except (LoadFailed, Overloaded):
                # Who is about to leave is better than nobody, and so is who has a moment's other work.
                if self._registry.instance not in tried and self._is_left_alone(record):
                    return False
                if ran or not silent:
                    raise
                self._ask(asked, silent, Mode.LOAD, tried)
                return True
            if target == self._registry.instance:
                return False
            if peers := self._heard((target,)):
                self._ask(asked, peers, Mode.LOAD, tried, ran)
                return True
            silent += tuple(peer for peer in self._forwarding.holders((target,)) if peer.usable)
            excluded = (*excluded, target)

    def _heard(self, instances: Iterable[str]) -> tuple[Peer, ...]:
        """Those of these instances that can be reached, as far as is known."""
        return tuple(peer for peer in self._forwarding.holders(instances) if peer.usable and not peer.silent)

    def _is_left_alone(self, record: ModelRecord) -> bool:
        """Whether this instance may host a model and is given none only since it drains."""
        own, constraints = self.members.cluster.get(self._registry.instance), self.members.cluster.constraints
        if own is None or not own.instance.draining or self._registry.instance in record.failures:
            return False
        return constraints.allows(constraints.key(record.type), own.instance.labels)

    def _has(self, model: str) -> bool:
        """Whether this instance has a copy, or is about to."""
        return bool(self._router.copies(model)) or self._router.loading(model)

    def _place_again(self, asked: _Asked, call: Any, body: bytes, unanswered: Unanswered) -> None:
        """Those that were asked have not answered: have another one do so."""
        tried = unanswered.tried
        if asked.here is None:
            tried = (*tried, self._registry.instance)
        try:
            if self._place(asked, tried, unanswered.ran):
                return
        except (LoadFailed, Overloaded) as error:
            status, details = unanswered.status, unanswered.details
            if isinstance(error, Barred) or (status is Status.UNAVAILABLE and isinstance(error, LoadFailed)):
                status, details = error.status, str(error)
            elif status is Status.UNAVAILABLE:
                # That one could not be reached is no reason to fail, but that there was no other.
                details = f"{details}; {error}"
            call.fail(status, details)
            return
        if asked.here is not None:
            asked.here()
        else:
            call.fail(unanswered.status, unanswered.details)

    def _is_lost(self, instance: str) -> bool:
        """Whether another instance has ended without leaving, as far as is known here."""
        if instance == self._registry.instance:
            return False
        record = self._registry.instances.get(instance)
        if record is None:
            return True
        peer = self._forwarding.peers.get(instance)
        return not record.draining and peer is not None and not peer.usable

    def _target(self, model: str, record: ModelRecord, exclude: Collection[str] = ()) -> str:
        """Where a further copy goes; its room is reserved.

        Raises:
            Overloaded: nowhere.
            LoadFailed: nowhere, since it failed to load, or ended the instances that did.
        """
        if (why := self.losses.barred(model, record)) is not None:
            raise Barred(why)
        self.members.refresh()
        cluster, now_ms = self.members.cluster, self._clock_ms()
        own = cluster.get(self._registry.instance)
        # What is loaded here is in this instance's figures, though the model's record may not be written yet.
        for loaded in [name for name in own.reservations if self._router.copies(name)] if own is not None else ():
            cluster.release(self._registry.instance, loaded)
        view = model_of(model, record, now_ms)
        try:
            target = placement.place(cluster, view, now_ms, exclude=exclude)
        except placement.NoPlace as error:
            if view.failures:
                newest = max(view.failures, key=lambda instance: view.failures[instance])
                raise LoadFailed(record.failures[newest].message) from None
            raise Overloaded(str(error)) from None
        cluster.reserve(target, model, view.size_bytes, now_ms)
        return target

    # Loads.

    async def ensure(self, model: str, copies: int = 1, *, anew: bool = False) -> None:
        """Have so many copies loaded, or as many as there can be; see :class:`mmcore.routing.registered.Loads`."""
        failure: MmcoreError | None = None
        failed: set[str] = set()
        while True:
            record = self._registry.models.get(model)
            if record is None:
                raise NotFound(f"model not found: {model}")
            # With what is not written yet: else a copy that was loaded here just now would be loaded again and again.
            record = self._registered.told(model, record)
            loaded = self._registered.loaded_copies(model, record)
            if loaded >= copies:
                return
            coming = [name for name in record.copies if self._registered.lives(name)]
            if len(coming) >= copies:
                await self._wait_for(model)
                continue
            try:
                known = replace(record, failures={}) if anew else record
                target = self._target(model, known, failed)
            except (LoadFailed, Overloaded) as error:
                if loaded:
                    return
                # What it does to those that load it says more than that one is gone.
                raise (error if isinstance(failure, _Lost) else failure or error) from None
            try:
                await self.load_at(target, model, Haste.ANEW if anew else Haste.NOW)
            except (LoadFailed, Overloaded, Unavailable) as error:
                failed.add(target)
                failure = error
                self.members.cluster.release(target, model)

    async def load_at(self, instance: str, model: str, haste: Haste = Haste.NOW) -> None:
        """See :class:`mmcore.routing.actions.Actions`."""
        record = self._registry.models.get(model)
        if record is not None and (why := self.losses.barred(model, record)) is not None:
            raise Barred(why)
        if instance == self._registry.instance:
            await self._registered.load_here(model, haste)
            return
        try:
            await self._tell(instance, haste.value, model, LOAD_WAIT_S)
        except _Lost:
            self.losses.note(model, instance)
            raise

    async def move(self, model: str, source: str, target: str) -> None:
        """See :class:`mmcore.routing.actions.Actions`."""
        await self.load_at(target, model, Haste.AHEAD)
        await self.drop_at(source, model)

    async def drop_at(self, instance: str, model: str) -> None:
        """See :class:`mmcore.routing.actions.Actions`."""
        if instance == self._registry.instance:
            self._router.unload_copies(model)
        else:
            await self._tell(instance, UNLOAD_PATH, model, 10.0)

    async def _tell(self, instance: str, path: str, model: str, timeout_s: float) -> None:
        peers = self._forwarding.holders((instance,))
        if not peers:
            raise Unavailable(f"instance {instance} is not known")
        try:
            # One that is gone already, whatever still takes connections for it, is not lost by this.
            await peers[0].connect()
            await peers[0].unary(path, model.encode(), timeout_s=timeout_s)
        except RpcError as error:
            kind = _Lost if error.lost else _ERRORS.get(error.status, Unavailable)
            raise kind(error.details) from None

    async def _wait_for(self, model: str) -> None:
        """Wait until a model's record changes, or a while."""
        changed = asyncio.Event()
        stop = self._registry.models.listen(lambda name: changed.set() if name == model else None)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await changed.wait()
        finally:
            stop()

    # What the registry tells.

    def _model_changed(self, name: str) -> None:
        models, table, cluster = self._registry.models, self._router.table, self.members.cluster
        if not (models.mentions(name, b'"copies"') or table.holders(name) or cluster.reserved(name)):
            return
        record = models.get(name)
        if record is None:
            table.hold(name, ())
            return
        if table.holders(name) or self._registry.instance in record.copies:
            self._holders(name, record)
        now_ms = self._clock_ms()
        cluster.shown(name, {instance: copy.since_ms for instance, copy in record.copies.items()})
        for instance, copy in record.copies.items():
            if copy.state != placement.CopyState.LOADED:
                cluster.started(instance, name, record.size_bytes, copy.since_ms, now_ms)


_ERRORS: Final[dict[Status, type[MmcoreError]]] = {
    Status.FAILED_PRECONDITION: LoadFailed,
    Status.RESOURCE_EXHAUSTED: Overloaded,
    Status.NOT_FOUND: NotFound,
}
