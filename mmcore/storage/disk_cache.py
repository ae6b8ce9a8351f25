"""Pulled models on the local disk, kept by what they are, up to a limit of bytes.

Every entry is a folder named by the digest of a listing; it appears in one step when its files are whole. The cache
may be shared by several processes, which agree by file locks; what a process that ended left half done is removed.

    entries/DIGEST/files/      a model, and entry.json with its size, whose time is that of its last use
    making/DIGEST/, .lock      one that is being pulled; without a lock it is what one that was given up has left
    leases/PROCESS/DIGEST      what a living process uses, and never goes; PROCESS.lock is held while it lives
    gone/                      what is being deleted
    lock                       held for moments, and tells what entries and pulls take together
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from mmcore.errors import LoadFailed

log = logging.getLogger(__name__)

#: How often another's pull of the same content is looked at.
_POLL_S: Final = 0.05
#: Evicting reads every entry, so it removes at least this share of them at once.
_EVICT_SHARE: Final = 0.02
#: Unexpected bytes are set aside in steps.
_STEP: Final = 2**20
#: The limit when none is given: this share of what entries take and the file system has free.
DEFAULT_SHARE: Final = 0.5
_ENTRY: Final = "entry.json"
#: In the folder of one in the making: what a pull that was given up has left in it.
_LEFT: Final = "left.json"


class Waits(Protocol):
    """How somebody waits for an entry that another makes."""

    def pause(self, seconds: float) -> None:
        """Wait so long, or raise because it has been too long."""


class Lease:
    """Keeps an entry from eviction for as long as anybody holds this object."""

    __slots__ = ("_cache", "digest")

    def __init__(self, cache: DiskCache, digest: str) -> None:
        self._cache = cache
        self.digest = digest

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """What it is in another process, to which the files are not leased: nothing."""
        return object, ()

    def __del__(self) -> None:
        self._cache.give_back(self.digest)


class Room:
    """The place of an entry in the making, and the bytes it may have.

    Attributes:
        folder: a folder for the files; empty where ``left`` is None.
        reserved: bytes set aside for them.
        left: what was told of the files there when they were kept.
        kept: set to something JSON can hold, the files are kept for whoever makes the entry next, while there is space.
    """

    def __init__(self, cache: DiskCache, folder: Path, reserved: int, left: Any = None) -> None:
        self.folder = folder
        self.reserved = reserved
        self.left = left
        self.kept: Any = None
        self._cache = cache
        self._left = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Use so many bytes that were not expected.

        Raises:
            LoadFailed: the cache has no room for them.
        """
        with self._lock:
            while self._left < count:
                self._cache.reserve(_STEP)
                self.reserved += _STEP
                self._left += _STEP
            self._left -= count


