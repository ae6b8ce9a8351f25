"""Runs a copy's model: on the loop when it is measured to be fast, otherwise in one of the inference threads.

No Task and no Future is made for a request: an inline result is returned at once, one from a thread comes by a
callback on the loop, those that are ready together in one wake-up of the loop. Models take turns at the threads, none
may hold all of them, and none may have more than so many requests waiting.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Final, Protocol, TypeAlias

from mmcore._ext.rates import now_ns
from mmcore.batching.lane import Lane, Pace
from mmcore.cache import Copy, CopyState
from mmcore.errors import Cancelled, DeadlineExceeded, InferenceFailed, MmcoreError, Overloaded, Unavailable
from mmcore.runtimes import OutputTensor
from mmcore.runtimes.interface import Array
from mmcore.runtimes.isolation import IsolatedModel

log = logging.getLogger(__name__)

#: Requests of one model that may wait for a thread or be at work in one.
QUEUE_LIMIT: Final = 1024
_FEWEST_THREADS: Final = 4
#: A failing model's traceback is logged no more often.
_LOG_INTERVAL_S: Final = 10.0
_JOIN_S: Final = 5.0

#: Told the outputs or the error of an inference that did not run inline, and the nanoseconds it waited and ran. Called
#: on the loop, once. It must not raise.
Done: TypeAlias = Callable[[Sequence[OutputTensor] | None, BaseException | None, int, int], None]


class Caller(Protocol):
    """Who asked: a call of the transport, or one request of a stream. Read in threads too."""

    @property
    def deadline(self) -> float | None:
        """On :func:`time.monotonic`'s scale, in seconds; None without one."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""


