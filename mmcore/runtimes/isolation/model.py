"""A model that answers from a worker process, and the thread that keeps a worker there for it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

from mmcore.errors import (
    Cancelled,
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    LoadFailed,
    MmcoreError,
    Unavailable,
)
from mmcore.model import ModelSource, TensorSpec
from mmcore.runtimes.interface import Array, OutputTensor
from mmcore.runtimes.isolation.frames import (
    INLINE_BYTES,
    BrokenFrame,
    Described,
    Kind,
    Packed,
    error_in,
    input_tensors,
    size_frame,
    size_in,
    unpack,
)
from mmcore.runtimes.isolation.process import LOOK_S, WorkerEnded, WorkerProcess
from mmcore.runtimes.isolation.totals import totals

log = logging.getLogger(__name__)

#: So many crashes within so long, and the model is given up.
CRASHES: Final = 5
CRASHES_WITHIN_S: Final = 60.0
#: The pause before a restart that follows another without an answer between; doubled each time.
_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
#: An inference whose caller has left may go on for so long, or twice as long as the longest that ended well: to kill a
#: worker costs those that wait more than to let it finish.
_GRACE_S: Final = 1.0
#: The longest answer: what it may cost the serving process.
ANSWER_LIMIT_BYTES: Final = 256 * 2**20
_CLOSE_S: Final = 6.0


class Caller(Protocol):
    """Who asked, as the execution knows it."""

    @property
    def deadline(self) -> float | None:
        """On :func:`time.monotonic`'s scale, in seconds; None without one."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""


class Callers:
    """Those whose requests are answered together, as one: it waits for as long as any of them does."""

    def __init__(self, callers: Sequence[Caller | None]) -> None:
        self._callers = callers

    @property
    def deadline(self) -> float | None:
        """The latest of theirs; None where one has none."""
        latest = 0.0
        for caller in self._callers:
            deadline = caller.deadline if caller is not None else None
            if deadline is None:
                return None
            latest = max(latest, deadline)
        return latest

    @property
    def cancelled(self) -> bool:
        """Whether all have left."""
        return all(caller is not None and caller.cancelled for caller in self._callers)


