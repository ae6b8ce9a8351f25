"""What became of models in this instance: the last events, each with its time."""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final, NamedTuple

from mmcore.cache import Cache, Copy, CopyState
from mmcore.errors import MmcoreError
from mmcore.registry import ModelRecord, Table

#: Events kept, of all models together: about 0.8 MB when it is full.
KEPT: Final = 8192

#: What is kept of an event beside its texts: its time and kind, and the bytes of the model's name and version.
_HEAD: Final = struct.Struct("<QBHH")
_KINDS: Final = (
    *("registered", "unregistered", "queued", "pulling", "loading", "loaded", "reloaded", "given up", "failed"),
    *("evicted", "unloading", "unloaded"),
)
#: So many characters of a name are kept: four bytes each at most, counted in sixteen bits.
_LONGEST: Final = 2**14 - 1

_LOADS: Final = (CopyState.QUEUED, CopyState.PULLING, CopyState.LOADING)


class Event(NamedTuple):
    """One event.

    Attributes:
        number: ascending, from 1.
        at_ms: milliseconds of the epoch.
        what: one of ``registered``, ``unregistered``, ``queued``, ``pulling``, ``loading``, ``loaded``, ``reloaded``,
            ``given up``, ``failed``, ``evicted``, ``unloading`` and ``unloaded``.
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
        #: Packed, since they are many and hardly one of them is ever looked at.
        self._kept: deque[bytes] = deque(maxlen=KEPT)
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
        events = (_unpacked(self._number - age, packed) for age, packed in enumerate(reversed(self._kept)))
        return list(islice((event for event in events if model in (None, event.model)), most))

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
        name, number = _bytes(model[:_LONGEST]), _bytes(version[:_LONGEST])
        head = _HEAD.pack(self._clock_ms(), _KINDS.index(what), len(name), len(number))
        self._kept.append(b"".join((head, name, number, _bytes(detail))))


def _bytes(text: str) -> bytes:
    # The name of a file may be no UTF-8.
    return text.encode("utf-8", "surrogatepass")


def _unpacked(number: int, packed: bytes) -> Event:
    at_ms, kind, name, version = _HEAD.unpack_from(packed)
    texts = packed[_HEAD.size :]
    model, version_text, detail = (
        part.decode("utf-8", "surrogatepass")
        for part in (texts[:name], texts[name : name + version], texts[name + version :])
    )
    return Event(number, at_ms, model, version_text, _KINDS[kind], detail)


def _took(copy: Copy) -> str:
    times = copy.times
    parts = {
        "waiting": times.queue_s + times.room_s,
        "finding or pulling": times.find_s,
        "opening": times.open_s + times.publish_s,
    }
    spent = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items())
    return f"{copy.weight:,} bytes in {sum(parts.values()):.3f} s: {spent}"
