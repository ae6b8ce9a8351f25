"""Memory that the serving process and one worker share, for tensors too large for a socket.

The serving process makes it and decides its size; a seal keeps the worker from shrinking it, which would be a bus error
for whoever reads it. It has no name in any file system and is gone with its last user.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

#: From linux/fcntl.h; Python 3.11's fcntl module lacks some of them depending on the headers it was built with.
_F_ADD_SEALS: Final = 1033
_F_SEAL_SEAL: Final = 1
_F_SEAL_SHRINK: Final = 2

_SMALLEST_BYTES: Final = 2**20
#: Pages beyond are given back after each use: a single large request is not to be paid for ever after.
_RETAINED_BYTES: Final = 16 * 2**20


class Segment:
    """One side's view of the shared memory; ``size`` is 0 until there was something to share."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = 0
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls) -> Segment:
        """A new, empty one that cannot be shrunk any more."""
        fd = os.memfd_create("mmcore-tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_SEAL)
        return cls(fd)

    def grow(self, size: int) -> None:
        """Make it at least ``size`` bytes long; the serving process's side."""
        if size > self.size:
            wanted = max(_SMALLEST_BYTES, 1 << (size - 1).bit_length())
            os.ftruncate(self.fd, wanted)
            self._remap(wanted)

    def follow(self) -> None:
        """Take in what the other side has made of its size; the worker's side."""
        found = os.fstat(self.fd).st_size
        if found > self.size:
            self._remap(found)

    def memory(self) -> mmap.mmap:
        """The mapped memory, ``size`` bytes; not to be kept beyond the next call of another method."""
        assert self._map is not None
        return self._map

    def trim(self, used: int) -> None:
        """Give memory back to the machine after ``used`` bytes were needed and are not any more."""
        if used > _RETAINED_BYTES and self._map is not None:
            self._map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Let go of it."""
        self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _remap(self, size: int) -> None:
        # The old one is unmapped when the last array over it is gone.
        self._map = mmap.mmap(self.fd, size)
        self.size = size
