"""System shared memory: the named regions a client has registered, and bytes in and out of them.

A region is an object of POSIX shared memory (``shm_open``), which Linux keeps as a file under ``/dev/shm``. Bytes are
copied with ``pread`` and ``pwrite`` instead of being mapped: the client owns the object and may truncate it at any
moment, which a mapping would answer with SIGBUS, and the copy is cheap beside what the wire would have cost.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from mmcore.errors import AlreadyExists, InvalidRequest, NotFound

SHM_FOLDER: Final = Path("/dev/shm")  # noqa: S108  # where Linux keeps POSIX shared memory, not a temporary file
_NAME_LIMIT: Final = 255


class Region:
    """One registered window onto a shared memory object. Close it when it is unregistered."""

    __slots__ = ("byte_size", "descriptor", "key", "name", "offset")

    def __init__(self, name: str, key: str, offset: int, byte_size: int, descriptor: int) -> None:
        self.name = name
        self.key = key
        self.offset = offset
        self.byte_size = byte_size
        self.descriptor = descriptor

    def read(self, offset: int, byte_size: int) -> bytes:
        """``byte_size`` bytes from ``offset`` into the region.

        Raises:
            InvalidRequest: the range leaves the region, or the object has been truncated since.
        """
        self.check(offset, byte_size)
        data = os.pread(self.descriptor, byte_size, self.offset + offset)
        while len(data) < byte_size:
            more = os.pread(self.descriptor, byte_size - len(data), self.offset + offset + len(data))
            if not more:
                raise InvalidRequest(
                    f"shared memory region '{self.name}' holds {len(data)} of the {byte_size} bytes at offset "
                    f"{offset}: its object '{self.key}' was truncated"
                )
            data += more
        return data

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put ``data`` at ``offset`` into the region.

        Raises:
            InvalidRequest: the range leaves the region, or the object has been truncated since.
        """
        view = memoryview(data).cast("B")
        self.check(offset, len(view))
        # pwrite would quietly grow an object that its owner has truncated.
        if os.fstat(self.descriptor).st_size < self.offset + offset + len(view):
            raise InvalidRequest(f"shared memory region '{self.name}': its object '{self.key}' was truncated")
        written = 0
        while written < len(view):
            written += os.pwrite(self.descriptor, view[written:], self.offset + offset + written)

    def check(self, offset: int, byte_size: int) -> None:
        """Raise InvalidRequest for a range that leaves the region."""
        if offset < 0 or byte_size < 0 or offset + byte_size > self.byte_size:
            raise InvalidRequest(
                f"{byte_size} bytes at offset {offset} leave shared memory region '{self.name}' "
                f"of {self.byte_size} bytes"
            )

    def close(self) -> None:
        """Give the object back; the region is unusable afterwards."""
        os.close(self.descriptor)


class SharedMemory:
    """The regions of this instance, by name.

    Calls are made from the loop's thread. A region unregistered while a request that uses it waits for its model is
    gone for that request: it is looked up when the bytes are needed.
    """

    def __init__(self, folder: Path = SHM_FOLDER) -> None:
        self._folder = folder
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open the object ``key`` and keep ``byte_size`` bytes of it from ``offset`` as region ``name``.

        Raises:
            AlreadyExists: the name is taken.
            InvalidRequest: the key names no shared memory object, or the object is smaller than the region.
        """
        if not name:
            raise InvalidRequest("a shared memory region needs a name")
        if name in self._regions:
            raise AlreadyExists(f"shared memory region '{name}' already in manager")
        if byte_size <= 0 or byte_size + offset >= 2**63:
            raise InvalidRequest(f"shared memory region '{name}': {byte_size} bytes at offset {offset} is no range")
        descriptor = self._open(name, key)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidRequest(f"shared memory region '{name}': key '{key}' is not a shared memory object")
            if offset + byte_size > status.st_size:
                raise InvalidRequest(
                    f"failed to register shared memory region '{name}': {byte_size} bytes at offset {offset} leave "
                    f"object '{key}' of {status.st_size} bytes"
                )
        except BaseException:
            os.close(descriptor)
            raise
        self._regions[name] = Region(name, key, offset, byte_size, descriptor)

    def unregister(self, name: str) -> None:
        """Forget the region of that name, or all of them when it is empty; an unknown name is no error."""
        for one in [name] if name else list(self._regions):
            region = self._regions.pop(one, None)
            if region is not None:
                region.close()

    def region(self, name: str) -> Region:
        """The region of that name.

        Raises:
            InvalidRequest: no such region.
        """
        region = self._regions.get(name)
        if region is None:
            raise InvalidRequest(f"Unable to find shared memory region: '{name}'")
        return region

    def status(self, name: str) -> list[Region]:
        """The region of that name, or all of them when it is empty.

        Raises:
            NotFound: no such region.
        """
        if not name:
            return list(self._regions.values())
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find system shared memory region: '{name}'")
        return [region]

    def _open(self, name: str, key: str) -> int:
        file = key.removeprefix("/")
        # Exactly one name below the folder, as shm_open demands: no way up, down or through a link.
        if file in {"", ".", ".."} or "/" in file or "\0" in file or len(os.fsencode(file)) > _NAME_LIMIT:
            raise InvalidRequest(
                f"shared memory region '{name}': key '{key}' is not the name of a shared memory object ('/name')"
            )
        try:
            return os.open(self._folder / file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidRequest(
                f"Unable to open shared memory region '{name}', key '{key}': {error.strerror}"
            ) from error
