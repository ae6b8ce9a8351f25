"""KServe's V1 protocol: ``{"instances": …}`` to ``{"predictions": …}``, by way of a V2 inference.

Instances are rows: arrays of numbers for a model of one input, or objects with a value for each input by name.
``{"inputs": …}`` gives whole columns instead. A model of one output answers its rows, one of several an object for each
row with a value for each output by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from mmcore._ext.v2codec import InferResponse
from mmcore.errors import InvalidRequest
from mmcore.pb import inference_pb2
from mmcore.server.rest.tensors import elements_of, loads

_NUMPY: Final = orjson.OPT_SERIALIZE_NUMPY
Described = inference_pb2.ModelMetadataResponse.TensorMetadata


def v2_document(document: object, inputs: Sequence[Described]) -> dict[str, Any]:
    """The V2 request that a V1 request stands for.

    Raises:
        InvalidRequest: it is none, or has not all of the model's inputs.
    """
    if not isinstance(document, dict):
        raise InvalidRequest("expected the request to be a JSON object")
    instances, columns = document.get("instances"), document.get("inputs")
    if (instances is None) == (columns is None):
        raise InvalidRequest("expected either 'instances' or 'inputs'")
    if instances is not None:
        if not isinstance(instances, list) or not instances:
            raise InvalidRequest("instances: expected an array with at least one element")
        columns = _columns(instances, inputs)
    elif not isinstance(columns, dict):
        columns = {_only(inputs).name: columns}
    tensors = []
    for spec in inputs:
        if spec.name not in columns:
            raise InvalidRequest(f"expected a value for the input '{spec.name}', got {sorted(columns)}")
        data = columns[spec.name]
        if not isinstance(data, list):
            data = [data]
        tensors.append({"name": spec.name, "datatype": spec.datatype, "shape": _shape_of(data), "data": data})
    return {"inputs": tensors}


def predictions_of(response: InferResponse, *, rows: bool) -> Any:
    """What goes under ``predictions``: the only output's elements nested as its shape is, or all outputs by name."""
    found = {}
    for tensor in response.outputs:
        elements, _ = elements_of(tensor.datatype, tensor.array())
        flat = elements if isinstance(elements, list) else loads(orjson.dumps(elements, option=_NUMPY))
        found[tensor.name] = _nested(flat, tensor.shape)
    if len(found) == 1:
        return next(iter(found.values()))
    lengths = {len(value) if isinstance(value, list) else -1 for value in found.values()}
    if not rows or len(lengths) != 1 or -1 in lengths:
        return found
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def _columns(instances: list[Any], inputs: Sequence[Described]) -> Mapping[str, Any]:
    if not isinstance(instances[0], dict):
        return {_only(inputs).name: instances}
    names = instances[0].keys()
    for at, instance in enumerate(instances):
        if not isinstance(instance, dict) or instance.keys() != names:
            raise InvalidRequest(f"instances[{at}]: expected an object with values for {sorted(names)}")
    return {name: [instance[name] for instance in instances] for name in names}


def _only(inputs: Sequence[Described]) -> Described:
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
