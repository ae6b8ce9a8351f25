"""A folder of models, kept in step while running: one model for each folder or model file in it.

The tree's file names, sizes, times and inodes are compared in every scan, which works on every file system, network
and ConfigMap mounts included, where change notifications do not. A change is taken once the files have been the same
for a while, so a copy in progress is not mistaken for a whole model; names of temporary files are passed over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mmcore.errors import MmcoreError, NotFound, Unavailable
from mmcore.model import ModelSource
from mmcore.storage.cancellation import Cancellation
from mmcore.storage.formats import format_of
from mmcore.storage.layout import Layout, inspect, is_temporary
from mmcore.storage.origin import pick
from mmcore.storage.signature import signature

log = logging.getLogger(__name__)

INTERVAL_S: Final = 1.0
#: How long is waited between two looks at files that somebody asks to be taken now.
ASKED_QUIET_S: Final = 0.1
#: At start, files whose inodes changed no later than this ago are whole.
SETTLED_AGE_S: Final = 2.0
#: A scan takes at most this share of one core.
_SCAN_SHARE: Final = 0.1
_NOT_MODELS: Final = frozenset({"__pycache__", "lost+found"})
#: What a model's own folder has, and the folder above it has not.
_OF_ONE_MODEL: Final = ("config.pbtxt", "model-settings.json", "saved_model.pb")


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one model: its files are new, with ``layout`` or a ``problem``, or with neither they are gone."""

    name: str
    layout: Layout | None = None
    problem: str | None = None


