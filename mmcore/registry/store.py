"""What a registry needs of the place that holds it: keys with versions, transactions, leases and a stream of changes.

A store knows nothing of records and tables. Everything above it (:mod:`mmcore.registry.registry`) is the same for all,
and so is the suite of tests that each of them passes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from mmcore.errors import Unavailable

_VERSION_BYTES: Final = 8


class NotLeader(Unavailable):
    """A write that only the leader may make was refused: this instance is not the leader, or no longer."""


class LeaseGone(Exception):
    """The lease has expired: its keys are deleted, and a new one is to be granted."""


class Compacted(Exception):
    """The changes since a version are not to be had any more; a new snapshot is needed."""


class Entry(NamedTuple):
    """A key's value and version, in one ``bytes`` that the tables keep as it is.

    Attributes:
        packed: the version in eight bytes, then the value.
        created: the version in which the key came to be; of a key without a lease it may be 0.
    """

    packed: bytes
    created: int = 0

    @classmethod
    def of(cls, value: bytes, version: int, created: int = 0) -> Entry:
        """A value as written, and the version of the transaction that wrote it; no version is ever used twice."""
        return cls(version.to_bytes(_VERSION_BYTES, "big") + value, created)

    @property
    def value(self) -> bytes:
        """The value."""
        return self.packed[_VERSION_BYTES:]

    @property
    def version(self) -> int:
        """The version."""
        return int.from_bytes(self.packed[:_VERSION_BYTES], "big")


def is_same(entry: Entry | None, expected: Entry | None) -> bool:
    """Whether a key has the expected version and value.

    The version alone would do, were there not stores that came back empty and count from one again.
    """
    if entry is None or expected is None:
        return entry is expected
    return entry.packed == expected.packed


@dataclass(frozen=True, slots=True)
class Write:
    """A key's new value, deleted with the lease where one is given; None deletes the key."""

    key: str
    value: bytes | None
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Fence:
    """The transaction is refused unless the key exists since exactly that version."""

    key: str
    created: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a transaction ended.

    Attributes:
        done: whether it was carried out; otherwise one of the expected entries was another.
        version: of the store after it.
        current: where it was not: the expected keys' entries, read at once.
    """

    done: bool
    version: int
    current: Mapping[str, Entry | None]


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys that have new entries, keys that are gone, and the version of the store that this leads to.

    A key that changed several times may come with its latest entry alone.
    """

    version: int
    entries: Sequence[tuple[str, Entry]] = ()
    gone: Sequence[str] = ()


class Store(Protocol):
    """One place that holds registries. Every method raises Unavailable, within seconds, when it cannot be reached."""

    async def connect(self) -> None:
        """Make the first contact; once is enough.

        Raises:
            Unavailable: it cannot be reached; the text names the address.
        """

    async def read(self, key: str) -> Entry | None:
        """The key's entry as of now (linearizable)."""

    async def transact(
        self, expected: Mapping[str, Entry | None], writes: Sequence[Write], fence: Fence | None = None
    ) -> Outcome:
        """Carry out all writes at once, if every expected key has that very version and value (None: is absent).

        When it raises Unavailable the writes may have been carried out all the same.

        Raises:
            NotLeader: the fence's key is gone or another.
            LeaseGone: a write's lease has expired; nothing was written.
        """

    async def create_missing(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """Write those keys that are absent, and leave the others alone."""

    def snapshot(self) -> AsyncGenerator[Changes, None]:
        """All entries, in pages, at least one; with the changes after the last page's version, nothing is missed."""

    def changes(self, after: int) -> AsyncGenerator[Changes, None]:
        """The changes after a version as they happen, in order; the first is empty and tells that they are followed.

        Raises:
            Compacted: they are not to be had any more, or the store never came as far as that version.
        """

    async def grant(self, ttl_s: float) -> int:
        """A new lease, which expires ``ttl_s`` after its last renewal by the clock of the store."""

    async def renew(self, lease: int) -> bool:
        """Renew the lease; False when it has expired."""

    async def revoke(self, lease: int) -> None:
        """End the lease, and with it its keys."""

    async def close(self) -> None:
        """Let go of it. Leases go on to their ends."""
