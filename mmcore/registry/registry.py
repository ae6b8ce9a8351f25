"""The shared state of all instances: three tables, transactions on them, this instance's record, and the leader.

One task follows the store and is the only one that changes the tables: a snapshot first, then the changes after it, in
the store's order. What this instance writes comes back the same way, and a write returns when it has.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

from mmcore.errors import Unavailable
from mmcore.log import event
from mmcore.registry.presence import CANDIDATES, Presence
from mmcore.registry.records import InstanceRecord, ModelRecord, VModelRecord, decode, encode
from mmcore.registry.store import Changes, Compacted, Entry, Fence, Outcome, Store, Write
from mmcore.registry.table import Table

log = logging.getLogger(__name__)

LEASE_S: Final = 10.0
#: How long a write waits for a store that is being (re)connected to, or for its own return.
WAIT_S: Final = 2.0
#: How long a write is tried again because others change the same records.
CONFLICT_S: Final = 10.0
#: Pause before a store that went away is asked again.
RETRY_S: Final = 0.25

#: The key that tells one store from another that took its place. Whoever comes first writes a name there; if it has put
#: records back, then also the name of the store that they are from and the version up to which it knew that one.
_IDENTITY: Final = "store"
#: Keys handled between two looks at the loop's other work, and put back in one transaction.
_CHUNK: Final = 2000
_RESTORE_CHUNK: Final = 100

Key = tuple[Table[Any], str]


class Registry:
    """What one instance sees of the registry and does to it; :func:`mmcore.registry.open_registry` makes one.

    Attributes:
        instance: this instance's id.
        models, vmodels, instances: the tables.
    """

    def __init__(self, store: Store, instance: str, *, lease_s: float = LEASE_S) -> None:
        self.instance: Final = instance
        self.models: Final = Table("models", ModelRecord, commit=self.commit, read=store.read)
        self.vmodels: Final = Table("vmodels", VModelRecord, commit=self.commit, read=store.read)
        self.instances: Final = Table("instances", InstanceRecord, commit=self.commit, read=store.read)
        self._tables: dict[str, Table[Any]] = {one.name: one for one in (self.models, self.vmodels, self.instances)}
        self._store = store
        self._lease_s = lease_s
        self._presence = Presence(store, instance, lease_s)
        self._presence.on_leader = self._tell_leader
        self._leader_listeners: list[Callable[[bool], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._identity: bytes | None = None
        self._version = 0
        self._following = asyncio.Event()
        self._closed = False
        self._conflicts = asyncio.Lock()
        self._waiting: dict[asyncio.Future[None], int] = {}
        #: Keys of instances that a store which came back empty does not know yet.
        self._missed: set[str] = set()
        self._returned_s = 0.0
        self._away_since: float | None = None

    @property
    def lag_s(self) -> float:
        """How old what is known here may be, in seconds.

        While the store is away that is the time since it went; otherwise what the last write of this instance, once
        the store had taken it, needed to come back with the changes that are followed.
        """
        if self._away_since is not None:
            return time.monotonic() - self._away_since
        return self._returned_s

    @property
    def leader(self) -> bool:
        """Whether this instance is the leader. Writes that depend on it are ``fenced``, which is what makes it sure."""
        return self._presence.leader

    @property
    def connected(self) -> bool:
        """Whether the tables are in step with the store; otherwise they are as they were last."""
        return self._following.is_set()

    async def start(self) -> None:
        """Fill the tables, and keep them in step from then on.

        Raises:
            Unavailable: the store cannot be reached.
        """
        try:
            await self._store.connect()
            while not await self._try_resync():
                pass
            self._tasks = [
                asyncio.create_task(self._follow(), name="registry changes"),
                asyncio.create_task(self._presence.run(), name="registry lease"),
            ]
            await self._wait_until_followed()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Withdraw this instance's record and candidacy, and let go of the store; once is enough."""
        if self._closed:
            return
        self._closed = True
        await self._presence.end()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._store.close()

    def listen_leader(self, callback: Callable[[bool], None]) -> None:
        """Have ``callback`` called on the loop with whether this instance is the leader, each time that changes."""
        self._leader_listeners.append(callback)

    async def publish(self, record: InstanceRecord) -> None:
        """Write this instance's record, which lives as long as its lease is renewed.

        Raises:
            Unavailable: the store is away; the record will be written when it is back.
        """
        await self._presence.publish(self.instances.key(self.instance), encode(record))

    async def commit(
        self,
        keys: Sequence[Key],
        change: Callable[[list[Any]], Sequence[Any]],
        *,
        fenced: bool = False,
    ) -> list[Any]:
        """Replace several records, each a table and an id, in one transaction; the records as they are then.

        ``change`` gets them in that order, None for those that are absent, and returns what is to take their places:
        the same record to leave one alone, None to delete it. It is called again when another writer was faster, so it
        does nothing else. What it raises is raised from here, once it is sure that it saw the latest records. The
        tables show the change when this returns.

        ``fenced`` makes it a leader's write: carried out only if this instance still is the leader.

        Raises:
            Unavailable: the store is away, or others change the records all the time. When it went away in the middle,
                the change may have been made.
            NotLeader: fenced, and this instance is not the leader.
            CorruptRecord: a record cannot be read; it is left alone.
        """
        await self._wait_until_followed()
        fence = self._presence.fence() if fenced else None
        seen = {table.key(name): table.entry(name) for table, name in keys}
        outcome, after = await self._attempt(keys, change, seen, fence, latest=False)
        if outcome.done:
            return after
        # Who meets a conflict waits for the others of this instance that do: of each instance one goes on.
        async with self._conflicts:
            loop = asyncio.get_running_loop()
            give_up_at = loop.time() + CONFLICT_S
            pause_s = 0.001
            while loop.time() < give_up_at:
                outcome, after = await self._attempt(keys, change, outcome.current, fence, latest=True)
                if outcome.done:
                    return after
                await asyncio.sleep(random.uniform(0, pause_s))  # noqa: S311  # no secret
                pause_s = min(pause_s * 2, 0.1)
        names = ", ".join(name for _, name in keys)
        raise Unavailable(f"the records of {names} are being changed by others all the time")

    async def _attempt(
        self,
        keys: Sequence[Key],
        change: Callable[[list[Any]], Sequence[Any]],
        seen: Mapping[str, Entry | None],
        fence: Fence | None,
        *,
        latest: bool,
    ) -> tuple[Outcome, list[Any]]:
        """One attempt of a commit at the entries ``seen``: the ``latest``, if they come from the store itself."""
        after: list[Any] = []
        failure: Exception | None = None
        writes: list[Write] = []
        try:
            before = [
                None if (entry := seen[table.key(name)]) is None else decode(table.kind, name, entry.value)
                for table, name in keys
            ]
            # Taken now: a record's mappings can be changed in place.
            stored = [None if record is None else encode(record) for record in before]
            after = list(change(before))
            for (table, name), old, record in zip(keys, stored, after, strict=True):
                new = None if record is None else encode(record)
                if new != old:
                    writes.append(Write(table.key(name), new))
        except Exception as error:
            if latest:
                raise
            failure, writes = error, []
        if latest and not writes and fence is None:
            return Outcome(True, 0, {}), after
        # Without writes it tells whether what was seen is the latest.
        outcome = await self._store.transact(seen, writes, fence)
        if outcome.done and failure is not None:
            raise failure
        if outcome.done and writes:
            await self._returned(outcome)
        return outcome, after

    # Following the store.

    async def _follow(self) -> None:
        """The task that changes the tables."""
        stale = away = False
        while True:
            try:
                stale = stale and not await self._try_resync()
                if stale:
                    continue
                async with aclosing(self._store.changes(self._version)) as stream:
                    async for changes in stream:
                        if not self._following.is_set():
                            if not await self._is_known():
                                raise Compacted
                            self._following.set()
                            if away:
                                log.info("the registry is back, at version %d", changes.version)
                                away = False
                            self._away_since = None
                        self._apply(changes)
                        self._reached(changes.version)
            except Compacted:
                stale = True
                self._following.clear()
            except Unavailable as error:
                if not away:
                    log.warning("the registry is away: %s; going on with what is known", error)
                away = True
                if self._away_since is None:
                    self._away_since = time.monotonic()
                self._following.clear()
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("following the registry; taking a new snapshot of it")
                stale = True
                self._following.clear()
                await asyncio.sleep(RETRY_S)

    async def _is_known(self) -> bool:
        """Whether the store that is being followed is the one that the tables come from."""
        entry = await self._store.read(_IDENTITY)
        return entry is not None and entry.value == self._identity

    async def _resync(self) -> None:
        """Bring the tables in step with a snapshot, with no more changes to them than there are.

        When the store is another one (its data were lost, or an older state was put back) the models and vmodels that
        it lacks are written to it. The other instances do the same; what is absent is created, never overwritten. Who
        comes when that has been done by one that knew as much, leaves it: what is absent now has been deleted since.
        """
        missing = set(self._keys())
        identity: bytes | None = None
        version = 0
        async with aclosing(self._store.snapshot()) as pages:
            async for page in pages:
                version = page.version
                identity = self._apply(page) or identity
                if missing:
                    missing.difference_update(key for key, _ in page.entries)
                await asyncio.sleep(0)
        is_other = self._identity is not None and (identity != self._identity or version < self._version)
        if is_other and not self._is_put_back(identity):
            log.warning("the registry lost its records; putting back what this instance knows")
            missing = await self._restore(missing)
        for chunk in _chunks(list(missing), _CHUNK):
            self._apply(Changes(version, gone=chunk))
            await asyncio.sleep(0)
        self._identity = identity or await self._mark()
        self._reached(version)

    async def _try_resync(self) -> bool:
        """Whether a snapshot could be taken; not if its version was given up in the middle."""
        try:
            await self._resync()
        except Compacted:
            return False
        return True

    async def _mark(self) -> bytes:
        """Give a new store its identity; what it is then."""
        name = secrets.token_hex(8).encode()
        if self._identity is not None:
            name += b" %s %d" % (self._identity.split()[0], self._version)
        outcome = await self._store.transact({_IDENTITY: None}, [Write(_IDENTITY, name)])
        theirs = outcome.current.get(_IDENTITY)
        return name if theirs is None else theirs.value

    def _is_put_back(self, identity: bytes | None) -> bool:
        """Whether somebody who knew at least as much has put back what the store lost."""
        match (identity or b"").split():
            case [_, name, version]:
                return (
                    self._identity is not None and name == self._identity.split()[0] and self._version <= int(version)
                )
        return False

    async def _restore(self, missing: set[str]) -> set[str]:
        """Write back what the store lost; the keys that are gone all the same, since they live under a lease.

        Other instances are given the time of a lease to publish themselves again before they count as gone.
        """
        lost: list[tuple[str, bytes]] = []
        gone: set[str] = set()
        for key in missing:
            kind, _, name = key.partition("/")
            if kind == self.instances.name and name != self.instance:
                self._missed.add(key)
            elif kind in (self.models.name, self.vmodels.name):
                entry = self._tables[kind].entry(name)
                if entry is not None:
                    lost.append((key, entry.value))
            else:
                gone.add(key)
        asyncio.get_running_loop().call_later(self._lease_s, self._drop_missed)
        for chunk in _chunks(lost, _RESTORE_CHUNK):
            await self._store.create_missing(chunk)
        return gone

    def _drop_missed(self) -> None:
        missed, self._missed = self._missed, set()
        for key in missed:
            self.instances.drop(key)

    def _keys(self) -> Iterator[str]:
        for table in self._tables.values():
            yield from table.keys()
        yield from self._presence.keys()

    def _apply(self, changes: Changes) -> bytes | None:
        """Have the tables show the changes; the store's identity, if it is among them."""
        identity: bytes | None = None
        for key, entry in changes.entries:
            kind = key.partition("/")[0]
            if (table := self._tables.get(kind)) is not None:
                table.put(key, entry)
                self._missed.discard(key)
            elif kind == CANDIDATES:
                self._presence.candidate(key, entry.created)
            elif key == _IDENTITY:
                identity = entry.value
        for key in changes.gone:
            if (table := self._tables.get(key.partition("/")[0])) is not None:
                table.drop(key)
            self._presence.gone(key)
        return identity

    def _reached(self, version: int) -> None:
        self._version = version
        for waiter, awaited in self._waiting.items():
            if awaited <= version and not waiter.done():
                waiter.set_result(None)

    async def _wait_until_followed(self) -> None:
        if self._following.is_set():
            return
        try:
            async with asyncio.timeout(WAIT_S):
                await self._following.wait()
        except TimeoutError:
            raise Unavailable("the registry cannot be reached now; nothing was changed") from None

    async def _returned(self, outcome: Outcome) -> None:
        """Wait until a change made here is in the tables; it is made whether or not it gets there in time."""
        if outcome.version <= self._version:
            self._returned_s = 0.0
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = outcome.version
        began = time.monotonic()
        await asyncio.wait([waiter], timeout=WAIT_S)
        del self._waiting[waiter]
        self._returned_s = time.monotonic() - began

    def _tell_leader(self, leader: bool) -> None:
        log.info(
            "instance %s is %s the leader", self.instance, "now" if leader else "no longer",
            extra=event("leads" if leader else "leads_no_longer", instance=self.instance),
        )  # fmt: skip
        for listener in self._leader_listeners:
            try:
                listener(leader)
            except Exception:
                log.exception("a listener to the leader failed")


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
