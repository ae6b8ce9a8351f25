"""What all worker processes of this process are and take together, for metrics."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from typing import Final, NamedTuple, Protocol

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Worker(Protocol):
    """A process that runs."""

    pid: int


class Taken(NamedTuple):
    """What worker processes take: their number, the memory of those that run, and the CPU time of all there were."""

    processes: int
    resident_bytes: int
    cpu_s: float


class WorkerTotals:
    """Workers come and go in threads.

    Attributes:
        started: workers since the beginning.
        crashed: those that ended though nobody wanted it.
        overdue: those that were ended since they did not answer in time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Worker] = set()
        self.started = 0
        self.crashed = 0
        self.overdue = 0

    def begun(self, worker: Worker) -> None:
        """A worker runs."""
        with self._lock:
            self._running.add(worker)
            self.started += 1

    def ended(self, worker: Worker) -> None:
        """It does not any more."""
        with self._lock:
            self._running.discard(worker)

    def failed(self, *, overdue: bool) -> None:
        """Its end was not wanted."""
        with self._lock:
            self.overdue += overdue
            self.crashed += not overdue

    def taken(self) -> Taken:
        """What they take now; reads a file for each that runs."""
        with self._lock:
            running = list(self._running)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        resident, cpu_s = 0, ended.ru_utime + ended.ru_stime
        for worker in running:
            try:
                # proc(5): after the name in brackets the third field; utime and stime are the 14th and 15th.
                fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            cpu_s += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
            resident += int(fields[21]) * _PAGE_BYTES
        return Taken(len(running), resident, cpu_s)


#: Those of this process.
totals: Final = WorkerTotals()
