"""Requests with parameters: tensors in shared memory, classification, and the answer's own parameters.

The plain request, whose tensors are all in the message, does not come here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from numpy.typing import NDArray

from mmcore._ext.tensor import array_from_raw, array_to_raw
from mmcore._ext.v2codec import InferRequest, InferTensor, Param, RequestedOutput, encode_infer_response
from mmcore.cache import Copy
from mmcore.errors import InvalidRequest
from mmcore.runtimes import OutputTensor
from mmcore.server.calls import Body
from mmcore.server.classification import classify
from mmcore.server.shared_memory import SharedMemory

REGION: Final = "shared_memory_region"
BYTE_SIZE: Final = "shared_memory_byte_size"
OFFSET: Final = "shared_memory_offset"
CLASSIFICATION: Final = "classification"

_PRIORITY: Final = "priority"
_TIMEOUT: Final = "timeout"

#: Parameters of a request that tell this server something; they are not for the answer (Triton, parameters extension).
_INSTRUCTIONS: Final = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", _PRIORITY, _TIMEOUT, "headers", "binary_data_output"}
)
_RESERVED_PREFIX: Final = "triton_"


def bind_tensors(request: InferRequest, copy: Copy, regions: SharedMemory) -> dict[str, NDArray[Any]]:
    """The request's data by the model's input names, as ``Signature.bind`` gives it.

    Raises:
        InvalidRequest: data and signature disagree, or a tensor is not where its parameters say.
    """
    if not request.shared_memory:
        return copy.signature.bind(request)
    arrays = {}
    for tensor in request.inputs:
        if tensor.name in arrays:
            raise InvalidRequest(f"input '{tensor.name}' for model '{copy.name}' is given twice")
        arrays[tensor.name] = tensor.datatype, _shared_array(tensor, regions)
    return copy.signature.bind_arrays(arrays, model_name=copy.name)


def answer_with_parameters(
    request: InferRequest, copy: Copy, outputs: Sequence[OutputTensor], regions: SharedMemory
) -> Body:
    """The encoded ModelInferResponse, each output as the request asks for it.

    Raises:
        InvalidRequest: an output has no classes, or does not fit the shared memory it was to go to.
    """
    wanted = {output.name: output for output in request.outputs}
    answered: list[tuple[str, str, NDArray[Any] | tuple[int, ...]]] = []
    parameters: dict[str, Mapping[str, Param]] = {}
    for name, datatype, array in outputs:
        asked = wanted[name].parameters if name in wanted else {}
        if CLASSIFICATION in asked:
            count = _whole(asked, CLASSIFICATION, f"output '{name}'")
            array = classify(name, datatype, array, count, copy.source.settings.labels.get(name, ()))
            datatype = "BYTES"
        if REGION in asked:
            parameters[name] = _put(wanted[name], datatype, array, regions)
            answered.append((name, datatype, array.shape))
        else:
            answered.append((name, datatype, array))
    return encode_infer_response(
        copy.name,
        copy.version,
        request.id,
        answered,
        # Typed contents cannot be left out for one output, and clients read shared memory beside raw contents.
        raw=request.raw or request.shared_memory or bool(parameters),
        parameters=echoed(request.parameters),
        output_parameters=parameters,
    )


def schedule_of(request: InferRequest) -> tuple[int, int]:
    """Priority and timeout in microseconds as a request's parameters say (Triton, schedule policy extension), else 0.

    Raises:
        InvalidRequest: one of them is no whole number.
    """
    parameters = request.parameters
    if not parameters:
        return 0, 0
    priority = _whole(parameters, _PRIORITY, "request", absent=0)
    return priority, _whole(parameters, _TIMEOUT, "request", absent=0)


def echoed(parameters: Mapping[str, Param]) -> dict[str, Param]:
    """The request's own parameters that come back with the answer."""
    return {
        name: value
        for name, value in parameters.items()
        if name not in _INSTRUCTIONS and not name.startswith(_RESERVED_PREFIX)
    }


def _shared_array(tensor: InferTensor, regions: SharedMemory) -> NDArray[Any]:
    where = f"input '{tensor.name}'"
    parameters = tensor.parameters
    if REGION not in parameters:
        return tensor.array()
    region = regions.region(_text(parameters, REGION, where))
    data = region.read(_whole(parameters, OFFSET, where, absent=0), _whole(parameters, BYTE_SIZE, where))
    try:
        return array_from_raw(tensor.datatype, tensor.shape, data)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where} in shared memory region '{region.name}': {error}") from None


def _put(output: RequestedOutput, datatype: str, array: NDArray[Any], regions: SharedMemory) -> dict[str, Param]:
    """Write one output to the region it is to go to; the parameters that say so in the answer."""
    where = f"output '{output.name}'"
    region = regions.region(_text(output.parameters, REGION, where))
    offset = _whole(output.parameters, OFFSET, where, absent=0)
    room = _whole(output.parameters, BYTE_SIZE, where)
    data = array_to_raw(datatype, array)
    size = memoryview(data).nbytes
    if size > room:
        raise InvalidRequest(
            f"shared memory size specified with the request for {where} ({room} bytes) should be at least {size} bytes "
            "to hold the results"
        )
    region.check(offset, room)
    region.write(offset, data)
    told: dict[str, Param] = {REGION: region.name, BYTE_SIZE: size}
    if offset:
        told[OFFSET] = offset
    return told


def _text(parameters: Mapping[str, Param], name: str, where: str) -> str:
    value = parameters[name]
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}: parameter {name} must be a string, got {value!r}")
    return value


def _whole(parameters: Mapping[str, Param], name: str, where: str, *, absent: int | None = None) -> int:
    value = parameters.get(name, absent)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest(f"{where}: parameter {name} must be a whole number from 0 on, got {value!r}")
    return value
