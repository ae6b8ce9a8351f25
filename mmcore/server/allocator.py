"""Which allocator a serving process takes its memory from, and what that does with what is freed.

``mmcore serve`` starts itself again under jemalloc where that is installed, with Python's small objects in it too, but
not where OpenVINO is: its libraries look for malloc past any that is preloaded, and free what came from the other. Of
the allocators tried (glibc, jemalloc 5.3, mimalloc 2.0, with 400 mixed models) it is the one that counts what each
thread takes, so that a model's size is what its load took, whatever other threads did meanwhile; it gives back what
models took some seconds after they are unloaded, by a thread of its own, where glibc does so only on request and holds
others up meanwhile. mimalloc gave nothing back.

Under glibc freed memory is kept up to a bound. Left alone, it hands the top of the heap back to the kernel as soon as a
large tensor is freed and takes it anew for the next one: for two buffers of 600 KB that is 300 µs of page faults in
each request, twenty times the copy itself. Arrays above the threshold, as large models' weights are, still have
mappings of their own, which go back to the kernel when they are freed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Final

# malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

#: The largest block taken from the heap: any tensor of a message within the default limit.
LARGEST_ON_HEAP_BYTES: Final = 16 * 2**20
#: What the heap's free top may hold before it goes back to the kernel.
KEPT_BYTES: Final = 64 * 2**20

_LIBRARIES: Final = ("/usr/lib", "/usr/local/lib", "/usr/lib64", "/opt/conda/lib")
_NAME: Final = "libjemalloc.so.2"
_PURGE_ALL: Final = b"arena.4096.purge"  # MALLCTL_ARENAS_ALL
#: Freed pages are kept for the next request for so long, then given back by a thread of its own; few arenas, since a
#: page kept in one is of no use to the others.
_JEMALLOC: Final = "narenas:4,background_thread:true,dirty_decay_ms:5000,muzzy_decay_ms:0"


def choose_allocator() -> None:
    """Start this process again with the same arguments under the allocator that serves best; the pid stays.

    Returns where that has been done, or where LD_PRELOAD or PYTHONMALLOC is set, to whatever: then somebody has chosen.
    Without jemalloc, or with OpenVINO, Python's objects are taken from glibc, so that it counts them.
    """
    if "LD_PRELOAD" in os.environ or "PYTHONMALLOC" in os.environ:
        return
    environment = {**os.environ, "PYTHONMALLOC": "malloc"}
    library = find_jemalloc() if importlib.util.find_spec("openvino") is None else None
    if library is not None:
        environment["LD_PRELOAD"] = str(library)
        environment.setdefault("MALLOC_CONF", _JEMALLOC)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606  # this very command


def find_jemalloc(folders: tuple[str, ...] = _LIBRARIES) -> Path | None:
    """The library, where a distribution's package puts it; None where it is not installed."""
    for folder in map(Path, folders):
        for found in (folder / _NAME, *sorted(folder.glob(f"*-linux-gnu/{_NAME}"))):
            if found.exists():
                return found
    return None


def release_freed_memory() -> None:
    """Give back at once what starting has freed, where the allocator is jemalloc."""
    mallctl = getattr(ctypes.CDLL(None), "mallctl", None)
    if mallctl is not None:
        mallctl(_PURGE_ALL, None, None, None, ctypes.c_size_t(0))


def keep_freed_memory() -> None:
    """Let this process keep freed memory for the next request, where its allocator is glibc's."""
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is not None and not hasattr(library, "mallctl"):
        mallopt(_M_MMAP_THRESHOLD, LARGEST_ON_HEAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
