"""What this instance writes into the records of registered models: its copies, failed loads, and last uses.

Nothing waits for these writes. What changes within a moment is written once, and what cannot be written, because the
store is away, is written when it is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from mmcore.cache import CopyState
from mmcore.errors import MmcoreError, Unavailable
from mmcore.registry import CopyRecord, FailureRecord, ModelRecord, Registry

log = logging.getLogger(__name__)

_R = TypeVar("_R")

#: How long changes are gathered before they are written.
GATHER_S: Final = 0.02
#: Records written at once.
WRITERS: Final = 16
#: Pause before a store that is away is written to again.
RETRY_S: Final = 1.0
#: How long the last ones may take when the instance ends; what is not written goes with its lease.
CLOSE_WAIT_S: Final = 5.0
#: A size is written anew when it differs by more than this share.
SIZE_STEP: Final = 0.25
#: How long a failed load is told of when nothing comes after it.
FAILURE_KEPT_MS: Final = 15 * 60_000


@dataclass(slots=True)
class _Own:
    """What is to be said of this instance in one model's record."""

    copy: CopyRecord | None = None
    size_bytes: int = 0
    failure: FailureRecord | None = None
    used_ms: int = 0


class Reports:
    """This instance's part of the models' records."""

    def __init__(self, registry: Registry, clock_ms: Callable[[], int]) -> None:
        self._registry = registry
        self._clock_ms = clock_ms
        self._own: dict[str, _Own] = {}
        self._unwritten: set[str] = set()
        self._writing: asyncio.Task[None] | None = None
        self._closing = False

    def copy(self, name: str, state: CopyState | None, size_bytes: int = 0) -> None:
        """The copy here is in this state from now on, or is none; a loaded one ends an earlier failure.

        ``size_bytes`` is what a loaded one takes, by which others place it.
        """
        own = self._own.setdefault(name, _Own())
        own.size_bytes = size_bytes
        own.copy = CopyRecord(state=state.value, since_ms=self._clock_ms()) if state is not None else None
        if state is CopyState.LOADED:
            own.failure = None
        self._due(name)

    def give_up_loads(self) -> None:
        """The loads that have not ended will not: who finds them in a record would think that they ended us."""
        for name, own in self._own.items():
            if own.copy is not None and own.copy.state != CopyState.LOADED:
                own.copy = None
                self._due(name)

    def failed(self, name: str, message: str) -> None:
        """A load here has failed."""
        own = self._own.setdefault(name, _Own())
        own.copy = None
        own.failure = FailureRecord(at_ms=self._clock_ms(), message=message)
        self._due(name)

    def used(self, name: str, at_ms: int) -> None:
        """The model was used then, or shall count as used then."""
        own = self._own.setdefault(name, _Own())
        if at_ms > own.used_ms:
            own.used_ms = at_ms
            self._due(name)

    def last_used_ms(self, name: str) -> int:
        """The last use that was told of."""
        own = self._own.get(name)
        return own.used_ms if own is not None else 0

    def forget(self, name: str) -> None:
        """The model is registered no more."""
        self._own.pop(name, None)
        self._unwritten.discard(name)

    def expire_failures(self) -> None:
        """Take back failures that nothing has followed for long."""
        oldest_ms = self._clock_ms() - FAILURE_KEPT_MS
        for name, own in self._own.items():
            if own.failure is not None and own.failure.at_ms < oldest_ms:
                own.failure = None
                self._due(name)

    def concerns(self, name: str) -> bool:
        """Whether there is something to be said of a model."""
        return name in self._own

    def check(self, name: str, record: ModelRecord) -> None:
        """A record has changed: what it says of this instance may be what a store that lost its memory knew."""
        if self.merge(name, record) != record and name not in self._unwritten:
            self._due(name)

    def merge(self, name: str, record: ModelRecord) -> ModelRecord:
        """The record with what is to be said of this instance, written or not."""
        own = self._own.get(name, _Own())
        instance = self._registry.instance
        return replace(
            record,
            copies=_put(record.copies, instance, own.copy),
            failures=_put(record.failures, instance, own.failure),
            size_bytes=_size(record.size_bytes, own.size_bytes),
            last_used_ms=max(record.last_used_ms, own.used_ms),
        )

    async def close(self) -> None:
        """Write what can be written at once, and no more after."""
        self._closing = True
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=CLOSE_WAIT_S)

    def _due(self, name: str) -> None:
        self._unwritten.add(name)
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write(), name="write copies to the registry")

    async def _write(self) -> None:
        try:
            while self._unwritten:
                await asyncio.sleep(GATHER_S)
                names, self._unwritten = self._unwritten, set()
                if not await self._write_all(list(names)):
                    if self._closing:
                        return
                    await asyncio.sleep(RETRY_S)
        finally:
            self._writing = None

    async def _write_all(self, names: list[str]) -> int:
        """How many could be written."""
        written = 0

        async def writer() -> None:
            nonlocal written
            while names:
                written += await self._write_one(names.pop())

        async with asyncio.TaskGroup() as group:
            for _ in range(min(WRITERS, len(names))):
                group.create_task(writer(), name="write a copy to the registry")
        return written

    async def _write_one(self, name: str) -> bool:
        """Whether the store took it, or refused it for good."""
        if not self._registry.connected:
            self._unwritten.add(name)
            return False
        try:
            await self._registry.models.update(
                name, lambda record: self.merge(name, record) if record is not None else None
            )
        except Unavailable as error:
            log.debug("the record of model %s was not written: %s", name, error)
            self._unwritten.add(name)
            return False
        except MmcoreError as error:
            log.error("the record of model %s was not written: %s", name, error)
        else:
            own = self._own.get(name)
            if own is not None and own.copy is None and own.failure is None and name not in self._unwritten:
                del self._own[name]
        return True


def _size(told_bytes: int, own_bytes: int) -> int:
    """The size that is told, unless what was measured here differs by more than copies of a model do."""
    return own_bytes if own_bytes and abs(own_bytes - told_bytes) > SIZE_STEP * own_bytes else told_bytes


def _put(entries: dict[str, _R], instance: str, own: _R | None) -> dict[str, _R]:
    others = {name: entry for name, entry in entries.items() if name != instance}
    return {**others, instance: own} if own is not None else others
