"""A registry's store in this process: for an instance on its own, and for several in one test."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

from mmcore.registry.store import Changes, Compacted, Entry, Fence, LeaseGone, NotLeader, Outcome, Write, is_same

#: How many changes are remembered; who is further behind takes a snapshot.
LOG_LENGTH: Final = 10_000


class MemoryStore:
    """A dict with versions. It belongs to one event loop; every method is done at once."""

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}
        #: Of keys under a lease: the lease, and the version in which they came to be.
        self._leased: dict[str, tuple[int, int]] = {}
        self._version = 0
        self._log: deque[tuple[int, str]] = deque(maxlen=LOG_LENGTH)
        self._wakes: set[asyncio.Event] = set()
        self._leases: dict[int, _Lease] = {}
        self._granted = 0

    async def connect(self) -> None:
        """Nothing to be done."""

    async def read(self, key: str) -> Entry | None:
        """See :class:`~mmcore.registry.store.Store`, here and below."""
        return self._entry(key)

    async def transact(
        self, expected: Mapping[str, Entry | None], writes: Sequence[Write], fence: Fence | None = None
    ) -> Outcome:
        """All or nothing: there is no await in it."""
        if fence is not None:
            held = self._entry(fence.key)
            if held is None or held.created != fence.created:
                raise NotLeader("this instance is not the leader any more")
        if any(not is_same(self._entry(key), entry) for key, entry in expected.items()):
            return Outcome(False, self._version, {key: self._entry(key) for key in expected})
        for write in writes:
            if write.lease and write.lease not in self._leases:
                raise LeaseGone
        if writes:
            self._write(writes)
        return Outcome(True, self._version, {})

    async def create_missing(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """In one transaction."""
        self._write([Write(key, value) for key, value in entries if key not in self._packed])

    async def snapshot(self) -> AsyncGenerator[Changes, None]:
        """One page."""
        yield Changes(self._version, [(key, self._held(key)) for key in self._packed])

    async def changes(self, after: int) -> AsyncGenerator[Changes, None]:
        """From the log of keys, each with its latest entry."""
        wake = asyncio.Event()
        self._wakes.add(wake)
        try:
            yield Changes(after)
            while True:
                if after > self._version or (len(self._log) == LOG_LENGTH and after < self._log[0][0]):
                    raise Compacted
                wake.clear()
                if after < self._version:
                    changes = self._since(after)
                    after = changes.version
                    yield changes
                await wake.wait()
        finally:
            self._wakes.discard(wake)

    async def grant(self, ttl_s: float) -> int:
        """It expires by a timer of the loop."""
        self._granted += 1
        self._leases[self._granted] = _Lease(ttl_s, self._expiry(self._granted, ttl_s))
        return self._granted

    async def renew(self, lease: int) -> bool:
        """Set the timer anew."""
        held = self._leases.get(lease)
        if held is None:
            return False
        held.timer.cancel()
        held.timer = self._expiry(lease, held.ttl_s)
        return True

    async def revoke(self, lease: int) -> None:
        """As if it had expired."""
        self._expire(lease)

    async def close(self) -> None:
        """Leave no timers behind, when nobody follows any more."""
        if not self._wakes:
            for held in self._leases.values():
                held.timer.cancel()

    def _held(self, key: str) -> Entry:
        return Entry(self._packed[key], self._leased.get(key, (0, 0))[1])

    def _entry(self, key: str) -> Entry | None:
        return self._held(key) if key in self._packed else None

    def _write(self, writes: Sequence[Write]) -> None:
        self._version += 1
        for write in writes:
            _, created = self._leased.pop(write.key, (0, self._version))
            if write.value is None:
                self._packed.pop(write.key, None)
            else:
                self._packed[write.key] = Entry.of(write.value, self._version).packed
                if write.lease:
                    self._leased[write.key] = (write.lease, created)
            self._log.append((self._version, write.key))
        for wake in self._wakes:
            wake.set()

    def _since(self, after: int) -> Changes:
        keys: dict[str, None] = {}
        for version, key in reversed(self._log):
            if version <= after:
                break
            keys[key] = None
        entries = [(key, self._held(key)) for key in keys if key in self._packed]
        entries.sort(key=lambda one: one[1].packed)
        return Changes(self._version, entries, [key for key in keys if key not in self._packed])

    def _expiry(self, lease: int, ttl_s: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(ttl_s, self._expire, lease)

    def _expire(self, lease: int) -> None:
        held = self._leases.pop(lease, None)
        if held is None:
            return
        held.timer.cancel()
        keys = [key for key, (owner, _) in self._leased.items() if owner == lease]
        if keys:
            self._write([Write(key, None) for key in keys])


class _Lease:
    __slots__ = ("timer", "ttl_s")

    def __init__(self, ttl_s: float, timer: asyncio.TimerHandle) -> None:
        self.ttl_s = ttl_s
        self.timer = timer
