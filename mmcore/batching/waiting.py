"""The inferences of one copy that wait for a thread: by level, each level in order, and those put behind all others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from mmcore._ext.batches import can_merge

if TYPE_CHECKING:
    from mmcore.batching.execution import Job

#: Waiting requests that are looked at for one batch.
_LOOKED_AT: Final = 256


class Waiting:
    """Jobs in the order in which they are to run. Not synchronised: whoever uses it holds the execution's lock.

    Attributes:
        rows: those of all jobs that can be merged.
    """

    __slots__ = ("_count", "_levels", "rows")

    def __init__(self, levels: int) -> None:
        #: Behind the levels, the jobs that have waited longer than they may.
        self._levels: list[deque[Job]] = [deque() for _ in range(max(1, levels) + 1)]
        self._count = 0
        self.rows = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        for level in self._levels:
            yield from level

    def put(self, job: Job) -> None:
        """Add a job at the end of its level, numbered from 1."""
        self._levels[job.level - 1].append(job)
        self._count += 1
        self.rows += max(0, job.rows)

    def take(self) -> Job:
        """The next job; there must be one."""
        level = next(level for level in self._levels if level)
        return self._taken(level.popleft())

    def remove(self, job: Job) -> bool:
        """Take a job out of its turn; False where it is not there any more."""
        for level in self._levels:
            if job in level:
                level.remove(job)
                self._taken(job)
                return True
        return False

    def postpone(self, job: Job) -> None:
        """Put a job behind all others, where it is still there."""
        if self.remove(job):
            job.level = len(self._levels)
            self.put(job)

    def discard(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Take out all jobs that are unwanted."""
        found = [job for job in self if unwanted(job)]
        for job in found:
            self.remove(job)
        return found

    def take_like(self, first: Job, most_requests: int, most_rows: int, *, in_order: bool) -> list[Job]:
        """``first``, which has been taken, and those of the next jobs that can be merged with it.

        With ``in_order`` none is passed over.
        """
        batch = [first]
        rows = first.rows
        looked = 0
        for level in self._levels:
            kept: list[Job] = []
            while level and len(batch) < most_requests and looked < _LOOKED_AT:
                looked += 1
                job = level[0]
                fits = 0 < job.rows <= most_rows - rows and job.names == first.names
                if fits and can_merge(first.inputs, job.inputs):
                    batch.append(self._taken(level.popleft()))
                    rows += job.rows
                elif in_order:
                    looked = _LOOKED_AT
                else:
                    kept.append(level.popleft())
            level.extendleft(reversed(kept))
        return batch

    def _taken(self, job: Job) -> Job:
        self._count -= 1
        self.rows -= max(0, job.rows)
        return job
