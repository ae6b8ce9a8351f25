"""Downloads of a model's objects: many at once, large ones in parts, checked, and taken up again where they broke.

A download is driven by threads of its own, which end with it. Whatever fails for the moment is asked for again after a
pause, from the byte it stopped at; a bounded number of times without progress, and never past the deadline.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from mmcore.errors import Cancelled, LoadFailed
from mmcore.storage.cancellation import Cancellation, ended_by, heeding
from mmcore.storage.digests import Digest, begin, joined, of_pieces
from mmcore.storage.remote import Blob, Changed, Interrupted, Remote

if TYPE_CHECKING:
    # It needs a package that is there for those alone who pull from a remote store.
    from mmcore.storage.connections import Connections

ResultT = TypeVar("ResultT")

#: By the name of each file: where its parts begin, and how far they have come.
Left = Mapping[str, Sequence[tuple[int, int]]]

#: Objects above it are asked for in parts of about that size.
PART_BYTES: Final = 16 * 2**20
_MAX_PAUSE_S: Final = 5.0
_SUM_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class PullLimits:
    """How long a pull may take and how hard it tries; times in seconds.

    Attributes:
        threads: requests at once for one model.
        connect_s: for a connection to be there.
        silence_s: in which a store may send nothing, or nearly nothing.
        tries: requests in a row for the same bytes that bring none.
        pause_s: before the second of them; each pause is twice the one before.
        total_s: for one model's whole pull.
    """

    threads: int = 8
    connect_s: float = 10.0
    silence_s: float = 20.0
    tries: int = 6
    pause_s: float = 0.2
    total_s: float = 1800.0

    #: What must come within ``silence_s``, and what counts as progress.
    least_bytes: int = 64 * 2**10


class Progress(Protocol):
    """Is told how a pull goes on, from several threads."""

    def started(self, what: str, files: int, total_bytes: int | None) -> None:
        """The files are known; bytes are, where the store tells all sizes."""

    def received(self, count: int) -> None:
        """So many bytes more have come."""

    def ended(self) -> None:
        """The pull is over, well or not."""


class Watch:
    """One pull's clock: whether it may go on, and how far it is."""

    def __init__(
        self, limits: PullLimits, progress: Progress, *cancelled: Cancellation, clock: Callable[[], float]
    ) -> None:
        self.limits = limits
        self.progress = progress
        self.received = 0
        self.clock = clock
        self._cancelled = cancelled
        self._deadline = clock() + limits.total_s
        self._lock = threading.Lock()

    def check(self) -> None:
        """Return when the pull may go on.

        Raises:
            Cancelled: nobody wants it any more.
            LoadFailed: its time is over.
        """
        if any(one.is_set for one in self._cancelled):
            raise Cancelled("the pull was cancelled")
        if self.clock() > self._deadline:
            raise LoadFailed(f"timeout: the files were not there after {self.limits.total_s:g} s")

    def pause(self, seconds: float) -> None:
        """Wait, and look up now and then; raises as :meth:`check` does."""
        until = self.clock() + seconds
        while (left := until - self.clock()) > 0:
            self.check()
            time.sleep(min(left, 0.05))
        self.check()

    def add(self, count: int) -> None:
        """Count bytes that have come."""
        with self._lock:
            self.received += count
        self.progress.received(count)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Inside the block this thread waits for no store once the pull is cancelled."""
        with heeding(*self._cancelled):
            yield

    def again(self, call: Callable[[], ResultT]) -> ResultT:
        """The result of ``call``, made again while it is interrupted, so many times.

        Raises:
            LoadFailed: it still was the last time.
        """
        failed = 0
        while True:
            self.check()
            try:
                with self.heeded():
                    return call()
            except Interrupted as error:
                failed += 1
                self.back_off(failed, error)

    def back_off(self, failed: int, error: Interrupted) -> None:
        """Pause after the ``failed``-th try in a row.

        Raises:
            LoadFailed: it was the last one.
        """
        self.check()
        if failed >= self.limits.tries:
            raise LoadFailed(f"{error}; tried {failed} times") from None
        longest = min(self.limits.pause_s * 2 ** (failed - 1), _MAX_PAUSE_S)
        # Many pulls that broke together are not to come back together.
        self.pause(longest * random.uniform(0.5, 1.0))  # noqa: S311


class _File:
    """One object on its way to a file: its open parts, and the digests of what has come."""

    def __init__(self, blob: Blob, path: Path, digest: Digest | None, *, new: bool) -> None:
        self.blob = blob
        self.path = path
        self.digest = digest
        self._new = new
        self.descriptor = -1
        self.parts: list[_Part] = []
        self.left = 0
        #: By number: the digest of each piece that the object was uploaded in.
        self.pieces: dict[int, bytes] = {}
        #: Of a digest that needs all bytes in order: that of the first so many; who holds the lock goes on with it.
        self.in_order = begin(digest.algorithm) if digest is not None and not (digest.pieces or digest.joins) else None
        self.summed = 0
        self.summing = threading.Lock()
        #: The listed digest turned out to be none of the bytes.
        self.unchecked = False
        self.lock = threading.Lock()

    def open(self) -> None:
        """Have the descriptor; the file is made by the first who asks, unless an earlier download may have left it."""
        with self.lock:
            if self.descriptor < 0:
                flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if self._new else 0)
                self.descriptor = os.open(self.path, flags, 0o644)

    def sum_up(self, *, wait: bool) -> None:
        """Bring the digest to the first byte that is missing; while another thread does, wait for it or leave it to it.

        What was just written is in memory, so reading it again costs little, and the parts need not come in order.
        """
        if self.in_order is None or not self.summing.acquire(blocking=wait):
            return
        try:
            while count := min(_SUM_BYTES, self._missing() - self.summed):
                self.in_order.update(os.pread(self.descriptor, count, self.summed))
                self.summed += count
        finally:
            self.summing.release()

    def _missing(self) -> int:
        return next((part.at for part in self.parts if not part.done), self.parts[-1].at)

    def found(self) -> str | None:
        """The digest of what has come, where all of it has; None where there is none to compare it with."""
        if self.digest is None:
            return None
        if self.in_order is not None:
            self.sum_up(wait=True)
            return self.in_order.digest().hex()
        if self.digest.joins:
            return joined(self.digest.algorithm, [(part.sum, part.at - part.start) for part in self.parts])
        return of_pieces(self.digest.algorithm, [self.pieces[number] for number in sorted(self.pieces)])

    def found_in(self, sizes: Iterable[int]) -> str:
        """The digest of pieces that have these sizes, read once more."""
        assert self.digest is not None
        digests, at = [], 0
        for size in sizes:
            piece, end = begin(self.digest.algorithm), at + size
            while at < end and (chunk := os.pread(self.descriptor, min(_SUM_BYTES, end - at), at)):
                piece.update(chunk)
                at += len(chunk)
            digests.append(piece.digest())
        return of_pieces(self.digest.algorithm, digests)

    def close(self) -> None:
        """Close the descriptor if it is open."""
        with self.lock:
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1


class _Part:
    """Bytes of a file from ``at`` to ``stop``, which is None while the size is not known; they come in order.

    ``left`` is how far an earlier download has come. ``sum`` is that of its bytes, or of the last of the pieces the
    object was uploaded in, where that is what the object is checked by.
    """

    def __init__(self, file: _File, start: int, stop: int | None, left: int = 0) -> None:
        self.file = file
        self.start = self.at = start
        self.stop = stop
        self.left = left
        self.whole = start == 0 and stop == file.blob.size
        self.sum = begin(file.digest.algorithm if file.digest is not None else "md5")

    @property
    def done(self) -> bool:
        """Whether all bytes are there."""
        return self.stop is not None and self.at >= self.stop

    def recall(self) -> bool:
        """Sum up more of what an earlier download has left; false when that is done."""
        chunk = os.pread(self.file.descriptor, min(_SUM_BYTES, max(0, self.left - self.at)), self.at)
        self._count(memoryview(chunk))
        return bool(chunk)

    def take(self, chunk: bytes) -> None:
        """Write the next bytes and sum them up."""
        view = memoryview(chunk)
        while view:
            written = os.pwrite(self.file.descriptor, view, self.at)
            self._count(view[:written])
            view = view[written:]

    def _count(self, view: memoryview) -> None:
        digest = self.file.digest
        if digest is None or not digest.pieces:
            if digest is not None and digest.joins:
                self.sum.update(view)
            self.at += len(view)
            self.file.sum_up(wait=False)
            return
        piece = digest.piece_bytes
        while view:
            left = view[: piece - self.at % piece]
            self.sum.update(left)
            self.at += len(left)
            view = view[len(left) :]
            if self.at % piece == 0 or self.at == self.file.blob.size:
                self.file.pieces[(self.at - 1) // piece] = self.sum.digest()
                self.sum = begin(digest.algorithm)


class Transfer:
    """One model's download; :meth:`run` does it, once.

    ``take`` is called with the number of bytes that come beyond what the store's listing told. ``left`` is what an
    earlier download of the same objects has :attr:`left` in the folder.
    """

    def __init__(
        self,
        remote: Remote,
        connections: Connections,
        watch: Watch,
        *,
        take: Callable[[int], None],
        left: Left | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._remote = remote
        self._connections = connections
        self._watch = watch
        self._take = take
        self._left = left or {}
        self._part_bytes = part_bytes
        self._files: list[_File] = []
        self._parts: deque[_Part] = deque()
        self._failure: BaseException | None = None

    def run(self, blobs: list[Blob], folder: Path) -> None:
        """Bring every object to its place below ``folder``, checked and on the disk for good.

        Raises:
            LoadFailed: an object cannot be had, or is not what was listed; the text tells the cause.
            Changed: an object changed on the way.
            Cancelled: nobody wants it any more.
            OSError: the disk is full, or cannot be written to.
        """
        for parent in {(folder / blob.name).parent for blob in blobs}:
            parent.mkdir(parents=True, exist_ok=True)
        asked = [blob for blob in blobs if blob.asks]
        with ThreadPoolExecutor(self._watch.limits.threads, thread_name_prefix="mmcore-pull") as asking:
            digests = dict(zip(asked, asking.map(self._digest, asked), strict=True))
        for blob in blobs:
            digest = digests[blob] if blob.asks else blob.digest
            self._plan(_File(blob, folder / blob.name, digest, new=not self._left))
        threads = [
            threading.Thread(target=self._work, name=f"mmcore-pull-{number}", daemon=True)
            for number in range(min(self._watch.limits.threads, len(self._parts)) - 1)
        ]
        for thread in threads:
            thread.start()
        self._work()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt as error:
            self._failure = error
            for thread in threads:
                thread.join()
        for file in self._files:
            file.close()
        if self._failure is not None:
            raise self._failure

    @property
    def left(self) -> Left:
        """What has come so far, for a later download of the same objects; nothing where it would not be worth it."""
        if not self._files:
            return self._left
        came = {
            file.blob.name: [(part.start, max(part.at, part.left)) for part in file.parts]
            for file in self._files
            if file.blob.size is not None and file.blob.ranges
        }
        known = all(file.blob.version or file.blob.content for file in self._files)
        count = sum(at - start for parts in came.values() for start, at in parts)
        return came if known and count >= self._watch.limits.least_bytes else {}

    def _plan(self, file: _File) -> None:
        """Cut a file into parts; along the pieces it was uploaded in, where these are checked one by one."""
        size, step = file.blob.size, self._part_bytes
        if file.digest is not None and file.digest.pieces:
            step = max(1, step // file.digest.piece_bytes) * file.digest.piece_bytes
        if size is None or not file.blob.ranges or size <= step:
            spans: list[tuple[int, int | None]] = [(0, size)]
        else:
            spans = [(start, min(start + step, size)) for start in range(0, size, step)]
        left = dict(self._left.get(file.blob.name, ()))
        file.parts = parts = [_Part(file, start, stop, min(left.get(start, 0), stop or 0)) for start, stop in spans]
        if file.digest is not None and file.digest.algorithm == "md5":
            # A byte is always asked for: what it comes with tells whether the digest is one of the bytes.
            parts[-1].left = min(parts[-1].left, (parts[-1].stop or 1) - 1)
        file.left = len(parts)
        self._files.append(file)
        self._parts.extend(parts)

    def _digest(self, blob: Blob) -> Digest | None:
        return self._watch.again(lambda: self._remote.digest(blob))

    def _work(self) -> None:
        """In every thread: bring one part after the other, until all are there or one failed."""
        try:
            while self._failure is None:
                try:
                    part = self._parts.popleft()
                except IndexError:
                    return
                self._bring(part)
        except BaseException as error:
            if self._failure is None:
                self._failure = error

    def _bring(self, part: _Part) -> None:
        file = part.file
        file.open()
        while part.recall():
            self._watch.check()
        failed = 0
        while not part.done:
            before = part.at
            try:
                self._receive(part)
            except Interrupted as error:
                failed = 1 if part.at - before >= self._watch.limits.least_bytes else failed + 1
                self._watch.back_off(failed, error)
        with file.lock:
            file.left -= 1
            last = not file.left
        if last:
            self._finish(file)

    def _receive(self, part: _Part) -> None:
        """Ask for the rest of a part and take it.

        Raises:
            Interrupted: not all of it came.
        """
        blob, watch = part.file.blob, self._watch
        what = self._what(blob)
        # Without a range an old server's whole object is as good.
        stop = None if part.whole and part.at == 0 else part.stop
        with (
            watch.heeded(),
            self._connections.get(self._remote.request(blob), what, start=part.at, stop=stop) as answer,
            ended_by(answer.end),
        ):
            if blob.size is not None and answer.size not in (None, blob.size):
                raise Changed(f"{what} was changed while it was pulled")
            digest = part.file.digest
            if digest is not None and digest.algorithm == "md5" and not self._remote.checks(answer.headers):
                part.file.unchecked = True
            since, seen = watch.clock(), part.at
            for chunk in answer.chunks():
                if self._failure is not None:
                    raise Cancelled("another object of the model failed")
                # Before it is taken: an answer that was ended may give what is not the object's.
                watch.check()
                if blob.size is None:
                    self._take(len(chunk))
                elif part.at + len(chunk) > blob.size:
                    raise Changed(f"{what} was changed while it was pulled")
                part.take(chunk)
                watch.add(len(chunk))
                if watch.clock() - since > watch.limits.silence_s:
                    if part.at - seen < watch.limits.least_bytes:
                        raise Interrupted(f"{what}: timeout: the store sends next to nothing")
                    since, seen = watch.clock(), part.at
            if part.stop is None and answer.size in (None, part.at):
                part.stop = part.at
            if not part.done:
                raise Interrupted(f"{what}: the connection ended after {part.at} of {part.stop or answer.size} bytes")

    def _finish(self, file: _File) -> None:
        """Check a file that is whole, and have it written for good.

        Raises:
            LoadFailed: it is not what the store said it would be.
        """
        # For an empty object nothing was asked, so nothing has told what its digest is of.
        digest = None if file.unchecked or file.blob.size == 0 else file.digest
        if digest is not None and (found := file.found()) != digest.value and not self._fits_otherwise(file, digest):
            raise LoadFailed(
                f"{self._what(file.blob)}: what came has the checksum {found}, the store says {digest.value}"
            )
        os.fsync(file.descriptor)
        file.close()

    def _fits_otherwise(self, file: _File, digest: Digest) -> bool:
        """Whether the digest is right for pieces of different sizes, each of which the store is asked for."""
        if not digest.pieces:
            return False
        sizes = []
        for size in self._remote.piece_sizes(file.blob, digest.pieces):
            self._watch.check()
            sizes.append(size)
        different = any(size != digest.piece_bytes for size in sizes[:-1])
        return different and sum(sizes) == file.blob.size and file.found_in(sizes) == digest.value

    def _what(self, blob: Blob) -> str:
        return f"{self._remote.where}/{blob.key}"
