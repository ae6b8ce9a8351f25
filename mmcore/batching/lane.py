"""What is known of one copy's speed and what waits for it; decides whether its next inference runs on the loop."""

from __future__ import annotations

import asyncio
from typing import Final

from mmcore.batching.merging import Merging
from mmcore.batching.waiting import Waiting
from mmcore.model import Batching, QueuePolicy

#: A hand-off to a thread and back costs about 100 µs of both processors and two switches; below a few times that the
#: loop is better off doing the work, above it requests of other models wait too long behind it.
INLINE_BELOW_NS: Final = 300_000
#: What runs on the loop leaves it only when it has become clearly slower.
THREAD_ABOVE_NS: Final = 450_000
#: The first inferences of a copy, which run in threads and may allocate what stays (buffers, arenas, caches).
MEASURED: Final = 4
#: Calls that stay in threads after they were too slow on the loop; four times as many each time it happens.
FIRST_STAY: Final = 16
LONGEST_STAY: Final = 4096

#: What a new figure counts for. In threads the time holds waits for the interpreter and for cores, so there a lower
#: figure counts at once and a higher one slowly.
_WEIGHT: Final = 1 / 8
_WEIGHT_IN_THREAD: Final = 1 / 32


class Pace:
    """How long inferences of about one size take; negative ``cost_ns`` before the first.

    ``guessed``: whether ``cost_ns`` is from inferences of another size.
    """

    __slots__ = ("_doubted", "_inline", "_next_stay", "_proven", "_stay", "cost_ns", "guessed")

    def __init__(self, cost_ns: float = -1.0) -> None:
        self.cost_ns = cost_ns
        self.guessed = cost_ns >= 0
        self._inline = False
        self._doubted = False
        self._stay = 0
        self._next_stay = FIRST_STAY
        self._proven = 0

    def runs_inline(self) -> bool:
        """Whether the next one should run on the loop."""
        if self._inline:
            return True
        return self._stay == 0 and 0 <= self.cost_ns < INLINE_BELOW_NS

    def ran_inline(self, elapsed_ns: int) -> None:
        """Learn from an inference on the loop.

        One slow among fast ones does not count: on a busy machine that is the processor being taken away in the middle,
        whatever the model. The next one tells.
        """
        self._inline = True
        self.guessed = False
        slow = elapsed_ns > THREAD_ABOVE_NS
        if slow and not self._doubted and 0 <= self.cost_ns < INLINE_BELOW_NS:
            self._doubted = True
            return
        self._doubted = False
        self._proven = 0 if slow else self._proven + 1
        if self._proven == LONGEST_STAY:
            self._next_stay = FIRST_STAY
        self.cost_ns += (elapsed_ns - self.cost_ns) * _WEIGHT if self.cost_ns >= 0 else elapsed_ns - self.cost_ns
        if self.cost_ns > THREAD_ABOVE_NS:
            self._inline = False
            self._stay = self._next_stay
            self._next_stay = min(self._next_stay * 4, LONGEST_STAY)

    def ran_in_thread(self, elapsed_ns: int) -> None:
        """Learn from an inference in a thread."""
        if self._stay > 0:
            self._stay -= 1
        if self.cost_ns < 0 or self.guessed or elapsed_ns < self.cost_ns:
            self.cost_ns, self.guessed = float(elapsed_ns), False
        else:
            self.cost_ns += (elapsed_ns - self.cost_ns) * _WEIGHT_IN_THREAD


class Lane:
    """One copy's lane.

    Attributes:
        execution: ``auto``, ``inline`` or ``thread``, as its settings say.
        isolated: whether it runs in worker processes, each of which takes one request at a time.
        instances: inferences that may run at once, where its settings say so; 0: that is not its settings' to say.
        batching: what its settings say of batches and of the queue.
        merging: how its requests are merged; None where they are not.
        most_rows: what one request may have, where the settings say so; 0: any number.
        jobs: inferences that wait for a thread.
        running: inferences at work, a merged one counting once.
        scheduled: whether the threads know that there are jobs.
        held: while its jobs wait for more to join them.
        hopeless: requests in a row that were refused because their deadline would pass.
        unmeasured: inferences that are still to be watched for the memory they leave behind.
    """

    __slots__ = (
        *("__weakref__", "_paces", "batching", "execution", "held", "hopeless", "instances", "isolated", "jobs"),
        *("merging", "most_rows", "running", "scheduled", "unmeasured"),
    )

    def __init__(
        self,
        execution: str,
        *,
        isolated: bool = False,
        instances: int = 0,
        merging: Merging | None = None,
        batching: Batching | None = None,
        most_rows: int = 0,
    ) -> None:
        self.execution = execution
        self.isolated: Final = isolated
        self.instances: Final = instances
        self.batching: Final = batching or Batching()
        self.merging: Final = merging
        self.most_rows: Final = most_rows
        self.jobs = Waiting(self.batching.levels)
        self.running = 0
        self.scheduled = False
        self.held: asyncio.TimerHandle | None = None
        self.hopeless = 0
        self.unmeasured = 0 if isolated else MEASURED
        #: By the number of binary digits of the number of rows: twice the rows may well take twice the time.
        self._paces: dict[int, Pace] = {}

    def pace(self, rows: int) -> Pace:
        """The pace of inferences of about so many rows."""
        size = rows.bit_length()
        pace = self._paces.get(size)
        if pace is None:
            smaller = max((known for known in self._paces if known < size), default=None)
            # Until it is measured, more rows are taken to need more time in proportion.
            cost_ns = -1.0 if smaller is None else self._paces[smaller].cost_ns * 2.0 ** (size - smaller)
            pace = self._paces[size] = Pace(cost_ns)
        return pace

    @property
    def merges(self) -> bool:
        """Whether its requests are merged."""
        return self.merging is not None and self.merging.active

    @property
    def delays(self) -> bool:
        """Whether a request waits for others although it could run."""
        return self.batching.delay_us > 0 and self.merges

    def ripe(self) -> bool:
        """Whether so many rows wait that a batch waits for no more."""
        assert self.merging is not None
        wanted = self.batching.preferred[0] if self.batching.preferred else self.merging.most_rows
        return self.jobs.rows >= wanted or len(self.jobs) >= self.merging.most_requests

    def batch_rows(self) -> int:
        """The rows to merge now: the largest preferred number that waits, or what one inference may have."""
        assert self.merging is not None
        reached = [size for size in self.batching.preferred if size <= self.jobs.rows]
        return reached[-1] if reached else self.merging.most_rows

    def level(self, priority: int) -> int:
        """The level of a request's priority, from 1; an absent or unknown one is the default."""
        levels = self.batching.levels
        if not levels:
            return 1
        return priority if 1 <= priority <= levels else self.batching.default_level

    def policy(self, level: int) -> QueuePolicy:
        """What becomes of the requests of a level that wait."""
        return self.batching.policies.get(level, self.batching.policy)

    def free(self) -> bool:
        """Whether one more inference may run, on the loop, beside those that run or wait in threads.

        For the loop's thread, which is the only one to let more of them wait: it stays true while that one runs.
        """
        return not self.instances or len(self.jobs) + self.running < self.instances

    def runs_inline(self, pace: Pace) -> bool:
        """Whether an inference of that pace should run on the loop."""
        if self.delays or self.isolated or not self.free():
            return False
        return pace.runs_inline() if self.execution == "auto" else self.execution == "inline"
