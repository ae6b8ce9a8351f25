"""Which process of this machine: told apart from one that gets its number later, and from those before a restart."""

from __future__ import annotations

import os
from pathlib import Path


def this_process() -> str:
    """The boot, the namespace of process numbers, the number, and the clock tick at which the process started."""
    pid = os.getpid()
    return f"{_boot()} {_namespace()} {pid} {_started_at(pid)}"


def is_running(process: str) -> bool:
    """Whether the process may be running; one in another container cannot be seen, and may."""
    boot, namespace, pid, started_at = process.split(" ")
    if boot != _boot():
        return False
    return namespace != _namespace() or started_at == _started_at(int(pid))


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    return Path("/proc/self/ns/pid").readlink().name


def _started_at(pid: int) -> str:
    """Field 22 of /proc/PID/stat (proc(5)); empty where there is no such process, or only what is left of it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
