"""How much memory a model takes: a first idea from its files, and what its load has really made the process gain.

The growth is exact where the allocator counts what each thread allocates and frees, as jemalloc does: a model is
loaded in one thread, and what other threads do meanwhile does not count. (``mmcore serve`` starts itself under jemalloc
where that is installed, and has Python take its objects from it too.) Under glibc the whole process is looked at, and
nothing is said when two were measured at once, or when another has just been and took long.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

from mmcore.model import ModelSource

#: What exporters append to an ONNX file's name for its external data (``model.onnx.data``, ``model.onnx_data``).
_WEIGHTS_SUFFIXES: Final = (".data", "_data")


def estimated_size(source: ModelSource, path: Path, *, factor: float, base: int) -> int:
    """Bytes a loaded model takes: what its owner states, else ``factor`` × the bytes on disk at ``path`` + ``base``.

    ``factor`` and ``base`` belong to the format (how far its file expands; what an empty model costs).
    """
    if source.settings.size_bytes is not None:
        return source.settings.size_bytes
    return int(factor * disk_size(path)) + base


def disk_size(path: Path) -> int:
    """Bytes of a file and of the weights kept beside it, or of a folder's regular files."""
    return sum(file.stat().st_size for file in files_of(path))


def files_of(path: Path) -> list[Path]:
    """A model's file with the weights kept beside it, or a folder's regular files, in the order of their names."""
    if path.is_dir():
        return sorted(entry for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink())
    companions = [path.with_name(f"{path.name}{suffix}") for suffix in _WEIGHTS_SUFFIXES]
    if path.suffix == ".xml":  # OpenVINO
        companions.append(path.with_suffix(".bin"))
    return [path, *(file for file in companions if file.is_file())]


#: Freed together, so much is worth the kernel's time.
_TRIMMED_BYTES: Final = 64 * 2**20


def give_back_freed(size: int) -> None:
    """A model of ``size`` bytes has been closed: let glibc give what is free back to the kernel once in a while.

    It takes milliseconds, and other threads wait for memory meanwhile. jemalloc does this by itself, in a thread of its
    own, and then nothing happens here. Called in one thread.
    """
    global _freed_bytes
    _freed_bytes += size
    if _malloc_trim is not None and _freed_bytes >= _TRIMMED_BYTES:
        _freed_bytes = 0
        _malloc_trim(ctypes.c_size_t(0))


class Growth:
    """What the memory taken has grown by between entering and leaving, in one thread.

    Attributes:
        bytes: the growth, negative where memory was given back; None where it cannot be told.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._before = 0
        self._uncounted = 0

    def __enter__(self) -> Self:
        self._uncounted = getattr(_tally, "uncounted", 0)
        self._before = _counter.begin()
        return self

    def __exit__(self, *_: object) -> None:
        after = _counter.end()
        if after is not None:
            self.bytes = after - self._before - (getattr(_tally, "uncounted", 0) - self._uncounted)


@contextmanager
def uncounted() -> Iterator[None]:
    """What grows inside the block is no model's: a framework that is imported."""
    before = _counter.taken()
    try:
        yield
    finally:
        _tally.uncounted = getattr(_tally, "uncounted", 0) + _counter.taken() - before


class _Tally(threading.local):
    uncounted: int
    counters: tuple[ctypes.c_uint64, ctypes.c_uint64]


_tally = _Tally()


class _ThreadCounter:
    """jemalloc's two counters of the calling thread (its manual, ``thread.allocatedp``)."""

    def __init__(self, mallctl: Callable[..., int]) -> None:
        self._mallctl = mallctl

    def taken(self) -> int:
        """Bytes this thread has allocated and not freed; those it has freed for others count as well."""
        try:
            allocated, freed = _tally.counters
        except AttributeError:
            allocated, freed = _tally.counters = (
                self._counter(b"thread.allocatedp"), self._counter(b"thread.deallocatedp")
            )  # fmt: skip
        return allocated.value - freed.value

    def begin(self) -> int:
        return self.taken()

    def end(self) -> int | None:
        return self.taken()

    def _counter(self, name: bytes) -> ctypes.c_uint64:
        pointer = ctypes.POINTER(ctypes.c_uint64)()
        size = ctypes.c_size_t(ctypes.sizeof(pointer))
        if self._mallctl(name, ctypes.byref(pointer), ctypes.byref(size), None, ctypes.c_size_t(0)):
            return ctypes.c_uint64(0)
        return pointer.contents


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks"),
            "keepcost",
        )
    )


#: glibc goes through every free piece of the heap, and whoever needs memory waits meanwhile: microseconds in a new
#: process, 5 ms with 20,000 models. A pause of so many times as long keeps it from being what loads mostly do.
_PAUSES: Final = 20
_QUICK_S: Final = 100e-6


class _ProcessCounter:
    """What glibc has given out to the whole process (mallinfo2(3)).

    One measurement at a time can be trusted, and where each takes long not all are made.
    """

    def __init__(self, mallinfo2: Callable[[], _Mallinfo2], clock: Callable[[], float] = time.perf_counter) -> None:
        self._mallinfo2 = mallinfo2
        self._clock = clock
        self._lock = threading.Lock()
        self._running = 0
        self._disturbed = False
        self._next_at = clock()

    def taken(self) -> int:
        """Bytes in use."""
        began = self._clock()
        info = self._mallinfo2()
        ended = self._clock()
        took = ended - began
        self._next_at = ended + (_PAUSES * took if took > _QUICK_S else 0)
        return int(info.uordblks + info.hblkhd)

    def begin(self) -> int:
        with self._lock:
            self._running += 1
            self._disturbed = self._running > 1 or self._clock() < self._next_at
            if self._disturbed:
                return 0
        return self.taken()

    def end(self) -> int | None:
        with self._lock:
            self._running -= 1
            trusted = not self._disturbed
            if self._running == 0:
                self._disturbed = False
        return self.taken() if trusted else None


class _NoCounter:
    """Where nothing counts, or where Python keeps its objects out of the count."""

    def taken(self) -> int:
        return 0

    def begin(self) -> int:
        return 0

    def end(self) -> int | None:
        return None


def _choose() -> _ThreadCounter | _ProcessCounter | _NoCounter:
    library = ctypes.CDLL(None)
    mallctl = getattr(library, "mallctl", None)
    # Python's own allocator maps memory for small objects by itself; it has given out no blocks where it is not used.
    if sys.getallocatedblocks() > 0:
        return _NoCounter()
    if mallctl is not None:
        return _ThreadCounter(mallctl)
    mallinfo2 = getattr(library, "mallinfo2", None)
    if mallinfo2 is None:
        return _NoCounter()
    mallinfo2.restype = _Mallinfo2
    return _ProcessCounter(mallinfo2)


_counter: Final = _choose()
_freed_bytes = 0
_malloc_trim: Final = None if hasattr(ctypes.CDLL(None), "mallctl") else getattr(ctypes.CDLL(None), "malloc_trim", None)