class ModelFolder:
    """The models below ``root``; an :class:`mmcore.storage.origin.Origin` for all of them.

    A model is called as its folder, or as its file without the suffix, unless its settings name it. Where two claim one
    name, the first in alphabetical order of what was found together has it, and the other is logged and waits.

    ``interval_s`` is the time between scans; it grows when a scan takes long.
    """

    def __init__(
        self, root: Path, *, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.root = root
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        #: By entry (a name below the root): the files that were taken, and those seen since, with the time.
        self._taken: dict[str, bytes] = {}
        self._pending: dict[str, tuple[bytes, float]] = {}
        #: Only where name and entry differ, which is rare among folders.
        self._name_of: dict[str, str] = {}
        self._entry_of: dict[str, str] = {}
        #: Entries taken that are no model here: those denied the name they claim, and others with an empty one.
        self._without_name: dict[str, str] = {}
        self._scan_s = 0.0
        self._unreadable = False

    # Called in threads.

    def scan(self, quiet_s: float = 0.0, *, settled_age_s: float | None = None) -> list[Change]:
        """Look at every model once and return what is to be taken now. Blocking.

        Files that differ from those taken last are taken when they are the same as in an earlier scan that began at
        least ``quiet_s`` ago, or when their inodes have not changed for ``settled_age_s``.
        A root that cannot be read changes nothing: a mount that is away for a moment is not the end of every model.
        """
        with self._lock:
            started = self._clock()
            try:
                names = [one.name for one in os.scandir(self.root)]
            except OSError as error:
                if not self._unreadable:
                    log.warning("the folder of models %s cannot be read: %s", self.root, error.strerror)
                self._unreadable = True
                return []
            self._unreadable = False
            changes: list[Change] = []
            seen: dict[str, bytes] = {}
            settled_before_ns = 0 if settled_age_s is None else time.time_ns() - int(settled_age_s * 1e9)
            for entry in sorted(names):
                if is_temporary(entry) or entry in _NOT_MODELS:
                    continue
                try:
                    found = signature(self.root / entry)
                except OSError:
                    continue
                seen[entry] = found.digest
                if self._taken.get(entry) == found.digest:
                    self._pending.pop(entry, None)
                elif found.changed_ns < settled_before_ns or self._is_quiet(entry, found.digest, started, quiet_s):
                    changes += self._take(entry, found.digest)
            for entry in [one for one in self._taken if one not in seen]:
                if self._is_quiet(entry, b"", started, quiet_s):
                    changes += self._drop(entry)
            for entry in [one for one, (digest, _) in self._pending.items() if digest and one not in seen]:
                del self._pending[entry]
            self._scan_s = self._clock() - started
            return changes

    def source(self, name: str, version: str, cancelled: Cancellation | None = None) -> ModelSource:
        """The version's source, see :class:`mmcore.storage.origin.Origin`."""
        self.confirm(name)
        layout = inspect(self.root / self._entry_of.get(name, name))
        return pick(layout, name, version)

    def confirm(self, name: str) -> None:
        """Check that the files are those that were taken, see :class:`mmcore.storage.origin.Origin`."""
        entry = self._entry_of.get(name, name)
        taken = self._taken.get(entry)
        try:
            now = signature(self.root / entry).digest
        except OSError as error:
            raise NotFound(f"Request for unknown model: '{name}' is not found") from error
        if taken != now:
            raise Unavailable(f"the files of model '{name}' are being changed; try again when they are complete")

    def path(self, name: str) -> Path:
        """The folder or file of a model."""
        return self.root / self._entry_of.get(name, name)

    def has(self, name: str) -> bool:
        """Whether a model of that name is in the folder."""
        return self._owner(name) is not None

    def look_again(self, name: str) -> list[Change]:
        """A change that tells of a model's files as they were taken. Blocking, a few files are read."""
        entry = self._owner(name)
        with self._lock:
            return self._take(entry, self._taken[entry]) if entry is not None else []

    def _is_quiet(self, entry: str, digest: bytes, now: float, quiet_s: float) -> bool:
        """Whether an earlier scan, long enough ago, saw the same; remembers what this one saw."""
        before = self._pending.get(entry)
        if before is None or before[0] != digest:
            self._pending[entry] = (digest, now)
            return False
        return now - before[1] >= quiet_s

    def _take(self, entry: str, digest: bytes) -> list[Change]:
        path = self.root / entry
        before = self._name(entry)
        layout, problem = None, None
        name = self._name_of.get(entry, entry)
        try:
            if path.is_file():
                name = path.stem if format_of(path) is not None else ""
            if name:
                layout = inspect(path)
                name = layout.name
        except MmcoreError as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        self._pending.pop(entry, None)
        changes = self._release(entry) if before is not None and before != name else []
        self._taken[entry] = digest
        if not name:
            # A file among models that is none: a README, a licence.
            self._without_name[entry] = ""
            return changes
        owner = self._owner(name)
        if owner is not None and owner != entry:
            log.warning("%s is not served: %s has the name '%s' already", path, self.root / owner, name)
            self._without_name[entry] = name
            return changes
        self._without_name.pop(entry, None)
        if name == entry:
            # One text for both; the path's own parts are interned, which costs a slot of a dictionary as well.
            name = entry
        else:
            self._name_of[entry] = name
            self._entry_of[name] = entry
        return [*changes, Change(name, layout, problem)]

    def _drop(self, entry: str) -> list[Change]:
        changes = self._release(entry)
        del self._taken[entry]
        self._pending.pop(entry, None)
        return changes

    def _name(self, entry: str) -> str | None:
        """The name of the model that an entry is served as now."""
        return self._name_of.get(entry, entry) if entry in self._taken and entry not in self._without_name else None

    def _owner(self, name: str) -> str | None:
        """The entry that is served under a name now."""
        entry = self._entry_of.get(name, name)
        return entry if self._name(entry) == name else None

    def _release(self, entry: str) -> list[Change]:
        """Give up an entry's name, and look afresh at the entries that wait for it."""
        name = self._name(entry)
        self._without_name.pop(entry, None)
        if name is None:
            return []
        if self._name_of.pop(entry, None) is not None:
            del self._entry_of[name]
        for waiting in [one for one, claimed in self._without_name.items() if claimed == name]:
            del self._without_name[waiting]
            del self._taken[waiting]
        return [Change(name)]

    # Called on the loop.

    async def start(self) -> list[Change]:
        """The models that are there now; those still being copied come by :meth:`watch`.

        Raises:
            NotFound: the root is not a folder.
        """
        if not self.root.is_dir():
            raise NotFound(f"the folder of models {self.root} does not exist")
        for name in _OF_ONE_MODEL:
            if (self.root / name).is_file():
                log.warning(
                    "the folder of models %s holds %s, as a model's own folder does: if it is one, give the folder "
                    "above it, whose entries are models each", self.root, name,
                )  # fmt: skip
        changes = await self._in_thread(0.0, SETTLED_AGE_S)
        return changes + await self._settled()

    async def scan_now(self) -> list[Change]:
        """What has changed, those changes that are complete; waits a moment for what is quite new."""
        return await self._in_thread(ASKED_QUIET_S / 2) + await self._settled()

    async def watch(self, apply: Callable[[list[Change]], None]) -> None:
        """Scan again and again and hand over what changed, until cancelled."""
        while True:
            await asyncio.sleep(max(self._interval_s, self._scan_s / _SCAN_SHARE))
            try:
                changes = await self._in_thread(self._interval_s / 2)
                if changes:
                    apply(changes)
            except Exception:
                log.exception("the folder of models %s could not be followed; trying again", self.root)

    def close(self) -> None:
        """End the scanning thread after the scan it is at."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    async def _settled(self) -> list[Change]:
        if not self._pending:
            return []
        await asyncio.sleep(ASKED_QUIET_S)
        # Half of it, as in watch(): uvloop's timers end up to a millisecond early, and the change would be missed.
        return await self._in_thread(ASKED_QUIET_S / 2)

    async def _in_thread(self, quiet_s: float, settled_age_s: float | None = None) -> list[Change]:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="mmcore-scan")
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: self.scan(quiet_s, settled_age_s=settled_age_s)
        )
