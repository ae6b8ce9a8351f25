"""ModelInfer: from a request's bytes to its answer's.

The common request (all tensors in the message, its copy loaded, the model fast enough for the loop) is answered by
``ext/infer.pyx`` in one call without a task, a future or a log line. What has to wait, for a load or for a thread, or
has parameters, comes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from numpy.typing import NDArray

from mmcore._ext.infer import CommonPath, Prepared
from mmcore._ext.pbwire import find_string
from mmcore._ext.rates import now_ns
from mmcore._ext.responses import ResponseCache, Shelf
from mmcore._ext.v2codec import InferRequest, decode_infer_request, encode_infer_response
from mmcore.batching.execution import Ran, rows_of
from mmcore.cache import Copy
from mmcore.errors import LoadFailed, NotFound
from mmcore.routing import Kind, Mesh, Names, Router
from mmcore.routing.hops import arrival_of
from mmcore.routing.mesh import SHARED_FROM
from mmcore.runtimes import OutputTensor
from mmcore.server.calls import Answer, Body, Waiting, refuse
from mmcore.server.dataplane import DataplaneConfig
from mmcore.server.headers import Asked, asked, balanced
from mmcore.server.several import ask_several
from mmcore.server.shared_memory import SharedMemory
from mmcore.server.tensors import answer_with_parameters, bind_tensors, schedule_of
from mmcore.server.tracing import Tracing
from mmcore.server.watched import WatchedCall
from mmcore.tracing import RequestTrace

#: Where the v2 protocol has the model's name.
_NAME_PATH: Final = (1,)
#: What other instances are asked by, whatever a request came through.
MODEL_INFER: Final = "/inference.GRPCInferenceService/ModelInfer"


class Inference:
    """Answers inference requests, whatever they come through.

    Attributes:
        infer: ``(call, body)`` to the encoded answer, or None when it comes later through ``call``; it raises the
            MmcoreError that refuses the request. The compiled path, which hands on what is not common.
    """

    def __init__(
        self,
        router: Router,
        names: Names,
        regions: SharedMemory,
        tracing: Tracing,
        waiting: Waiting,
        responses: ResponseCache,
        mesh: Mesh | None = None,
    ) -> None:
        self._router = router
        self._names = names
        self._regions = regions
        self._tracing = tracing
        self._waiting = waiting
        self._responses = responses
        self._mesh = mesh
        self._path = CommonPath(router.lookup, self._uncommon, self._run, self._slow, self._refuse)
        self.infer: Callable[[Answer, bytes], Body | None] = self._path.infer
        tracing.on_change = self._follow_tracing

    def _follow_tracing(self, active: bool) -> None:
        self._path.tracing = active

    def configured(self, method: str, config: Callable[[], DataplaneConfig]) -> Callable[[Answer, bytes], Body | None]:
        """A handler like :attr:`infer` that finds the model where ``config`` says for ``method``."""

        def infer(call: Answer, body: bytes) -> Body | None:
            started = now_ns()
            rpc = config().of(method)
            request = decode_infer_request(body)
            name = find_string(body, rpc.path or _NAME_PATH)
            if name:
                return self._ask(call, request, name, rpc.kind, started)
            return self._ask_all(call, request, asked(call.metadata), started)

        return infer

    def apart(self, call: Answer, body: bytes) -> Body | None:
        """As :attr:`infer`, by the way that tells its stages: never merged in the compiled path."""
        started = now_ns()
        request = decode_infer_request(body)
        copy = self._router.lookup(request.model_name, request.model_version)
        return self._uncommon(call, request, copy, started)

    def _uncommon(self, call: Answer, request: InferRequest, copy: Copy | None, started: int) -> Body | None:
        """A request whose copy is not here, that names its model in the metadata, or that has parameters."""
        if copy is not None:
            return self._bind_and_run(call, request, copy, started, 0)
        if request.model_name:
            return self._ask(call, request, request.model_name, Kind.ANY, started)
        return self._ask_all(call, request, asked(call.metadata), started)

    def _ask_all(self, call: Answer, request: InferRequest, models: Asked, started: int) -> Body | None:
        """Ask the models that the metadata names; the answers of several make one."""
        # One that was passed on is for one of them, which comes with it.
        arrival = arrival_of(call) if self._mesh is not None else None
        if len(models.ids) == 1 or (arrival is not None and arrival.model):
            return self._ask(call, request, models.ids[0], models.kind, started)

        def ask(part: Answer, name: str) -> Body | None:
            return self._ask(part, request, name, models.kind, started)

        self._waiting.start(call, ask_several(call, models, self._names, ask), "ModelInfer")
        return None

    def _ask(self, call: Answer, request: InferRequest, name: str, kind: Kind, started: int) -> Body | None:
        """Ask one model, at once if it is here or another instance is known to have it."""
        if self._mesh is not None and (arrival := arrival_of(call)) is not None and arrival.model:
            name, kind = arrival.model, Kind.MODEL
        try:
            model = self._names.model(name, kind)
        except NotFound:
            pass
        else:
            copy = self._router.lookup_model(model, request.model_version)
            if copy is not None:
                return self._bind_and_run(call, request, copy, started, 0)
            if self._passed_on(call, request, model, started):
                return None
        self._waiting.start(call, self._find_and_infer(call, request, name, kind, started), "ModelInfer")
        return None

    def _passed_on(self, call: Answer, request: InferRequest, model: str, started: int) -> bool:
        """Whether another instance answers, or has been asked to."""
        if self._mesh is None or self._router.in_folder(model):
            return False

        trace = call.trace if isinstance(call, WatchedCall) else None

        def here() -> None:
            if trace is not None:
                trace.forwarded()
            self._waiting.start(call, self._load_and_infer(call, request, model, started), "ModelInfer")

        resolved = model != request.model_name
        if trace is None:
            return self._mesh.pass_on(call, request.body, model, here, resolved=resolved, path=MODEL_INFER)
        trace.forwarding()
        passed = self._mesh.pass_on(call, request.body, model, here, resolved=resolved, path=MODEL_INFER)
        if not passed:
            trace.forwarded(happened=False)
        return passed

    async def _find_and_infer(
        self, call: Answer, request: InferRequest, name: str, kind: Kind, started: int
    ) -> Body | None:
        """The way of a request whose model is not here, and may not be known here yet."""
        model = await self._names.find(name, kind)
        if self._passed_on(call, request, model, started):
            return None
        try:
            return await self._load_and_infer(call, request, model, started)
        except NotFound:
            # A vmodel may have been moved on meanwhile, and what it stood for deleted.
            moved_to = await self._names.find(name, kind)
            if moved_to == model:
                raise
            return await self._load_and_infer(call, request, moved_to, started)

    async def _load_and_infer(self, call: Answer, request: InferRequest, model: str, started: int) -> Body | None:
        """The way of a request whose model is to be loaded here."""
        trace = call.trace if isinstance(call, WatchedCall) else None
        asked_ns = time.time_ns()
        try:
            copy = await self._router.load(model, request.model_version)
        except LoadFailed as failure:
            if trace is not None:
                trace.part("load", asked_ns, time.time_ns(), model=model, failed=1)
                trace.forwarding()
            resolved = model != request.model_name
            if self._mesh is None or not self._mesh.load_elsewhere(
                call, request.body, model, failure, resolved=resolved, path=MODEL_INFER
            ):
                raise
            return None
        if trace is not None:
            _trace_load(trace, copy, asked_ns)
        waited_ns = now_ns() - started
        self._router.cache.counted.miss_seconds.observe(waited_ns * 1e-9)
        return self._bind_and_run(call, request, copy, started, waited_ns, stays=True)

    def _bind_and_run(
        self, call: Answer, request: InferRequest, copy: Copy, started: int, queue_ns: int, *, stays: bool = False
    ) -> Body | None:
        if copy.prepared is None:
            lane = self._router.execution.lane(copy)
            # Requests that wait for others by the clock do so in the execution.
            shelf = Shelf(self._responses, copy.name, copy.version) if copy.source.settings.response_cache else None
            copy.prepared = Prepared(
                copy,
                None if lane.delays else lane.merging,
                lane.most_rows,
                shelf,
                lane.free if lane.instances else None,
            )
        try:
            inputs = copy.signature.bind(request) if request.plain else bind_tensors(request, copy, self._regions)
        except Exception:
            copy.statistics.fail(now_ns() - started)
            raise
        return self._run(call, request, copy, inputs, started, now_ns(), queue_ns, stays=stays)

    def _run(
        self,
        call: Answer,
        request: InferRequest,
        copy: Copy,
        inputs: dict[str, NDArray[Any]],
        started: int,
        bound: int,
        queue_ns: int = 0,
        *,
        stays: bool = False,
    ) -> Body | None:
        """Run a bound request where its model's speed says, and learn from it.

        It came at ``started`` and has waited ``queue_ns`` of the time until ``bound`` for its copy. Where others wait
        for that copy, and unless it ``stays``, another instance may answer it.
        """
        if copy.in_flight >= SHARED_FROM and not stays and self._shared(call, request, copy, started):
            return None
        under_way = UnderWay(self, call, request, copy, inputs, started, bound, queue_ns)
        rows = rows_of(inputs)
        try:
            priority, timeout_us = schedule_of(request)
            outputs = self._router.infer(
                copy,
                inputs,
                request.output_names,
                under_way.done,
                call,
                priority=priority,
                timeout_us=timeout_us,
            )
            if outputs is None:
                copy.prepared.allow(rows, False)
                return None
            copy.prepared.allow(rows, copy.lane.runs_inline(copy.lane.pace(rows)))
            return self.answer(under_way, outputs, now_ns() - bound)
        except Exception:
            copy.statistics.fail(now_ns() - started)
            raise

    def _shared(self, call: Answer, request: InferRequest, copy: Copy, started: int) -> bool:
        """Whether another instance, which has less to do, has been asked to answer."""
        model = copy.name
        if self._mesh is None or self._router.in_folder(model) or balanced(call.metadata):
            return False

        def here() -> None:
            self._waiting.start(call, self._load_and_infer(call, request, model, started), "ModelInfer")

        resolved = model != request.model_name
        return self._mesh.share(call, request.body, model, here, path=MODEL_INFER, resolved=resolved)

    def _slow(self, copy: Copy, rows: int, elapsed_ns: int) -> None:
        """An inference in the compiled path took longer than one should there."""
        copy.lane.pace(rows).ran_inline(elapsed_ns)

    def _refuse(self, call: Answer, error: BaseException, what: str) -> None:
        """Answer a gathered request with the error that it or its model has raised."""
        refuse(call, error, what)

    def answer(self, done: UnderWay, outputs: Sequence[OutputTensor], infer_ns: int, ran: Ran | None = None) -> Body:
        """Encode the outputs and count the request; ``ran``: with others perhaps."""
        request, copy = done.request, done.copy
        ended = now_ns()
        message: Body
        if request.plain and not request.parameters:
            message = encode_infer_response(copy.name, copy.version, request.id, outputs, raw=request.raw)
            copy.prepared.keep(request, message)
        else:
            message = answer_with_parameters(request, copy, outputs, self._regions)
        encoded = now_ns()
        input_ns = done.bound - done.started - done.queue_ns
        rows = rows_of(done.inputs) if copy.prepared.batched else 1
        if ran is None or ran.rows <= rows:
            copy.statistics.record(rows, done.queue_ns, input_ns, infer_ns, encoded - ended)
        else:
            copy.statistics.record_part(ran.rows, rows, ran.leads, done.queue_ns, input_ns, infer_ns, encoded - ended)
        if self._tracing.active:
            self._trace(done, infer_ns, ended, encoded)
        if isinstance(done.call, WatchedCall) and done.call.trace is not None:
            _trace_inference(done.call.trace, done, infer_ns, ended)
        return message

    def _trace(self, done: UnderWay, infer_ns: int, ended: int, encoded: int) -> None:
        # Names and order are those of Triton's trace extension.
        stamps = {
            "REQUEST_START": done.started,
            "QUEUE_START": done.started,
            "COMPUTE_START": ended - infer_ns - (done.bound - done.started - done.queue_ns),
            "COMPUTE_INPUT_END": ended - infer_ns,
            "COMPUTE_OUTPUT_START": ended,
            "COMPUTE_END": encoded,
            "REQUEST_END": encoded,
        }
        self._tracing.observe(done.copy.name, done.copy.version, done.request.id, stamps)


class UnderWay:
    """One request between its binding and its answer. Times are nanoseconds of the monotonic clock."""

    __slots__ = ("_inference", "bound", "call", "copy", "inputs", "queue_ns", "request", "started")

    def __init__(
        self,
        inference: Inference,
        call: Answer,
        request: InferRequest,
        copy: Copy,
        inputs: dict[str, NDArray[Any]],
        started: int,
        bound: int,
        queue_ns: int,
    ) -> None:
        self._inference = inference
        self.call = call
        self.request = request
        self.copy = copy
        self.inputs = inputs
        self.started = started
        self.bound = bound
        self.queue_ns = queue_ns

    def done(self, outputs: Sequence[OutputTensor] | None, error: BaseException | None, ran: Ran) -> None:
        """Take the result of an inference that ran in a thread, and answer the caller."""
        try:
            if error is not None:
                raise error
            assert outputs is not None
            # What it waited for a thread lies after the binding; it is moved to the front with the rest of the queue.
            self.queue_ns += ran.queue_ns
            self.started -= ran.queue_ns
            rows = rows_of(self.inputs)
            # One measurement may be enough to let the next request take the compiled path.
            self.copy.prepared.allow(rows, self.copy.lane.runs_inline(self.copy.lane.pace(rows)))
            self.call.reply(self._inference.answer(self, outputs, ran.infer_ns, ran))
        except Exception as failure:
            self.copy.statistics.fail(now_ns() - self.started)
            refuse(self.call, failure, f"inference of model {self.copy.name}")


def _trace_load(trace: RequestTrace, copy: Copy, asked_ns: int) -> None:
    """The load that a request waited for, and what it consists of as far as it lies within the request."""
    ended_ns = time.time_ns()
    trace.part("load", asked_ns, ended_ns, model=copy.name, version=copy.version, bytes=copy.weight)
    ends_at = ended_ns - round(copy.times.publish_s * 1e9)
    for name, seconds in (("open", copy.times.open_s), ("pull", copy.times.find_s)):
        began_at = ends_at - round(seconds * 1e9)
        trace.part(name, began_at, ends_at, model=copy.name)
        ends_at = began_at - round(copy.times.room_s * 1e9)


def _trace_inference(trace: RequestTrace, done: UnderWay, infer_ns: int, ended: int) -> None:
    """The queue and the model; the stamps are of the monotonic clock."""
    to_wall = time.time_ns() - now_ns()
    computing = ended - infer_ns
    trace.part("queue", done.started + to_wall, computing + to_wall, model=done.copy.name)
    trace.part("compute", computing + to_wall, ended + to_wall, model=done.copy.name, version=done.copy.version)
    trace.note(model=done.copy.name, version=done.copy.version)
