"""The machine under the measurements: which core serves, which loads, and what CPU time a process has taken."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cores() -> tuple[int, int]:
    """The server's core and the load generator's; the same one where the process may use only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Run on one core inside the block; a process started in it, and every thread of that, stays there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_ns(pids: Iterable[int]) -> int:
    """CPU time of these processes' threads since they started, in ns; a process that is gone counts as 0.

    Reads the kernel's clock of each process (clock_getcpuclockid(3): the id is ~pid << 3 | 2), which is exact where
    /proc/PID/stat counts in ticks of 10 ms.
    """
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += time.clock_gettime_ns((~pid << 3) | 2)
    return total


def busy_ns() -> int:
    """CPU time that all cores have spent on anything since boot, in ns, to a tick of 10 ms."""
    ticks = [int(field) for field in _lines(Path("/proc/stat"))[0].split()[1:]]
    idle, waiting, guest = ticks[3], ticks[4], sum(ticks[8:])  # guest time is contained in user time
    return (sum(ticks) - idle - waiting - guest) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def card() -> dict[str, str | int]:
    """What the figures were taken on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.machine(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()
