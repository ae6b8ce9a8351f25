"""ModelInfer: from a request's bytes to its answer's.

The common request (all tensors in the message, its copy loaded, the model fast enough for the loop) is answered in one
call without a task, a future or a log line. What has to wait, for a load or for a thread, goes the longer way from
the point where it must.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from numpy.typing import NDArray

from mmcore._ext.rates import now_ns
from mmcore._ext.v2codec import InferRequest, decode_infer_request, encode_infer_response
from mmcore.batching.execution import rows_of
from mmcore.cache import Copy
from mmcore.errors import InvalidRequest
from mmcore.routing import Router
from mmcore.runtimes import OutputTensor
from mmcore.server.calls import Answer, Body, Waiting, refuse
from mmcore.server.shared_memory import SharedMemory
from mmcore.server.tensors import answer_with_parameters, bind_tensors
from mmcore.server.tracing import Tracing

#: Metadata that names the model where the message does not (ModelMesh: a vmodel goes before a model).
_NAME_HEADERS: Final = ("mm-vmodel-id", "mm-model-id", "mm-vmodel-id-bin", "mm-model-id-bin")


class Inference:
    """Answers inference requests, whatever they come through."""

    __slots__ = ("_lookup", "_regions", "_router", "_run", "_tracing", "_waiting")

    def __init__(self, router: Router, regions: SharedMemory, tracing: Tracing, waiting: Waiting) -> None:
        self._router = router
        self._regions = regions
        self._tracing = tracing
        self._waiting = waiting
        self._lookup: Callable[[str, str], Copy | None] = router.lookup
        self._run = router.infer

    def infer(self, call: Answer, body: bytes) -> Body | None:
        """The encoded answer, or None when it comes later through ``call``.

        Raises:
            MmcoreError: whatever refuses the request, as the status it is to be answered with.
        """
        started = now_ns()
        request = decode_infer_request(body)
        copy = self._lookup(request.model_name, request.model_version)
        if copy is None:
            self._waiting.start(call, self._load_and_infer(call, request, started), "ModelInfer")
            return None
        return self._infer(call, request, copy, started, 0)

    def _infer(self, call: Answer, request: InferRequest, copy: Copy, started: int, queue_ns: int) -> Body | None:
        """Answer with a loaded copy, which the request has waited ``queue_ns`` for since it came at ``started``."""
        try:
            inputs = copy.signature.bind(request) if request.plain else bind_tensors(request, copy, self._regions)
            under_way = UnderWay(self, call, request, copy, inputs, started, now_ns(), queue_ns)
            outputs = self._run(copy, inputs, request.output_names, under_way.done, call)
            if outputs is None:
                return None
            return self.answer(under_way, outputs, now_ns() - under_way.bound)
        except Exception:
            copy.statistics.fail(now_ns() - started)
            raise

    def answer(self, done: UnderWay, outputs: Sequence[OutputTensor], infer_ns: int) -> Body:
        """Encode the outputs and count the request."""
        request, copy = done.request, done.copy
        ended = now_ns()
        message: Body
        if request.plain and not request.parameters:
            message = encode_infer_response(copy.name, copy.version, request.id, outputs, raw=request.raw)
        else:
            message = answer_with_parameters(request, copy, outputs, self._regions)
        encoded = now_ns()
        input_ns = done.bound - done.started - done.queue_ns
        copy.statistics.record(rows_of(done.inputs), done.queue_ns, input_ns, infer_ns, encoded - ended)
        if self._tracing.active:
            self._trace(done, infer_ns, ended, encoded)
        return message

    async def _load_and_infer(self, call: Answer, request: InferRequest, started: int) -> Body | None:
        """The way of a request whose model is not here, or that names it in the metadata."""
        name = request.model_name or _named_by(call.metadata)
        copy = self._lookup(name, request.model_version) or await self._router.load(name, request.model_version)
        return self._infer(call, request, copy, started, now_ns() - started)

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
        inputs: Mapping[str, NDArray[Any]],
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

    def done(
        self, outputs: Sequence[OutputTensor] | None, error: BaseException | None, queue_ns: int, infer_ns: int
    ) -> None:
        """Take the result of an inference that ran in a thread, and answer the caller."""
        try:
            if error is not None:
                raise error
            assert outputs is not None
            # What it waited for a thread lies after the binding; it is moved to the front with the rest of the queue.
            self.queue_ns += queue_ns
            self.started -= queue_ns
            self.call.reply(self._inference.answer(self, outputs, infer_ns))
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