class DiskCache:
    """The entries in ``folder``, which is made with the first of them; together at most ``limit_bytes``.

    Without a limit it is half of what they have and the file system has free, when the folder is first needed.
    All calls block, may come from any thread, and raise OSError where the disk cannot be written to.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.folder = folder
        self._limit = limit_bytes
        self._mutex = threading.Lock()
        self._lock_file = -1
        self._alive_file = -1
        self._me = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._leases: dict[str, int] = {}
        self._returned: deque[str] = deque()

    # What is there.

    def lease(self, digest: str) -> Lease | None:
        """A lease of the entry, which counts as used now; None when there is none."""
        with self._locked():
            return self._lease(digest)

    def files(self, digest: str) -> Path:
        """The folder of an entry's files."""
        return self._entry(digest) / "files"

    @property
    def used_bytes(self) -> int:
        """What entries and running pulls of all processes take."""
        with self._locked():
            return self._bytes()

    @property
    def limit_bytes(self) -> int:
        """What they may take."""
        with self._locked():
            assert self._limit is not None
            return self._limit

    def give_back(self, digest: str) -> None:
        """Return one lease: from the end of its object, so at any moment and in any thread."""
        self._returned.append(digest)
        # The thread may be the one that holds it; then this is noted with the next call.
        if self._mutex.acquire(blocking=False):
            try:
                self._note_returned()
            finally:
                self._mutex.release()

    def _entry(self, digest: str) -> Path:
        return self.folder / "entries" / digest

    def _lease(self, digest: str) -> Lease | None:
        try:
            os.utime(self._entry(digest) / _ENTRY)
        except FileNotFoundError:
            return None
        if digest not in self._leases:
            (self.folder / "leases" / self._me / digest).touch()
        self._leases[digest] = self._leases.get(digest, 0) + 1
        return Lease(self, digest)

    def _note_returned(self) -> None:
        while self._returned:
            digest = self._returned.popleft()
            self._leases[digest] -= 1
            if not self._leases[digest]:
                del self._leases[digest]
                with contextlib.suppress(OSError):
                    (self.folder / "leases" / self._me / digest).unlink(missing_ok=True)

    # What is made.

    @contextmanager
    def making(self, digest: str, size: int, watch: Waits) -> Iterator[Room | Lease]:
        """Room for an entry of ``size`` bytes, which is published when the context ends well.

        While somebody else makes it this waits; a lease is given instead of room when it is there.

        Raises:
            LoadFailed: the entry is larger than the limit, or what is in use leaves no room.
        """
        with self._alone(digest, watch):
            found = self.lease(digest)
            if found is not None:
                yield found
                return
            made = self.folder / "making" / digest
            room = self._taken_up(made)
            if room is None:
                self.reserve(size)
                room = Room(self, made / "files", size)
            try:
                if room.left is None:
                    shutil.rmtree(made, ignore_errors=True)
                    room.folder.mkdir(parents=True)
                yield room
                taken = _settle(made)
                with self._locked():
                    # After a crash of the machine an entry may be gone, which does no harm, but it is never there
                    # without its files: these and their folders are on the disk before the name is.
                    made.rename(self._entry(digest))
                    self._count(taken - room.reserved)
                    room.reserved = 0
                    room.kept = None
            finally:
                if room.kept:
                    with self._locked():
                        (made / _LEFT).write_text(json.dumps({"bytes": room.reserved, "left": room.kept}))
                elif room.reserved or made.exists():
                    shutil.rmtree(made, ignore_errors=True)
                    with self._locked():
                        self._count(-room.reserved)

    def _taken_up(self, made: Path) -> Room | None:
        """The room of a pull that was given up, its bytes still set aside; None where there is none."""
        with self._locked():
            try:
                told = json.loads((made / _LEFT).read_bytes())
                (made / _LEFT).unlink()
                return Room(self, made / "files", told["bytes"], told["left"])
            except FileNotFoundError:
                return None

    @contextmanager
    def _alone(self, digest: str, watch: Waits) -> Iterator[None]:
        """Be the only one of all threads and processes to make an entry; a file's lock, which ends with its process."""
        with self._locked():
            # The folders are there now.
            path = self.folder / "making" / f"{digest}.lock"
        while True:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            if _try_lock(descriptor) and _is_at(descriptor, path):
                break
            os.close(descriptor)
            watch.pause(_POLL_S)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)

    def reserve(self, count: int) -> None:
        """Set bytes aside, evicting what was used least recently and by nobody now.

        Raises:
            LoadFailed: there is no room for them.
        """
        gone: list[Path] = []
        with self._locked():
            assert self._limit is not None
            taken = self._bytes()
            over = taken + count - self._limit
            fits = over <= 0
            if not fits and count <= self._limit:
                gone, freed = self._evict(over)
                taken -= freed
                fits = freed >= over
            if fits:
                self._count(count)
        for path in gone:
            shutil.rmtree(path, ignore_errors=True)
        if not fits:
            raise LoadFailed(
                f"the model cache {self.folder} has no room for {count} bytes: its limit is {self._limit} bytes, of "
                f"which {taken} are taken; give it more with --model-cache-limit"
            )

    def _evict(self, size: int) -> tuple[list[Path], int]:
        """Take out at least ``size`` bytes; what is to be deleted, and its bytes; nothing if too few.

        What pulls that were given up have left goes before any entry.
        """
        leased = {one.name for one in (self.folder / "leases").glob("*/*")}
        entries = [(0, one) for one in (self.folder / "making").glob(f"*/{_LEFT}")]
        for entry in (self.folder / "entries").iterdir():
            if entry.name not in leased:
                with contextlib.suppress(FileNotFoundError):
                    entries.append(((entry / _ENTRY).stat().st_mtime_ns, entry / _ENTRY))
        entries.sort()
        chosen: list[Path] = []
        freed = 0
        for _, book in entries:
            if freed >= size and len(chosen) >= len(entries) * _EVICT_SHARE:
                break
            freed += _taken(book) or 0
            chosen.append(book.parent)
        if freed < size:
            return [], 0
        gone = [self.folder / "gone" / f"{entry.name}-{secrets.token_hex(4)}" for entry in chosen]
        for entry, target in zip(chosen, gone, strict=True):
            entry.rename(target)
        self._count(-freed)
        log.info("evicted %d models from the cache %s, %d bytes", len(gone), self.folder, freed)
        return gone, freed

    def close(self) -> None:
        """Give up every lease and the files that are open; the next call opens them again."""
        with self._mutex:
            for descriptor in (self._lock_file, self._alive_file):
                if descriptor >= 0:
                    os.close(descriptor)
            self._lock_file = self._alive_file = -1
            leases = self.folder / "leases"
            shutil.rmtree(leases / self._me, ignore_errors=True)
            with contextlib.suppress(OSError):
                (leases / f"{self._me}.lock").unlink(missing_ok=True)

    # The lock, and what it guards.

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Held for a moment, by one thread of one process at a time."""
        with self._mutex:
            if self._lock_file < 0 or not _is_at(self._lock_file, self.folder / "lock"):
                self._open()
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            try:
                self._note_returned()
                yield
            finally:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _bytes(self) -> int:
        return int(os.pread(self._lock_file, 32, 0) or b"0")

    def _count(self, change: int) -> None:
        os.pwrite(self._lock_file, b"%32d" % max(0, self._bytes() + change), 0)

    def _open(self) -> None:
        """Make the folders, say that this process lives, and clean up after those that do not."""
        for name in ("entries", "making", "gone", f"leases/{self._me}"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for descriptor in (self._lock_file, self._alive_file):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock_file = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        try:
            path = self.folder / "leases" / f"{self._me}.lock"
            self._alive_file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._alive_file, fcntl.LOCK_EX)
            for kind in ("leases", "making"):
                for lock in (self.folder / kind).glob("*.lock"):
                    _remove_if_dead(lock)
            others = [one for one in (self.folder / "leases").glob("*.lock") if one.stem != self._me]
            if not others:
                # Nobody else counts: what a process that ended had set aside is known to be free.
                for gone in (self.folder / "gone").iterdir():
                    shutil.rmtree(gone, ignore_errors=True)
                # The disk may have lost some of what was never flushed.
                for made in (self.folder / "making").iterdir():
                    if not made.with_name(f"{made.name}.lock").exists():
                        shutil.rmtree(made, ignore_errors=True)
                self._count(sum(map(_count_or_remove, (self.folder / "entries").iterdir())) - self._bytes())
            if self._limit is None:
                free = shutil.disk_usage(self.folder).free
                self._limit = int((free + self._bytes()) * DEFAULT_SHARE)
        finally:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)


def _settle(made: Path) -> int:
    """Write what is around an entry's files for good; the bytes of these."""
    total = 0
    for folder, _, names in os.walk(made / "files"):
        total += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)  # noqa: PTH118
        _sync(Path(folder))
    # Not flushed: an entry whose bytes cannot be told is removed at the next start.
    (made / _ENTRY).write_text(json.dumps({"bytes": total}))
    _sync(made)
    return total


def _count_or_remove(entry: Path) -> int:
    """The bytes of an entry; one that does not say them is removed."""
    taken = _taken(entry / _ENTRY)
    if taken is None:
        shutil.rmtree(entry, ignore_errors=True)
    return taken or 0


def _taken(book: Path) -> int | None:
    """The bytes that are told in the file of an entry; None where it tells none."""
    try:
        return int(json.loads(book.read_bytes())["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still is the one of that name."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _remove_if_dead(lock: Path) -> None:
    """Remove a lock file that no process holds, and the folder it stood for."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if _try_lock(descriptor):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
