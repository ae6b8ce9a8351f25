"""The objects with their versions, and what happened to them, for watches that come later."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from tests.apiserver.answers import expired
from tests.apiserver.fields import Path
from tests.apiserver.resources import Resource

Object = dict[str, Any]
Key = tuple[str, str]

#: Changes of a kind that are remembered.
_HISTORY: Final = 4096
#: The version that the server starts at: older ones are not known any more, as in a server that has run for long.
_FIRST: Final = 1000


@dataclass(frozen=True, slots=True)
class Manager:
    """Who manages fields: its name, how it came to them, and in which version of the kind."""

    name: str
    operation: str
    api_version: str
    subresource: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object that is never changed, with the fields of each manager and when it got the last of them."""

    item: Object
    owners: dict[Manager, tuple[frozenset[Path], str]]
    data: bytes

    @classmethod
    def of(cls, item: Object, owners: dict[Manager, tuple[frozenset[Path], str]]) -> Stored:
        return cls(item, owners, orjson.dumps(item))


@dataclass(frozen=True, slots=True)
class Change:
    """An object as it was and is; None before it was made, and for one that is gone its last version in ``after``."""

    version: int
    before: Stored | None
    after: Stored
    deleted: bool = False


@dataclass(slots=True)
class _Kind:
    items: dict[Key, Stored] = field(default_factory=dict)
    history: deque[Change] = field(default_factory=deque)
    #: Changes since the version after this one are all in the history.
    complete_since: int = _FIRST
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class Store:
    """All objects.

    Attributes:
        version: of the last change.
    """

    def __init__(self) -> None:
        self.version = _FIRST
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def _kind(self, resource: Resource) -> _Kind:
        return self._kinds.setdefault((resource.api_version, resource.plural), _Kind())

    def get(self, resource: Resource, key: Key) -> Stored | None:
        return self._kind(resource).items.get(key)

    def all(self, resource: Resource, namespace: str = "") -> list[Stored]:
        """The objects of a kind, by namespace and name."""
        found = self._kind(resource).items
        keys = sorted(key for key in found if not namespace or key[0] == namespace)
        return [found[key] for key in keys]

    def next_version(self) -> int:
        """The version that the next change gets."""
        return self.version + 1

    def put(self, resource: Resource, key: Key, stored: Stored) -> None:
        """Keep an object, made or changed, whose version is :meth:`next_version`."""
        kind = self._kind(resource)
        self.version += 1
        before = kind.items.get(key)
        kind.items[key] = stored
        self._note(kind, Change(self.version, before, stored))

    def drop(self, resource: Resource, key: Key, last: Stored) -> None:
        """Let an object go; ``last`` is it with the version of its end."""
        kind = self._kind(resource)
        self.version += 1
        before = kind.items.pop(key)
        self._note(kind, Change(self.version, before, last, deleted=True))

    def forget(self) -> None:
        """Have no history: watches of older versions are refused, as after a compaction."""
        for kind in self._kinds.values():
            kind.history.clear()
            kind.complete_since = self.version

    def since(self, resource: Resource, version: int) -> list[Change]:
        """The changes after a version; refused is one that is too old."""
        kind = self._kind(resource)
        if version < kind.complete_since:
            raise expired(version, kind.complete_since)
        found: list[Change] = []
        for change in reversed(kind.history):
            if change.version <= version:
                break
            found.append(change)
        return found[::-1]

    async def wait(self, resource: Resource, version: int, timeout_s: float) -> None:
        """Wait until there is a change after a version, or for so long."""
        kind = self._kind(resource)
        if kind.history and kind.history[-1].version > version:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await kind.arrived.wait()
        except TimeoutError:
            return

    def _note(self, kind: _Kind, change: Change) -> None:
        kind.history.append(change)
        if len(kind.history) > _HISTORY:
            kind.complete_since = kind.history.popleft().version
        arrived, kind.arrived = kind.arrived, asyncio.Event()
        arrived.set()
