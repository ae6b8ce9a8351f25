"""One table of the registry as this instance holds it: every record in its stored form, read when it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, Generic, TypeVar

from mmcore.registry.records import CorruptRecord, Record, decode
from mmcore.registry.store import Entry

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)
Listener = Callable[[str], None]

_VERSION_BYTES: Final = 8


class Table(Generic[R]):
    """The records of one kind by id, in step with the store.

    Looking at it costs no await and goes on while the store is away. An entry is kept as one ``bytes``, its version
    before its value: with its id and its place in the dict some 150 bytes more than the JSON.

    Attributes:
        name: the first part of its keys in the store.
        kind: the class of its records.
    """

    def __init__(
        self,
        name: str,
        kind: type[R],
        *,
        commit: Callable[..., Awaitable[list[Any]]],
        read: Callable[[str], Awaitable[Entry | None]],
    ) -> None:
        self.name: Final = name
        self.kind: Final = kind
        self._commit = commit
        self._read = read
        self._held: dict[str, bytes] = {}
        self._listeners: list[Listener] = []

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def get(self, name: str) -> R | None:
        """This instance's view of a record; None when there is none, or (logged) when it cannot be read."""
        held = self._held.get(name)
        if held is None:
            return None
        try:
            return decode(self.kind, name, held[_VERSION_BYTES:])
        except CorruptRecord as error:
            log.error("%s", error)
            return None

    def listen(self, callback: Listener) -> Callable[[], None]:
        """Have ``callback`` called on the loop with the id of each record that changed or went; the call that ends it.

        What the table holds when the registry has started is not told of; it is there to be iterated over.
        """
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    async def read(self, name: str) -> R | None:
        """The record as it is in the store now (linearizable).

        Raises:
            Unavailable: the store is away.
            CorruptRecord: what it holds is no record.
        """
        entry = await self._read(self.key(name))
        return None if entry is None else decode(self.kind, name, entry.value)

    async def update(self, name: str, change: Callable[[R | None], R | None], *, fenced: bool = False) -> R | None:
        """Replace a record by what ``change`` makes of it; see :meth:`mmcore.registry.Registry.commit`."""
        after: list[R | None] = await self._commit([(self, name)], lambda before: [change(before[0])], fenced=fenced)
        return after[0]

    # For the registry.

    def key(self, name: str) -> str:
        """The record's key in the store."""
        return f"{self.name}/{name}"

    def entry(self, name: str) -> Entry | None:
        """What is held of a record; when it was created is not."""
        held = self._held.get(name)
        if held is None:
            return None
        return Entry(held[_VERSION_BYTES:], int.from_bytes(held[:_VERSION_BYTES], "big"), 0)

    def put(self, name: str, entry: Entry) -> None:
        """Hold another entry, and tell the listeners when it has another value."""
        before = self._held.get(name)
        self._held[name] = entry.version.to_bytes(_VERSION_BYTES, "big") + entry.value
        if self._listeners and (before is None or before[_VERSION_BYTES:] != entry.value):
            self._tell(name)

    def drop(self, name: str) -> None:
        """Hold it no longer, and tell the listeners when it was held."""
        if self._held.pop(name, None) is not None:
            self._tell(name)

    def _tell(self, name: str) -> None:
        for listener in list(self._listeners):
            try:
                listener(name)
            except Exception:
                log.exception("a listener to %s failed at '%s'", self.name, name)
