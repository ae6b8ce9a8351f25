"""Control groups of worker processes, where this process may make them: limits of a worker and all that it starts.

What a worker sets itself holds for each of its processes; a group of version 2 (the kernel's ``cgroup-v2.rst``) holds
for them together, shared memory and files' pages among it, and ends them all at once. Groups are made where somebody
has given them away: this process runs in a subgroup of a group that systemd marks as delegated (``Delegate=yes`` with
``DelegateSubgroup=``), or that belongs to its user. Where there is none nothing is moved, and the worker's own limits
are what there is.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_CONTROLLERS: Final = ("cpu", "memory", "pids")
_PREFIX: Final = "mmcore-worker"
#: Beside its private memory, which its own limit bounds: tensors in shared memory, and pages of files that are in use.
_SHARED_BYTES: Final = 128 * 2**20
_PERIOD_US: Final = 100_000
_PROCESSES: Final = 512
#: How long the kernel may take to end what is in a group.
_END_S: Final = 1.0
_numbers: Final = itertools.count()


class WorkerGroup:
    """The group of one worker; without a folder it is none, and does nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def add(self, pid: int) -> None:
        """Put a process into it, by which its children will be there too."""
        if self._folder is None:
            return
        try:
            (self._folder / "cgroup.procs").write_text(str(pid))
        except ProcessLookupError:
            pass  # it has ended already
        except OSError as error:
            log.warning("the worker process %d is in no control group of its own: %s", pid, error)

    def end(self) -> None:
        """End all that is in it, and remove it."""
        if self._folder is None:
            return
        with suppress(OSError):  # Linux 5.14; without it there is what ends the worker otherwise
            (self._folder / "cgroup.kill").write_text("1")
        ends_at = time.monotonic() + _END_S
        while True:
            try:
                self._folder.rmdir()
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > ends_at:
                    log.debug("the control group %s stays: %s", self._folder, error)
                    return
                time.sleep(0.001)


class WorkerGroups:
    """Makes groups below ``parent``; None where this process has been given no place for them."""

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent
        if parent is None:
            return
        given = (parent / "cgroup.controllers").read_text().split()
        self._controllers = [one for one in _CONTROLLERS if one in given]
        try:
            (parent / "cgroup.subtree_control").write_text(" ".join(f"+{one}" for one in self._controllers))
        except OSError as error:
            log.info("worker processes get no control groups: %s: %s", parent, error.strerror)
            self._parent = None
            return
        for left in parent.glob(f"{_PREFIX}-*"):
            # Of an instance that was killed; one that is alive may be about to use its own.
            if not Path("/proc", left.name.split("-")[2]).exists():
                WorkerGroup(left).end()
        log.info("worker processes get control groups below %s (%s)", parent, ", ".join(self._controllers))

    def make(self, memory_bytes: int | None, cpus: int | None) -> WorkerGroup:
        """A group with these limits; what cannot be limited is told in the log, and is not."""
        if self._parent is None:
            return WorkerGroup(None)
        folder = self._parent / f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
        wanted = {"pids": {"pids.max": str(_PROCESSES)}}
        if cpus is not None:
            wanted["cpu"] = {"cpu.max": f"{cpus * _PERIOD_US} {_PERIOD_US}"}
        if memory_bytes is not None:
            most = str(memory_bytes + _SHARED_BYTES)
            wanted["memory"] = {"memory.max": most, "memory.swap.max": "0", "memory.oom.group": "1"}
        try:
            folder.mkdir()
        except OSError as error:
            log.warning("a worker gets no control group: %s", error)
            return WorkerGroup(None)
        for controller in self._controllers:
            for name, value in wanted.get(controller, {}).items():
                try:
                    (folder / name).write_text(value)
                except OSError as error:  # memory.swap.max: a kernel without swap
                    log.debug("a worker's control group has no %s: %s", name, error)
        return WorkerGroup(folder)


def place_for_workers(root: Path = Path("/")) -> Path | None:
    """The group above this process's own, where it has been given away; None where there is no such.

    ``root`` is where ``proc`` and ``sys`` are looked for.
    """
    bases = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
    base = next((one for one in bases if (one / "cgroup.controllers").is_file()), None)
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    if base is None or not own or ".." in own.split("/"):
        return None
    parent = (base / own).parent
    return parent if (base / own).is_dir() and _delegated(parent) else None


def _delegated(folder: Path) -> bool:
    if os.geteuid() != 0:
        return folder.stat().st_uid == os.geteuid() and os.access(folder, os.W_OK)
    try:
        return os.getxattr(folder, "user.delegate") == b"1" and os.access(folder, os.W_OK)
    except OSError:
        return False
