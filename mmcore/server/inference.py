"""ModelInfer: from a request's bytes to its answer's.

The common request (all tensors in the message, its copy loaded, the model fast enough for the loop) is answered by
``ext/infer.pyx`` in one call without a task, a future or a log line. What has to wait, for a load or for a thread, or
has parameters, comes here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from numpy.typing import NDArray

from mmcore._ext.infer import CommonPath, Prepared
from mmcore._ext.rates import now_ns
from mmcore._ext.responses import ResponseCache, Shelf
from mmcore._ext.v2codec import InferRequest, encode_infer_response
from mmcore.batching.execution import Ran, rows_of
from mmcore.cache import Copy
from mmcore.errors import InvalidRequest
from mmcore.routing import Router
from mmcore.runtimes import OutputTensor
from mmcore.server.calls import Answer, Body, Waiting, refuse
from mmcore.server.shared_memory import SharedMemory
from mmcore.server.tensors import answer_with_parameters, bind_tensors, schedule_of
from mmcore.server.tracing import Tracing

#: Metadata that names the model where the message does not (ModelMesh: a vmodel goes before a model).
_NAME_HEADERS: Final = ("mm-vmodel-id", "mm-model-id", "mm-vmodel-id-bin", "mm-model-id-bin")


class Inference:
    """Answers inference requests, whatever they come through.

    Attributes:
        infer: ``(call, body)`` to the encoded answer, or None when it comes later through ``call``; it raises the
            MmcoreError that refuses the request. The compiled path, which hands on what is not common.
    """

    def __init__(
        self,
        router: Router,
        regions: SharedMemory,
        tracing: Tracing,
        waiting: Waiting,
        responses: ResponseCache,
    ) -> None:
        self._router = router
        self._regions = regions
        self._tracing = tracing
        self._waiting = waiting
        self._responses = responses
        self._path = CommonPath(router.lookup, self._uncommon, self._run, self._slow, self._refuse)
        self.infer: Callable[[Answer, bytes], Body | None] = self._path.infer
        tracing.on_change = self._follow_tracing

    def _follow_tracing(self, active: bool) -> None:
        self._path.tracing = active

    def _uncommon(self, call: Answer, request: InferRequest, copy: Copy | None, started: int) -> Body | None:
        """A request whose copy is not here, or that has parameters."""
        if copy is None:
            self._waiting.start(call, self._load_and_infer(call, request, started), "ModelInfer")
            return None
        return self._bind_and_run(call, request, copy, started, 0)

    async def _load_and_infer(self, call: Answer, request: InferRequest, started: int) -> Body | None:
        """The way of a request whose model is not here, or that names it in the metadata."""
        name = request.model_name or _named_by(call.metadata)
        copy = self._router.lookup(name, request.model_version)
        if copy is None:
            copy = await self._router.load(name, request.model_version)
        return self._bind_and_run(call, request, copy, started, now_ns() - started)

    def _bind_and_run(
        self, call: Answer, request: InferRequest, copy: Copy, started: int, queue_ns: int
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
        return self._run(call, request, copy, inputs, started, now_ns(), queue_ns)

    def _run(
        self,
        call: Answer,
        request: InferRequest,
        copy: Copy,
        inputs: dict[str, NDArray[Any]],
        started: int,
        bound: int,
        queue_ns: int = 0,
    ) -> Body | None:
        """Run a bound request where its model's speed says, and learn from it.

        It came at ``started`` and has waited ``queue_ns`` of the time until ``bound`` for its copy.
        """
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
            self.call.reply(self._inference.answer(self, outputs, ran.infer_ns, ran))
        except Exception as failure:
            self.copy.statistics.fail(now_ns() - self.started)
            refuse(self.call, failure, f"inference of model {self.copy.name}")


def _named_by(metadata: tuple[tuple[str, str | bytes], ...]) -> str:
    """The model's name from the metadata, as clients of ModelMesh give it."""
    found = dict(metadata)
    for header in _NAME_HEADERS:
        value = found.get(header)
        if value:
            return value.decode(errors="replace") if isinstance(value, bytes) else value
    raise InvalidRequest("the request names no model: model_name is empty and there is no mm-model-id in the metadata")
