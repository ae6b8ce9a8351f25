"""What became of models in this instance: the last events, each with its time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, NamedTuple

from mmcore.cache import Cache, Copy, CopyState
from mmcore.errors import MmcoreError
from mmcore.registry import ModelRecord, Table

#: Events kept, of all models together: about 2 MB when it is full.
KEPT: Final = 8192

_LOADS: Final = (CopyState.QUEUED, CopyState.PULLING, CopyState.LOADING)


class Event(NamedTuple):
    """One event.

    Attributes:
        number: ascending, from 1.
        at_ms: milliseconds of the epoch.
        what: ``registered``, ``unregistered``, ``queued``, ``pulling``, ``loading``, ``loaded``, ``reloaded``,
            ``given up``, ``failed``, ``evicted``, ``unloading`` or ``unloaded``.
        detail: why, or what it took; may be empty.
    """

    number: int
    at_ms: int
    model: str
    version: str
    what: str
    detail: str


class Events:
    """The last events of one instance; none are noted before :meth:`follow`."""

    def __init__(self, cache: Cache, clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self._cache = cache
        self._clock_ms = clock_ms
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._number = 0
        #: Versions that are on their way in or out, and how far.
        self._moving: dict[tuple[str, str], CopyState] = {}
        #: The copies that were told of as loaded.
        self._loaded: dict[tuple[str, str], Copy] = {}

    def follow(self, models: Table[ModelRecord]) -> None:
        """Note from now on what the cache does, and what comes into and goes from the registry."""
        self._cache.on_changed = self._changed
        self._cache.on_failed = self._failed
        self._cache.on_evicted.append(self._evicted)
        models.on_added = lambda model: self._note(model, "", "registered")
        models.listen(lambda model: None if model in models else self._note(model, "", "unregistered"))

    def __len__(self) -> int:
        return len(self._kept)

    def latest(self, most: int, model: str | None = None) -> list[Event]:
        """The last events, of one model or of all, newest first."""
        found: Iterator[Event] = reversed(self._kept)
        if model is not None:
            found = (event for event in found if event.model == model)
        return list(islice(found, most))

    def _changed(self, model: str, version: str, state: CopyState | None) -> None:
        key = (model, version)
        before = self._moving.get(key)
        if state is CopyState.LOADED:
            # Told of again and again while a successor is loaded behind it, and when it is the successor.
            self._moving.pop(key, None)
            copy, known = self._cache.lru.get(key), self._loaded.get(key)
            if isinstance(copy, Copy) and copy is not known:
                self._loaded[key] = copy
                self._note(model, version, "loaded" if known is None else "reloaded", _took(copy))
        elif state in _LOADS or state is CopyState.UNLOADING:
            if state is not None and state is not before:
                self._moving[key] = state
                self._note(model, version, state.value.lower())
            self._loaded.pop(key, None)
        else:
            self._loaded.pop(key, None)
            if self._moving.pop(key, None) is not None and state is None:
                self._note(model, version, "unloaded" if before is CopyState.UNLOADING else "given up")

    def _failed(self, model: str, version: str, error: MmcoreError) -> None:
        self._note(model, version, "failed", str(error))

    def _evicted(self, copy: Copy) -> None:
        self._note(copy.name, copy.version, "evicted", f"to make room; it took {copy.weight:,} bytes")

    def _note(self, model: str, version: str, what: str, detail: str = "") -> None:
        self._number += 1
        self._kept.append(Event(self._number, self._clock_ms(), model, version, what, detail))


def _took(copy: Copy) -> str:
    times = copy.times
    parts = {
        "waiting": times.queue_s + times.room_s,
        "finding or pulling": times.find_s,
        "opening": times.open_s + times.publish_s,
    }
    spent = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items())
    return f"{copy.weight:,} bytes in {sum(parts.values()):.3f} s: {spent}"
