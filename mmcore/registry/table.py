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


class Table(Generic[R]):
    """The records of one kind by id, in step with the store.

    Looking at it costs no await and goes on while the store is away. An entry is kept as the store gives it: one
    ``bytes`` under the store's key, which a store in this process keeps together with the table.

    Attributes:
        name: the first part of its keys in the store.
        kind: the class of its records.
        on_added: called with the id of each record that comes to be, before the listeners are.
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
        self._prefix = f"{name}/"
        #: By key in the store.
        self._held: dict[str, bytes] = {}
        #: Replaced, never changed, as one may come or go while they are told.
        self._listeners: tuple[Listener, ...] = ()
        self.on_added: Listener = lambda name: None

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[str]:
        start = len(self._prefix)
        return (key[start:] for key in self._held)

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._held

    def get(self, name: str) -> R | None:
        """This instance's view of a record; None when there is none, or (logged) when it cannot be read."""
        entry = self.entry(name)
        if entry is None:
            return None
        try:
            return decode(self.kind, name, entry.value)
        except CorruptRecord as error:
            log.error("%s", error)
            return None

    def listen(self, callback: Listener) -> Callable[[], None]:
        """Have ``callback`` called on the loop with the id of each record that changed or went; the call that ends it.

        One that listens before the registry is started hears of every record there is, and so of a million in some
        seconds: it looks at what :meth:`mentions` tells before it has a record read.
        """
        self._listeners = (*self._listeners, callback)

        def stop() -> None:
            left = list(self._listeners)
            left.remove(callback)
            self._listeners = tuple(left)

        return stop

    def mentions(self, name: str, text: bytes) -> bool:
        """Whether a record's stored form has ``text`` in it: a hundredth of what reading it costs."""
        held = self._held.get(f"{self._prefix}{name}")
        return held is not None and text in held

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
        return f"{self._prefix}{name}"

    def keys(self) -> list[str]:
        """All keys."""
        return list(self._held)

    def entry(self, name: str) -> Entry | None:
        """What is held of a record; when it was created is not."""
        held = self._held.get(f"{self._prefix}{name}")
        return None if held is None else Entry(held)

    def put(self, key: str, entry: Entry) -> None:
        """Hold another entry, and tell the listeners when it has another value."""
        before = self._held.get(key)
        self._held[key] = entry.packed
        if before is None:
            self.on_added(key[len(self._prefix) :])
        if self._listeners and (before is None or Entry(before).value != entry.value):
            self._tell(key)

    def drop(self, key: str) -> None:
        """Hold it no longer, and tell the listeners when it was held."""
        if self._held.pop(key, None) is not None:
            self._tell(key)

    def _tell(self, key: str) -> None:
        name = key[len(self._prefix) :]
        for listener in self._listeners:
            try:
                listener(name)
            except Exception:
                log.exception("a listener to %s failed at '%s'", self.name, name)
