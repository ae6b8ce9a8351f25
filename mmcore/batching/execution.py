"""Runs a copy's model: on the loop when it is measured to be fast, otherwise in one of the inference threads.

No Task and no Future is made for a request: an inline result is returned at once, one from a thread comes by a
callback on the loop, those that are ready together in one wake-up of the loop. Models take turns at the threads, none
may hold all of them, and none may have more than so many requests waiting. The requests that wait for a model whose
requests can be merged run as one when its turn comes. (Those of a model that runs on the loop are merged before they
come here, by ``ext/infer.pyx``.)
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Final, NamedTuple, Protocol, TypeAlias

from mmcore._ext.batches import rows_together
from mmcore._ext.rates import now_ns
from mmcore.batching.lane import Lane, Pace
from mmcore.batching.merging import Result, alone, merging_of
from mmcore.cache import Copy, CopyState
from mmcore.errors import (
    Cancelled,
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    MmcoreError,
    Overloaded,
    Unavailable,
)
from mmcore.runtimes import OutputTensor
from mmcore.runtimes.interface import Array
from mmcore.runtimes.isolation import Isolated
from mmcore.runtimes.size import Growth

log = logging.getLogger(__name__)

#: Requests of one model that may wait for a thread, where its settings do not say.
QUEUE_LIMIT: Final = 1024
_FEWEST_THREADS: Final = 4
#: Less is our own objects'.
_LEAST_GROWTH_BYTES: Final = 2048
#: A failing model's traceback is logged no more often.
_LOG_INTERVAL_S: Final = 10.0
_JOIN_S: Final = 5.0
#: Requests refused in a row since they would come too late, after which one runs all the same: the model may have
#: become faster.
_HOPELESS_IN_A_ROW: Final = 8
#: A full queue is searched for requests that nobody waits for no more often.
_SWEEP_INTERVAL_S: Final = 0.01


class Ran(NamedTuple):
    """How an inference went that did not run inline: nanoseconds it waited and ran, and the rows that ran with it.

    ``leads`` marks one of the requests that ran together.
    """

    queue_ns: int
    infer_ns: int
    rows: int
    leads: bool


#: Told the outputs or the error of an inference that did not run inline, and how it went. Called on the loop, once. It
#: must not raise.
Done: TypeAlias = Callable[[Sequence[OutputTensor] | None, BaseException | None, Ran], None]


class Caller(Protocol):
    """Who asked: a call of the transport, or one request of a stream. Read in threads too."""

    @property
    def deadline(self) -> float | None:
        """On :func:`time.monotonic`'s scale, in seconds; None without one."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""


class Job:
    """One request on its way through a thread.

    ``rows`` are those it could be merged by, -1 where it cannot be; ``level`` counts from 1.
    """

    __slots__ = (
        *("caller", "copy", "done", "grown", "inputs", "lane", "level", "names", "pace", "queue_ns", "result", "rows"),
        *("submitted_ns", "timer"),
    )

    def __init__(
        self,
        copy: Copy,
        pace: Pace,
        inputs: dict[str, Array],
        names: Sequence[str],
        done: Done,
        caller: Caller | None,
    ) -> None:
        self.copy = copy
        self.lane: Lane = copy.lane
        self.pace = pace
        self.inputs = inputs
        self.rows = rows_together(inputs) if self.lane.merges else -1
        self.names = tuple(names)
        self.done = done
        self.caller = caller
        self.level = 1
        self.timer: asyncio.TimerHandle | None = None
        self.submitted_ns = now_ns()
        self.queue_ns = 0
        #: Bytes that its inference has left behind.
        self.grown = 0
        self.result: Result | None = None

    def refused(self, error: MmcoreError) -> None:
        """Answer it with an error although it has not run."""
        self.queue_ns = now_ns() - self.submitted_ns
        self.result = Result(None, error, 0, 0)


def _work(lane: Lane, batch: list[Job]) -> None:
    """In a thread: run requests that can be merged, but for those whose answers nobody wants any more."""
    started = now_ns()
    wanted: list[Job] = []
    for job in batch:
        job.queue_ns = started - job.submitted_ns
        try:
            refuse_late(job.caller)
            _refuse_hopeless(job)
        except MmcoreError as error:
            job.refused(error)
        else:
            wanted.append(job)
    if not wanted:
        return
    if lane.unmeasured > 0:
        lane.unmeasured -= 1
        with Growth() as growth:
            _infer(lane, wanted)
        wanted[0].grown = _kept(growth.bytes or 0, wanted)
    else:
        _infer(lane, wanted)
    for job in wanted:
        job.inputs = {}