class Job:
    """One inference on its way through a thread."""

    __slots__ = (
        *("caller", "copy", "done", "error", "infer_ns", "inputs", "lane", "names", "outputs", "pace"),
        *("queue_ns", "submitted_ns"),
    )

    def __init__(
        self,
        copy: Copy,
        pace: Pace,
        inputs: Mapping[str, Array],
        names: Sequence[str],
        done: Done,
        caller: Caller | None,
    ) -> None:
        self.copy = copy
        self.lane: Lane = copy.lane
        self.pace = pace
        self.inputs = inputs
        self.names = names
        self.done = done
        self.caller = caller
        self.submitted_ns = now_ns()
        self.queue_ns = 0
        self.infer_ns = 0
        self.outputs: Sequence[OutputTensor] | None = None
        self.error: BaseException | None = None

    def work(self) -> None:
        """In a thread: run the model, unless nobody wants the answer any more."""
        started = now_ns()
        self.queue_ns = started - self.submitted_ns
        try:
            refuse_late(self.caller)
            model = self.copy.model
            infer = model.infer_for([self.caller]) if isinstance(model, IsolatedModel) else model.infer
            self.outputs = infer(self.inputs, self.names)
        except (Exception, SystemExit) as error:
            self.error = error
        self.infer_ns = now_ns() - started
        self.inputs = {}


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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        #: Lanes that have jobs and may run one more; None ends a thread.
        self._turns: SimpleQueue[Lane | None] = SimpleQueue()
        self._finished: deque[Job] = deque()
        self._wake_pending = False
        #: Threads that wait for a worker process.
        self._lent = 0
        self._stopped = False
        self._logged_at: dict[str, float] = {}

    def run(
        self,
        copy: Copy,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        done: Done,
        caller: Caller | None = None,
    ) -> Sequence[OutputTensor] | None:
        """Run the model on bound inputs for the named outputs (its default ones where empty).

        Returns the outputs when it ran inline; ``done`` is not called then. Returns None when it goes to a thread:
        ``done`` is called later, and until then a lease keeps the copy. Counting it in ``copy.statistics`` is the
        caller's.

        Raises:
            Overloaded: too many requests wait for this model.
            Unavailable: the copy is being unloaded, or the instance stops.
            DeadlineExceeded, Cancelled: it is too late to start.
            InferenceFailed: it ran inline and the model raised; its own MmcoreError is raised as it is.
        """
        if copy.state is not CopyState.LOADED and copy.pins == 0:
            raise Unavailable(f"model '{copy.name}' is being unloaded; try again")
        lane: Lane = copy.lane
        if lane is None:
            lane = copy.lane = Lane(copy.source.settings.execution, isolated=isinstance(copy.model, IsolatedModel))
        pace = lane.pace(rows_of(inputs))
        if not lane.runs_inline(pace):
            self._submit(Job(copy, pace, inputs, outputs, done, caller))
            return None
        refuse_late(caller)
        started = now_ns()
        try:
            answered = copy.model.infer(inputs, outputs)
        except (Exception, SystemExit) as error:
            # A refusal may be quick and says nothing of the model's speed, unless it was slow.
            pace.ran_inline(max(now_ns() - started, int(pace.cost_ns)))
            raise self._failure(copy, error) from error
        pace.ran_inline(now_ns() - started)
        return answered

    def _submit(self, job: Job) -> None:
        lane = job.lane
        if self._stopped:
            raise _stopping()
        if lane.waiting >= self._queue_limit:
            raise Overloaded(
                f"model '{job.copy.name}' has {lane.waiting} requests waiting, which is its limit; try again later"
            )
        if not self._threads:
            self._start()
        lane.waiting += 1
        job.copy.acquire()
        with self._lock:
            lane.jobs.append(job)
            if not lane.scheduled and lane.running < self._most_running(lane):
                lane.scheduled = True
                self._turns.put(lane)

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        for _ in range(self._thread_count):
            self._add_thread()

    def _add_thread(self) -> None:
        thread = threading.Thread(target=self._serve_turns, name=f"mmcore-infer-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _most_running(self, lane: Lane) -> int:
        return 1 if lane.isolated else self._share

    # In the inference threads.

    def _serve_turns(self) -> None:
        while (lane := self._turns.get()) is not None:
            with self._lock:
                job = lane.jobs.popleft()
                lane.running += 1
                # Back to the end of the line, so that lanes take turns.
                if lane.isolated:
                    self._lend()
                lane.scheduled = bool(lane.jobs) and lane.running < self._most_running(lane)
                if lane.scheduled:
                    self._turns.put(lane)
            if self._stopped:
                job.error = _stopping()
            else:
                job.work()
            with self._lock:
                lane.running -= 1
                self._lent -= lane.isolated
                if lane.jobs and not lane.scheduled:
                    lane.scheduled = True
                    self._turns.put(lane)
            self._finish(job)
            del job, lane

    def _lend(self) -> None:
        """With the lock: let a thread wait for a worker process, and see that no fewer are left to the others."""
        self._lent += 1
        if self._lent > len(self._threads) - self._thread_count and not self._stopped:
            self._add_thread()

    def _finish(self, job: Job) -> None:
        self._finished.append(job)
        if self._wake_pending:
            return
        self._wake_pending = True
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            # The loop is closed: the instance is gone and nobody waits.
            log.debug("an inference of model %s ended after its loop", job.copy.name)

    # On the loop.

    def _deliver(self) -> None:
        # Cleared first: a thread that still sees it set has appended before the queue is emptied below.
        self._wake_pending = False
        while self._finished:
            job = self._finished.popleft()
            job.lane.waiting -= 1
            error = job.error
            if error is None:
                job.pace.ran_in_thread(job.infer_ns)
            else:
                error = self._failure(job.copy, error)
            # The traceback refers to the job, and the two would keep the request alive.
            job.error = None
            try:
                job.done(job.outputs, error, job.queue_ns, job.infer_ns)
            except Exception:
                log.exception("answering a request of model %s", job.copy.name)
            finally:
                job.copy.release()

    def _failure(self, copy: Copy, error: BaseException) -> MmcoreError:
        """What the caller is told of an exception that a model raised."""
        if isinstance(error, MmcoreError):
            return error
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
        while not self._turns.empty():
            lane = self._turns.get_nowait()
            while lane is not None and lane.jobs:
                job = lane.jobs.popleft()
                job.error = _stopping()
                self._finished.append(job)
        self._deliver()

    def _join(self) -> None:
        until = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))


def _stopping() -> Unavailable:
    return Unavailable("this instance is shutting down")


def rows_of(inputs: Mapping[str, Array]) -> int:
    """The first dimension of the first input, at least 1: what inference time is taken to depend on."""
    for array in inputs.values():
        return array.shape[0] if array.ndim else 1
    return 1
