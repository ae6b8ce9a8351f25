"""KServe's V1 protocol: ``{"instances": …}`` to ``{"predictions": …}``, by way of a V2 inference.

Instances are rows: arrays of numbers for a model of one input, or objects with a value for each input by name.
``{"inputs": …}`` gives whole columns instead. A model of one output answers its rows, one of several an object for each
row with a value for each output by name. Of scikit-learn, XGBoost and LightGBM a row with one value is answered as that
value, as KServe's servers for these do; V2 has it as a row of one, as MLServer does.

What is large is read and written in a thread and piece by piece, as :mod:`mmcore.server.rest.large` does; only rows
that are objects are read in one go.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from mmcore._ext.v2codec import InferResponse
from mmcore.errors import InvalidRequest
from mmcore.pb import inference_pb2
from mmcore.server.rest.inference import message_of
from mmcore.server.rest.large import LARGE_BYTES, LARGE_ELEMENTS, Numbers, without_numbers
from mmcore.server.rest.tensors import elements_of, loads

#: The platforms whose one-dimensional answers have been given a trailing dimension for V2.
_ROWS_OF_ONE: Final = frozenset({"sklearn", "xgboost", "lightgbm"})
_NUMPY: Final = orjson.OPT_SERIALIZE_NUMPY
#: Stands in a document for numbers that have been taken out; as a value it would be none of V1's.
_STAND_IN: Final = b'{"":%d}'
Described = inference_pb2.ModelMetadataResponse.TensorMetadata


def request_of(name: str, body: bytes | bytearray, inputs: Sequence[Described]) -> tuple[bytes, bool]:
    """The encoded ModelInferRequest that a V1 request stands for, and whether it gives rows.

    Raises:
        InvalidRequest: it is none, or not one for the model.
    """
    large: list[Numbers] = []
    if len(body) > LARGE_BYTES:
        # Within rows the inputs' names are keys of single elements.
        keys = ["instances"] if b'"instances"' in body else ["inputs", *(spec.name for spec in inputs)]
        body, large = without_numbers(body, keys, _STAND_IN)
    document = loads(body)
    message, _ = message_of(name, "", v2_document(document, inputs, large), memoryview(b""), large)
    return message, "instances" in document


def v2_document(document: object, inputs: Sequence[Described], large: Sequence[Numbers] = ()) -> dict[str, Any]:
    """The V2 request that a V1 request stands for; ``large`` holds numbers that have been taken out.

    Raises:
        InvalidRequest: it is none, or has not all of the model's inputs.
    """
    if not isinstance(document, dict):
        raise InvalidRequest("expected the request to be a JSON object")
    instances, columns = document.get("instances"), document.get("inputs")
    if (instances is None) == (columns is None):
        raise InvalidRequest("expected either 'instances' or 'inputs'")
    if instances is not None:
        if _taken_out(instances, large) is None and (not isinstance(instances, list) or not instances):
            raise InvalidRequest("instances: expected an array with at least one element")
        columns = _columns(instances, inputs)
    elif not isinstance(columns, dict) or _taken_out(columns, large) is not None:
        columns = {_only(inputs).name: columns}
    tensors = []
    for spec in inputs:
        if spec.name not in columns:
            raise InvalidRequest(f"expected a value for the input '{spec.name}', got {sorted(columns)}")
        data = columns[spec.name]
        at = _taken_out(data, large)
        if at is not None:
            data, shape = at, large[at].shape(f"input '{spec.name}'")
        else:
            data = data if isinstance(data, list) else [data]
            shape = _shape_of(data)
        tensors.append({"name": spec.name, "datatype": spec.datatype, "shape": shape, "data": data})
    return {"inputs": tensors}


def predictions_of(response: InferResponse, rows: bool, *, platform: str = "") -> Any:
    """What goes under ``predictions``: the only output's elements nested as its shape is, or all outputs by name."""
    if len(response.outputs) == 1:
        (tensor,) = response.outputs
        values = tensor.array()
        if platform in _ROWS_OF_ONE and values.shape[1:] == (1,):
            values = values.ravel()
        return _written(tensor.datatype, values)
    found = {tensor.name: _elements(tensor.datatype, tensor.array()) for tensor in response.outputs}
    lengths = {len(value) if isinstance(value, list) else -1 for value in found.values()}
    if not rows or len(lengths) != 1 or -1 in lengths:
        return found
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def _written(datatype: str, values: NDArray[Any]) -> Any:
    """The elements nested as their shape is; many rows of numbers as JSON that is written already."""
    if values.size < LARGE_ELEMENTS or datatype == "BYTES":
        return _elements(datatype, values)
    rows = max(1, LARGE_ELEMENTS * len(values) // values.size)
    pieces = []
    for start in range(0, len(values), rows):
        pieces.append(_json(datatype, np.ascontiguousarray(values[start : start + rows]))[1:-1])
        time.sleep(0)
    return orjson.Fragment(b"[%b]" % b",".join(pieces))


def _json(datatype: str, values: NDArray[Any]) -> bytes:
    elements, _ = elements_of(datatype, values)
    return orjson.dumps(_nested(elements, values.shape) if isinstance(elements, list) else values, option=_NUMPY)


def _elements(datatype: str, values: NDArray[Any]) -> Any:
    elements, _ = elements_of(datatype, values)
    flat = elements if isinstance(elements, list) else loads(orjson.dumps(elements, option=_NUMPY))
    return _nested(flat, values.shape)


def _taken_out(value: object, large: Sequence[Numbers]) -> int | None:
    """Which of the numbers that have been taken out a value stands for."""
    if isinstance(value, dict) and list(value) == [""] and isinstance(value[""], int) and 0 <= value[""] < len(large):
        return value[""]
    return None


def _columns(instances: Any, inputs: Sequence[Described]) -> Mapping[str, Any]:
    if not isinstance(instances, list) or not isinstance(instances[0], dict):
        return {_only(inputs).name: instances}
    names = instances[0].keys()
    for at, instance in enumerate(instances):
        if not isinstance(instance, dict) or instance.keys() != names:
            raise InvalidRequest(f"instances[{at}]: expected an object with values for {sorted(names)}")
    return {name: [instance[name] for instance in instances] for name in names}


def _only(inputs: Sequence[Described]) -> Described:
    if not inputs:
        raise InvalidRequest("the model's metadata tells no inputs, which V1 needs; ask it by /v2/models/NAME/infer")
    if len(inputs) != 1:
        names = [spec.name for spec in inputs]
        raise InvalidRequest(f"expected objects with a value for each of the inputs {names}, got arrays")
    return inputs[0]


def _shape_of(data: list[Any]) -> list[int]:
    shape = []
    level: Any = data
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
    return shape


def _nested(flat: list[Any], shape: Sequence[int]) -> Any:
    if not shape:
        return flat[0]
    for size in reversed(shape[1:]):
        flat = [flat[at : at + size] for at in range(0, len(flat), size)] if size else []
    return flat