def _kept(growth: int, jobs: list[Job]) -> int:
    """Of the bytes that memory has grown by in an inference, those that are not its answers; 0 where they are few."""
    answers = [job.result.outputs for job in jobs if job.result is not None and job.result.outputs is not None]
    kept = growth - sum(array.nbytes for outputs in answers for _, _, array in outputs)
    return kept if kept >= _LEAST_GROWTH_BYTES else 0


def _infer(lane: Lane, wanted: list[Job]) -> None:
    """Run requests, those that can be merged as one."""
    model, merging = wanted[0].copy.model, lane.merging
    infer = model.infer_for([job.caller for job in wanted]) if isinstance(model, Isolated) else model.infer
    if len(wanted) == 1 or merging is None:
        for job in wanted:
            job.result = alone(infer, job.inputs, rows_of(job.inputs), job.names)
    else:
        members = [job.inputs for job in wanted]
        check = merging.check_due(members[0], members[-1])
        results = merging.run(infer, members, [job.rows for job in wanted], wanted[0].names, check=check)
        for job, result in zip(wanted, results, strict=True):
            job.result = result


def _refuse_hopeless(job: Job) -> None:
    """Raise DeadlineExceeded where the model takes longer than the caller waits, so that others get its time."""
    lane, deadline = job.lane, job.caller.deadline if job.caller is not None else None
    if deadline is None or job.pace.guessed or (deadline - time.monotonic()) * 1e9 >= job.pace.cost_ns:
        return
    lane.hopeless += 1
    if lane.hopeless <= _HOPELESS_IN_A_ROW:
        raise DeadlineExceeded("the deadline would pass before the model could answer")
    lane.hopeless = 0


def refuse_late(caller: Caller | None) -> None:
    """Raise DeadlineExceeded or Cancelled where the answer would come too late or to nobody."""
    if caller is None:
        return
    deadline = caller.deadline
    if deadline is not None and time.monotonic() >= deadline:
        raise DeadlineExceeded("deadline passed before the model could run")
    if caller.cancelled:
        raise Cancelled("the call was cancelled before the model could run")


