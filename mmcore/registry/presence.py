"""What this instance has in the store for as long as it lives: a lease, its own record and its candidacy as leader.

The leader is the candidate whose key was created first. Once first, a candidate stays it until its lease ends, so
"my key exists since that version" is all that a transaction has to check for being the leader's (:class:`Fence`).
The instance itself stops calling itself the leader when its lease may have expired by its own monotonic clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from mmcore.errors import Unavailable
from mmcore.registry.store import Fence, LeaseGone, NotLeader, Store, Write

log = logging.getLogger(__name__)

#: First part of the candidates' keys.
CANDIDATES: Final = "leader"

#: Renewals within the time of a lease.
_RENEWALS: Final = 3


class Presence:
    """One instance's lease and the keys under it, kept for as long as it runs.

    Attributes:
        instance: its id.
        on_leader: called with whether it is the leader, each time that changes.
    """

    def __init__(self, store: Store, instance: str, lease_s: float) -> None:
        self.instance: Final = instance
        self.on_leader: Callable[[bool], None] = lambda _: None
        self._store = store
        self._lease_s = lease_s
        self._lease = 0
        self._expires_at = 0.0
        self._record: dict[str, bytes] = {}
        self._written: dict[str, bytes] = {}
        self._candidates: dict[str, int] = {}
        self._first = False
        self._told = False
        self._lock = asyncio.Lock()
        self._due = asyncio.Event()

    @property
    def leader(self) -> bool:
        """Whether this instance is the leader, as far as it can know."""
        return self._first and asyncio.get_running_loop().time() < self._expires_at

    def fence(self) -> Fence:
        """What a transaction of the leader has to check.

        Raises:
            NotLeader: this instance is not.
        """
        if not self.leader:
            raise NotLeader(f"instance {self.instance} is not the leader")
        key = self._candidacy()
        return Fence(key, self._candidates[key])

    async def publish(self, key: str, value: bytes) -> None:
        """Write the instance's record under the lease, now and whenever a new lease has to be taken.

        Raises:
            Unavailable: the store is away; the record will be written when it is back.
        """
        self._record = {key: value}
        await self._beat(renew=False)

    async def run(self) -> None:
        """Keep the lease alive; never ends by itself."""
        while True:
            self._due.clear()
            try:
                await self._beat(renew=True)
            except Unavailable as error:
                log.debug("the lease was not renewed: %s", error)
            except Exception:
                log.exception("renewing the lease")
            self._judge()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease_s / _RENEWALS):
                    await self._due.wait()

    async def end(self) -> None:
        """Give the lease up, and with it the record and the candidacy."""
        async with self._lock:
            lease, self._lease = self._lease, 0
            self._judge()
            if lease:
                with contextlib.suppress(Unavailable):
                    await self._store.revoke(lease)

    def keys(self) -> list[str]:
        """The candidates that are known."""
        return list(self._candidates)

    # What the stream of changes tells.

    def candidate(self, key: str, created: int) -> None:
        """A candidate is there."""
        self._candidates[key] = created
        self._judge()

    def gone(self, key: str) -> None:
        """A candidate or a record is gone. If it is this instance's, so may be the lease: that is seen to at once."""
        if self._written.pop(key, None) is not None:
            self._due.set()
        if self._candidates.pop(key, None) is not None:
            self._judge()

    def _candidacy(self) -> str:
        """The key is another with each lease: two processes under one id are two candidates."""
        return f"{CANDIDATES}/{self._lease:x}"

    async def _beat(self, *, renew: bool) -> None:
        """Renew the lease or take a new one, and write what is not under it yet."""
        async with self._lock:
            now = asyncio.get_running_loop().time
            sent_at = now()
            if self._lease and renew:
                if await self._store.renew(self._lease):
                    self._expires_at = sent_at + self._lease_s
                else:
                    self._lease = 0
            if self._lease:
                try:
                    await self._write()
                except LeaseGone:
                    self._lease = 0
            if not self._lease:
                sent_at = now()
                self._lease = await self._store.grant(self._lease_s)
                self._expires_at = sent_at + self._lease_s
                self._written = {}
                try:
                    await self._write()
                except LeaseGone:
                    raise Unavailable("the registry let a new lease expire at once") from None

    async def _write(self) -> None:
        wanted = {self._candidacy(): self.instance.encode(), **self._record}
        writes = [Write(key, value, self._lease) for key, value in wanted.items() if self._written.get(key) != value]
        if writes:
            await self._store.transact({}, writes)
            self._written |= {write.key: write.value or b"" for write in writes}

    def _judge(self) -> None:
        own = self._candidates.get(self._candidacy())
        self._first = own is not None and own == min(self._candidates.values())
        leader = self.leader
        if leader != self._told:
            self._told = leader
            self.on_leader(leader)
