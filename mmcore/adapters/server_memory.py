"""What a server's processes take, seen from beside them, and what its container may.

Servers load from a folder and say little of memory. Where one runs on this machine, in sight of this process (a pod
with ``shareProcessNamespace``, or no containers at all), its growth by a load is measured; a load that others run
beside, or the first of its format, which brings a framework in, tells nothing that way. Processes that a load starts
are the model's own in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from mmcore.config import CAPACITY_SHARE, memory_limit

#: Of what a model takes in memory: so many times its files at least, and so much.
DISK_FACTOR: Final = 1.25
DEFAULT_BYTES: Final = 1_000_000

_LISTENING: Final = "0A"  # TCP_LISTEN, linux/include/net/tcp_states.h
_LOOPBACK: Final = ("127.", "localhost", "[::1]")


def guessed_size(files_bytes: int) -> int:
    """What a model takes of whose memory nothing else is known."""
    return max(int(files_bytes * DISK_FACTOR), DEFAULT_BYTES)


class Growth:
    """By what a server has grown with a load, in bytes; None where that cannot be told."""

    bytes: int | None = None


class ServerMemory:
    """The memory of the server that listens at ``address``, ``host:port``.

    Attributes:
        capacity_bytes: what its models may take together, of the limit of its container; 0 where it is out of sight.
    """

    def __init__(self, address: str, proc: Path = Path("/proc")) -> None:
        self._address = address
        self._proc = proc
        self._pid: int | None = None
        #: Formats whose framework the server has brought in.
        self._formats: set[str] = set()
        self._running = 0
        self._disturbed = False
        self.capacity_bytes = 0

    def find(self) -> None:
        """Look for the server, which may be a new process. Blocking."""
        host, _, port = self._address.rpartition(":")
        self._pid = _listener(self._proc, int(port)) if host.startswith(_LOOPBACK) else None
        self._formats.clear()
        self.capacity_bytes = 0
        if self._pid is not None:
            process = self._proc / str(self._pid)
            with contextlib.suppress(OSError):  # another user's
                limit = memory_limit(process / "root", membership=process / "cgroup")
                self.capacity_bytes = int(limit * CAPACITY_SHARE)

    @asynccontextmanager
    async def load(self, kind: str) -> AsyncIterator[Growth]:
        """One load of a model of that format goes on inside the block; what it gives is filled when that has ended."""
        self._running += 1
        self._disturbed = self._disturbed or self._running > 1
        growth = Growth()
        try:
            before = await asyncio.to_thread(self._taken)
            yield growth
            after = await asyncio.to_thread(self._taken)
            if before and after and not self._disturbed:
                growth.bytes = sum(size for pid, size in after.items() if pid not in before)
                if kind in self._formats:
                    growth.bytes += max(0, sum(size - before[pid] for pid, size in after.items() if pid in before))
            self._formats.add(kind)
        finally:
            self._running -= 1
            if not self._running:
                self._disturbed = False

    def _taken(self) -> dict[int, int]:
        """Bytes of the server's process and its descendants, by process."""
        if self._pid is None:
            return {}
        return {
            pid: size
            for pid in _family(self._proc, self._pid)
            if (size := anonymous_bytes(self._proc / str(pid))) is not None
        }


def anonymous_bytes(process: Path) -> int | None:
    """What a process takes that is no file's, of a folder of /proc; None where it has gone."""
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(values.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def _listener(proc: Path, port: int) -> int | None:
    """The process that listens at a port, as far as it can be seen."""
    inodes = set(_listening(proc, port))
    if not inodes:
        return None
    for process in proc.iterdir():
        if process.name.isdecimal():
            try:
                if any(str(entry.readlink()) in inodes for entry in (process / "fd").iterdir()):
                    return int(process.name)
            except OSError:
                continue  # gone, or another user's
    return None


def _listening(proc: Path, port: int) -> Iterable[str]:
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                yield f"socket:[{fields[9]}]"


def _family(proc: Path, pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for one in found:
        try:
            tasks = list((proc / str(one) / "task").iterdir())
            found.extend(int(child) for task in tasks for child in (task / "children").read_text().split())
        except OSError:
            continue
    return found