class Execution:
    """Decides where inferences run, and runs them.

    ``threads`` is the number of inference threads, by default the processors this process may use and at least four,
    since some models wait rather than compute. They start with the first inference that needs one.
    """

    def __init__(self, *, threads: int | None = None, queue_limit: int = QUEUE_LIMIT) -> None:
        self._thread_count = threads or max(_FEWEST_THREADS, len(os.sched_getaffinity(0)))
        # One model with slow inferences leaves a thread to the others.
        self._share = max(1, self._thread_count - 1)
        self._queue_limit = queue_limit
        self._threads: list[threading.Thread] = []
        # Where all requests could run as one, a second inference beside the first has to have a processor of its own.
        self._share_merging = max(1, min(self._share, len(os.sched_getaffinity(0)) - 1))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._swept_at = 0.0
        self._lock = threading.Lock()
        #: Lanes that have jobs and may run one more; None ends a thread.
        self._turns: SimpleQueue[Lane | None] = SimpleQueue()
        self._finished: deque[Job] = deque()
        self._wake_pending = False
        #: Threads that wait for a worker process, or that models have beyond their share.
        self._lent = 0
        self._stopped = False
        self._logged_at: dict[str, float] = {}

    def lane(self, copy: Copy) -> Lane:
        """The copy's lane, made with its first request."""
        lane: Lane | None = copy.lane
        if lane is None:
            settings = copy.source.settings
            merging = merging_of(copy.name, copy.source.format, copy.model, settings)
            lane = copy.lane = Lane(
                settings.execution,
                isolated=isinstance(copy.model, Isolated),
                instances=settings.instances,
                merging=merging,
                batching=settings.batching,
                most_rows=settings.max_batch_size if merging is not None and settings.merges else 0,
            )
            self._lanes.add(lane)
        return lane

    def run(
        self,
        copy: Copy,
        inputs: dict[str, Array],
        outputs: Sequence[str],
        done: Done,
        caller: Caller | None = None,
        *,
        priority: int = 0,
        timeout_us: int = 0,
    ) -> Sequence[OutputTensor] | None:
        """Run the model on bound inputs for the named outputs (its default ones where empty).

        Returns the outputs when it ran inline; ``done`` is not called then. Returns None when it goes to a thread:
        ``done`` is called later, and until then a lease keeps the copy. Counting it in ``copy.statistics`` is the
        caller's. ``priority`` and ``timeout_us`` matter where it has to wait, as the model's settings say.

        Raises:
            InvalidRequest: more rows than the model's settings allow.
            Overloaded: too many requests wait for this model.
            Unavailable: the copy is being unloaded, or the instance stops.
            DeadlineExceeded, Cancelled: it is too late to start.
            InferenceFailed: it ran inline and the model raised; its own MmcoreError is raised as it is.
        """
        if copy.state is not CopyState.LOADED and copy.pins == 0:
            raise Unavailable(f"model '{copy.name}' is being unloaded; try again")
        lane: Lane = copy.lane or self.lane(copy)
        rows = rows_of(inputs)
        if 0 < lane.most_rows < rows:
            # Triton's words, which its clients know.
            raise InvalidRequest(
                f"inference request batch-size must be <= {lane.most_rows} for '{copy.name}', got {rows}"
            )
        pace = lane.pace(rows)
        if not lane.runs_inline(pace):
            self._submit(Job(copy, pace, inputs, outputs, done, caller), priority, timeout_us)
            return None
        refuse_late(caller)
        started = now_ns()
        try:
            answered = copy.model.infer(inputs, outputs)
        except (Exception, SystemExit) as error:
            # A refusal may be quick and says nothing of the model's speed, unless it was slow.
            pace.ran_inline(max(now_ns() - started, int(pace.cost_ns)))
            raise self.failure(copy, error) from error
        pace.ran_inline(now_ns() - started)
        return answered

    def _submit(self, job: Job, priority: int, timeout_us: int) -> None:
        lane = job.lane
        if self._stopped:
            raise _stopping()
        job.level = lane.level(priority)
        policy = lane.policy(job.level)
        limit = policy.limit or self._queue_limit
        if len(lane.jobs) >= limit:
            self._sweep(lane)
            if len(lane.jobs) >= limit:
                raise Overloaded(
                    f"model '{job.copy.name}' has {len(lane.jobs)} requests waiting, which is its limit; "
                    "try again later"
                )
        if not self._threads:
            self._start()
        assert self._loop is not None
        own_us = timeout_us if policy.takes_timeouts else 0
        waits_us = min(policy.timeout_us or own_us, own_us or policy.timeout_us)
        if waits_us:
            job.timer = self._loop.call_later(waits_us / 1e6, self._waited_enough, job, policy.delays)
        job.copy.acquire()
        with self._lock:
            lane.jobs.put(job)
            if lane.delays and not lane.ripe():
                if lane.held is None:
                    lane.held = self._loop.call_later(lane.batching.delay_us / 1e6, self._let_go, lane)
                return
            if lane.held is not None:
                lane.held.cancel()
                lane.held = None
            self._schedule(lane)

    def _schedule(self, lane: Lane) -> None:
        """With the lock: tell the threads of a lane's jobs, unless they know or are busy enough with it."""
        if lane.jobs and not lane.scheduled and lane.held is None and lane.running < self._most_running(lane):
            lane.scheduled = True
            self._turns.put(lane)

    def _most_running(self, lane: Lane) -> int:
        if lane.batching.ordered:
            return 1
        if lane.isolated or lane.instances:
            return max(1, lane.instances)
        return self._share_merging if lane.merges else self._share

    def _let_go(self, lane: Lane) -> None:
        """A batch has waited for others for long enough."""
        with self._lock:
            lane.held = None
            self._schedule(lane)

    def _waited_enough(self, job: Job, postpone: bool) -> None:
        """A request has waited for as long as it may."""
        with self._lock:
            if postpone:
                job.lane.jobs.postpone(job)
                return
            expired = job.lane.jobs.remove(job)
        if expired:
            job.refused(DeadlineExceeded("Request timeout expired: it waited for the model for too long"))
            self._finished.append(job)
            self._deliver()

    def _sweep(self, lane: Lane) -> None:
        """Take the requests that nobody waits for any more out of a full queue."""
        now = time.monotonic()
        if now - self._swept_at < _SWEEP_INTERVAL_S:
            return
        self._swept_at = now
        with self._lock:
            left = lane.jobs.discard(lambda job: job.caller is not None and job.caller.cancelled)
        for job in left:
            job.refused(Cancelled("the call was cancelled before the model could run"))
            self._finished.append(job)
        self._deliver()

    def _start(self) -> None:
        while len(self._threads) < self._thread_count and self._add_thread():
            pass
        if not self._threads:
            raise Overloaded("the system lets this instance start no thread for inferences")
        self._loop = asyncio.get_running_loop()

    def _add_thread(self) -> bool:
        """Whether the system allows one more; those that there are do the work of one that it does not."""
        thread = threading.Thread(target=self._serve_turns, name=f"mmcore-infer-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("inferences go on with %d threads: %s", len(self._threads), error)
            return False
        self._threads.append(thread)
        return True

    # In the inference threads.

    def _serve_turns(self) -> None:
        while (lane := self._turns.get()) is not None:
            with self._lock:
                lane.scheduled = False
                # In this order: what looks for both from outside of the lock sees one of them.
                lane.running += 1
                batch = self._batch(lane)
                lent = lane.isolated or lane.running > self._share
                if lent:
                    self._lend()
                # Back to the end of the line, so that lanes take turns.
                self._schedule(lane)
            if self._stopped:
                for job in batch:
                    job.refused(_stopping())
            else:
                _work(lane, batch)
            with self._lock:
                lane.running -= 1
                self._lent -= lent
                self._schedule(lane)
            self._finish(batch)
            del batch, lane

    def _lend(self) -> None:
        """With the lock: see that a thread less is not missed.

        It waits for a worker process, or is one that a model has beyond its share since its settings say so.
        """
        self._lent += 1
        if self._lent > len(self._threads) - self._thread_count and not self._stopped:
            self._add_thread()

    def _batch(self, lane: Lane) -> list[Job]:
        """With the lock: what runs next; nothing where it has all been taken out of the queue meanwhile."""
        if not lane.jobs:
            return []
        rows = lane.batch_rows() if lane.merges else 0
        first = lane.jobs.take()
        if lane.merging is None or not lane.merges or first.rows <= 0:
            return [first]
        return lane.jobs.take_like(first, lane.merging.most_requests, rows, in_order=lane.batching.ordered)

    def _finish(self, batch: list[Job]) -> None:
        self._finished.extend(batch)
        if self._wake_pending or not batch:
            return
        self._wake_pending = True
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            # The loop is closed: the instance is gone and nobody waits.
            log.debug("an inference of model %s ended after its loop", batch[0].copy.name)

    # On the loop.

    def _deliver(self) -> None:
        # Cleared first: a thread that still sees it set has appended before the queue is emptied below.
        self._wake_pending = False
        while self._finished:
            job = self._finished.popleft()
            result = job.result
            assert result is not None
            if job.timer is not None:
                job.timer.cancel()
            error = result.error
            if error is None:
                self._learn(job, result)
                if job.grown:
                    job.copy.grew(job.grown)
            else:
                error = self.failure(job.copy, error)
            # The traceback refers to the job, and the two would keep the request alive.
            job.result = None
            ran = Ran(job.queue_ns, result.infer_ns, result.rows, result.leads)
            try:
                job.done(result.outputs, error, ran)
            except Exception:
                log.exception("answering a request of model %s", job.copy.name)
            finally:
                job.copy.release()

    def _learn(self, job: Job, result: Result) -> None:
        if result.rows <= max(1, job.rows) or job.rows < 0:
            job.pace.ran_in_thread(result.infer_ns)
            return
        if result.leads:
            job.lane.pace(result.rows).ran_in_thread(result.infer_ns)
        # Alone it would have taken no longer.
        known = job.pace.cost_ns
        job.pace.ran_in_thread(min(result.infer_ns, int(known)) if known >= 0 else result.infer_ns)

    def failure(self, copy: Copy, error: BaseException) -> MmcoreError:
        """What the caller is told of an exception that a model raised."""
        if isinstance(error, MmcoreError):
            return error
        if isinstance(error, MemoryError):
            return Overloaded(f"model '{copy.name}' ran out of memory")
        now = time.monotonic()
        if now - self._logged_at.get(copy.name, -_LOG_INTERVAL_S) >= _LOG_INTERVAL_S:
            self._logged_at[copy.name] = now
            log.error("model %s version %s raised", copy.name, copy.version, exc_info=error)
        return InferenceFailed(f"{type(error).__name__}: {error}")

    async def stop(self) -> None:
        """Answer what waits with Unavailable and end the threads after what they are at, within seconds.

        The answers have been given when it returns, but for inferences that would not end.
        """
        self._stopped = True
        for _ in self._threads:
            self._turns.put(None)
        await asyncio.to_thread(self._join)
        for lane in list(self._lanes):
            with self._lock:
                if lane.held is not None:
                    lane.held.cancel()
                    lane.held = None
                left = lane.jobs.discard(lambda job: True)
            for job in left:
                job.refused(_stopping())
                self._finished.append(job)
        self._deliver()

    def _join(self) -> None:
        until = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))


def _stopping() -> Unavailable:
    return Unavailable("this instance is shutting down")


def rows_of(inputs: dict[str, Array]) -> int:
    """The first dimension of the first input, at least 1: what inference time is taken to depend on."""
    for array in inputs.values():
        return array.shape[0] if array.ndim else 1
    return 1