class IsolatedModel:
    """A model in a worker process. Satisfies ``LoadedModel``; made when the model is loaded.

    Inferences run one at a time. One during which the worker ends is answered Unavailable, as it may have been what
    ended it; those that wait are not harmed, a new worker is started for them. A model whose workers crash again and
    again is given up: from then on it answers LoadFailed with the reason, and says so to ``on_broken``.

    ``network``: whether it may use more than Unix sockets.

    Raises:
        LoadFailed: the worker could not load it, or crashed meanwhile.
    """

    def __init__(self, source: ModelSource, *, network: bool = False) -> None:
        self.name = source.name
        self._network = network
        self._source = source
        self._timeout_s = source.settings.timeout_s
        self._changed = threading.Condition()
        self._worker: WorkerProcess | None = None
        self._described: Described | None = None
        self._broken: LoadFailed | None = None
        self._on_broken: Callable[[LoadFailed], object] | None = None
        self._closing = False
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._crashes: deque[float] = deque(maxlen=CRASHES)
        #: Restarts since the last answer.
        self._fruitless = 0
        self._longest_s = 0.0
        self._thread = threading.Thread(target=self._keep, name=f"mmcore-worker-{source.name}", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._worker is not None or self._broken is not None)
            described = self._described
            if described is None:
                assert self._broken is not None
                raise self._broken
            worker = self._worker
        self.platform: str = described.platform
        self.inputs: tuple[TensorSpec, ...] = described.inputs
        self.outputs: tuple[TensorSpec, ...] = described.outputs
        self.default_outputs: tuple[str, ...] = described.default_outputs
        self.any_input_name: bool = described.any_input_name
        self.accepts: dict[str, tuple[str, ...]] = described.accepts
        stated = source.settings.size_bytes
        self.size_bytes: int = stated if stated is not None else worker.resident_bytes() if worker is not None else 0
        self._input_places: dict[str, int] = {spec.name: place for place, spec in enumerate(self.inputs)}
        self._output_places: dict[str, int] = {spec.name: place for place, spec in enumerate(self.outputs)}

    @property
    def pid(self) -> int | None:
        """The worker's process id; None while there is none."""
        worker = self._worker
        return worker.pid if worker is not None else None

    # In the threads that infer.

    def infer_for(
        self, callers: Sequence[Caller | None]
    ) -> Callable[[Mapping[str, Array], Sequence[str]], list[OutputTensor]]:
        """:meth:`infer` as it is for requests of these callers."""
        return partial(self.infer, caller=callers[0] if len(callers) == 1 else Callers(callers))

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], caller: Caller | None = None
    ) -> list[OutputTensor]:
        """Answer from the worker; see ``LoadedModel.infer``. Waits for a restart where one is under way.

        Raises:
            Unavailable: the worker ended while it was at work on this, or the model is being closed.
            DeadlineExceeded: the caller's deadline, or the settings' limit, passed; a worker that does not come to an
                end soon after is killed.
            Cancelled: the caller left; the same holds for the worker.
            Overloaded: the worker ran out of memory.
            LoadFailed: the model was given up, with the reason.
            InvalidRequest, InferenceFailed: as the model says.
        """
        names = outputs or self.default_outputs
        try:
            places = [self._output_places[name] for name in names]
        except KeyError as error:
            known = ", ".join(repr(output) for output in self._output_places)
            raise InvalidRequest(f"model {self.name!r} has no output {error.args[0]!r}; it has {known}") from None
        request = Packed(input_tensors(inputs, self._input_places))
        for attempt in (1, 2):
            worker = self._ready(caller)
            try:
                return self._ask(worker, request, places, caller)
            except WorkerEnded as end:
                worker.wait_ended()
                if end.handed_over or attempt == 2:
                    raise Unavailable(
                        f"model '{self.name}': its worker process {worker.reason or 'was ended'} while it answered;"
                        " it is being restarted"
                    ) from None
        raise AssertionError

    def _ready(self, caller: Caller | None) -> WorkerProcess:
        """A worker whose turn is taken."""
        while True:
            with self._changed:
                self._check(caller)
                worker = self._worker
                if worker is None or worker.lost:
                    self._changed.wait(LOOK_S)
                    continue
            if worker.turn.acquire(timeout=LOOK_S):
                if not worker.lost:
                    return worker
                worker.turn.release()

    def _check(self, caller: Caller | None) -> None:
        if self._broken is not None:
            raise type(self._broken)(str(self._broken))
        if self._closing:
            raise Unavailable(f"model '{self.name}' is being unloaded; try again")
        left = _left(caller, time.monotonic())
        if left is not None:
            raise left(f"nobody waits any more for model '{self.name}', whose worker process is busy or restarted")

    def _ask(
        self, worker: WorkerProcess, request: Packed, places: Sequence[int], caller: Caller | None
    ) -> list[OutputTensor]:
        """One inference in the worker whose turn is taken, which is given back."""
        shared = request.total if request.total > INLINE_BYTES else 0
        try:
            if shared:
                worker.inputs.grow(shared)
            started = time.monotonic()
            worker.ask(request.frame(Kind.INFER, places, worker.inputs))
            kind, data = self._hear(worker, started, caller)
            if kind is Kind.FAILED:
                raise error_in(data)
            if kind is not Kind.ANSWER:
                raise BrokenFrame(f"{kind.name} instead of an answer")
            answer = self._outputs(worker, data, places)
            self._longest_s = max(self._longest_s, time.monotonic() - started)
            self._fruitless = 0
            return answer
        except BrokenFrame as error:
            worker.kill()
            raise InferenceFailed(f"model '{self.name}': its worker process answered what cannot be: {error}") from None
        finally:
            worker.inputs.trim(shared)
            worker.turn.release()

    def _outputs(self, worker: WorkerProcess, data: bytes, places: Sequence[int]) -> list[OutputTensor]:
        """The outputs in an answer, if they are those asked for."""
        answer = unpack(data, worker.outputs)
        worker.outputs.trim(answer.shared)
        if [place for place, _, _ in answer.tensors] != list(places):
            raise BrokenFrame("other outputs than those asked for")
        return [(self.outputs[place].name, datatype, array) for place, datatype, array in answer.tensors]

    def _hear(self, worker: WorkerProcess, started: float, caller: Caller | None) -> tuple[Kind, bytes]:
        """The worker's answer, once it has been given the memory for it; kills it when it takes too long."""
        left: type[MmcoreError] | None = None
        kill_at = started + self._timeout_s if self._timeout_s is not None else float("inf")
        while True:
            answer = worker.hear()
            if answer is not None and answer[0] is Kind.NEED:
                answer = self._grant(worker, answer[1])
            if answer is not None:
                if left is not None:
                    raise left(f"nobody waited any more when model '{self.name}' answered")
                return answer
            now = time.monotonic()
            if left is None and (left := _left(caller, now)) is not None:
                kill_at = min(kill_at, now + max(_GRACE_S, 2 * self._longest_s))
            if now >= kill_at:
                worker.overdue = True
                worker.kill()
                raise DeadlineExceeded(
                    f"model '{self.name}' did not answer in {now - started:.1f} s; its worker process is restarted"
                )

    def _grant(self, worker: WorkerProcess, data: bytes) -> tuple[Kind, bytes] | None:
        """Give it memory for its answer, or not; its next frame, None when there is none yet."""
        size = size_in(data)
        if size <= ANSWER_LIMIT_BYTES:
            worker.outputs.grow(size)
        try:
            worker.ask(size_frame(Kind.GROWN if size <= ANSWER_LIMIT_BYTES else Kind.REFUSED, size))
            return worker.hear()
        except WorkerEnded:
            raise WorkerEnded(handed_over=True) from None

    # Life.

    def watch_broken(self, on_broken: Callable[[LoadFailed], object]) -> None:
        """Call ``on_broken`` with the reason, once, when the model is given up; from any thread."""
        with self._changed:
            self._on_broken = on_broken
            broken = self._broken
        if broken is not None:
            on_broken(broken)

    def close(self) -> None:
        """End the worker; what is asked of it meanwhile is refused."""
        with self._changed:
            self._closing = True
            if self._stop >= 0:
                os.eventfd_write(self._stop, 1)
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)

    # In the thread of its own.

    def _keep(self) -> None:
        """Have a worker there until the model is closed or given up."""
        try:
            while self._broken is None and not self._closing:
                self._one_worker()
        except Exception as error:
            log.exception("model %s: keeping its worker process", self.name)
            self._give_up(LoadFailed(f"model '{self.name}': its worker process cannot be kept: {error}"))
        finally:
            with self._changed:
                os.close(self._stop)
                self._stop = -1

    def _one_worker(self) -> None:
        """Start a worker, publish it when it has loaded, and see to what is left at its end."""
        try:
            worker = WorkerProcess(self._source, self._source.settings.isolation_memory_bytes, network=self._network)
        except OSError as error:
            self._crashed(f"cannot be started: {error}")
            return
        ended = worker.watch(self._stop)
        if not ended:
            with self._changed:
                self._described = self._described or worker.described
                fits = self._described == worker.described
                if fits:
                    self._worker = worker
                    self._changed.notify_all()
            if not fits:
                self._give_up(LoadFailed(f"model '{self.name}' has other tensors since its worker was restarted"))
                worker.kill()
            worker.watch(self._stop)
            with self._changed:
                self._worker = None
        if self._closing:
            return
        if worker.refused is not None:
            self._give_up(LoadFailed(str(worker.refused)))
        elif worker.overdue:
            log.warning("model %s: its worker process did not answer in time and is restarted", self.name)
            totals.failed(overdue=True)
            self._pause()
        elif self._broken is None:
            self._crashed(worker.reason if not ended else f"{worker.reason} while it loaded")

    def _crashed(self, how: str) -> None:
        """Decide what follows an end that nobody wanted."""
        log.warning("model %s: its worker process %s", self.name, how)
        totals.failed(overdue=False)
        now = time.monotonic()
        self._crashes.append(now)
        if self._described is None:
            self._give_up(LoadFailed(f"model '{self.name}': its worker process {how}"))
        elif len(self._crashes) == CRASHES and now - self._crashes[0] < CRASHES_WITHIN_S:
            self._give_up(
                LoadFailed(
                    f"model '{self.name}' crashed {CRASHES} times within {CRASHES_WITHIN_S:.0f} s;"
                    f" last, its worker process {how}"
                )
            )
        else:
            self._pause()

    def _pause(self) -> None:
        """Wait before a restart, longer the more of them there were to no avail."""
        if self._fruitless:
            pause_s = min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0 ** (self._fruitless - 1))
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause_s)
        self._fruitless += 1

    def _give_up(self, error: LoadFailed) -> None:
        with self._changed:
            self._broken = error
            on_broken = self._on_broken
            self._changed.notify_all()
        if on_broken is not None:
            on_broken(error)


def _left(caller: Caller | None, now: float) -> type[MmcoreError] | None:
    """The error for a caller that does not wait any more; None while it does."""
    if caller is None:
        return None
    deadline = caller.deadline
    if deadline is not None and now >= deadline:
        return DeadlineExceeded
    return Cancelled if caller.cancelled else None
