"""Fuzz targets for the V2 codec: any bytes are read or refused, and what was read can be written and read again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcore._ext.pbwire import find_field, find_string, replace_string
from mmcore._ext.tensor import array_from_raw, array_to_raw, parse_bytes_tensor, serialize_bytes_tensor
from mmcore._ext.v2codec import (
    InferTensor,
    Signature,
    decode_infer_request,
    decode_infer_response,
    encode_infer_request,
    encode_infer_response,
)
from mmcore.errors import InvalidRequest
from mmcore.model import NUMPY_DTYPES, TensorSpec

PATHS = ((1,), (5, 1), (5, 4, 2, 3), (2, 5, 5, 8))
SIGNATURES = (
    Signature([TensorSpec("INPUT0", "FP32", (-1, -1))]),
    Signature([TensorSpec("INPUT0", "INT32", (-1, 16)), TensorSpec("INPUT1", "INT32", (-1, 16))]),
    Signature([TensorSpec("x", "BYTES", (-1,))], any_name=True),
)


def fuzz_one(data: bytes) -> None:
    """All of them with these bytes; an assertion or another exception than a refusal is a finding."""
    for target in (protobuf, v2_request, v2_response, tensor):
        target(data)


def protobuf(data: bytes) -> None:
    """Strings found and replaced in any message."""
    for path in PATHS:
        try:
            place = find_field(data, path)
            replaced = replace_string(data, path, "a name of another length")
            assert find_string(replaced, path) == "a name of another length"
            assert place is None or 0 <= place[0] <= place[1] <= len(data)
            find_string(data, path)
        except InvalidRequest:
            continue


def v2_request(data: bytes) -> None:
    """ModelInferRequest, both ways."""
    try:
        request = decode_infer_request(data)
    except InvalidRequest:
        return
    for signature in SIGNATURES:
        try:
            signature.bind(request)
        except InvalidRequest:
            continue
    names = [(output.name, output.parameters) for output in request.outputs]
    assert tuple(name for name, _ in names) == request.output_names
    arrays = _arrays(request.inputs)
    for raw in (True, False):
        again = decode_infer_request(
            encode_infer_request(
                request.model_name,
                arrays,
                model_version=request.model_version,
                request_id=request.id,
                outputs=request.output_names,
                raw=raw,
                parameters=request.parameters,
            )
        )
        assert (again.model_name, again.model_version, again.id) == (
            request.model_name, request.model_version, request.id,
        )  # fmt: skip
        assert again.output_names == request.output_names
        _same(_arrays(again.inputs), arrays)


def v2_response(data: bytes) -> None:
    """ModelInferResponse, both ways."""
    try:
        response = decode_infer_response(data)
    except InvalidRequest:
        return
    arrays = _arrays(response.outputs)
    for raw in (True, False):
        message = encode_infer_response(
            response.model_name, response.model_version, response.id, arrays, raw=raw, parameters=response.parameters
        )
        again = decode_infer_response(message if isinstance(message, bytes) else b"".join(message))
        assert again.id == response.id
        _same(_arrays(again.outputs), arrays)


def _arrays(tensors: tuple[InferTensor, ...]) -> list[tuple[str, str, NDArray[Any]]]:
    """Those tensors that hold together."""
    found = []
    for tensor in tensors:
        repr((tensor, tensor.parameters))
        try:
            found.append((tensor.name, tensor.datatype, tensor.array()))
        except InvalidRequest:
            continue
    return found


def _same(got: list[tuple[str, str, NDArray[Any]]], expected: list[tuple[str, str, NDArray[Any]]]) -> None:
    assert [one[:2] for one in got] == [one[:2] for one in expected]
    for (_, _, array), (_, _, wanted) in zip(got, expected, strict=True):
        assert array.shape == wanted.shape
        assert np.array_equal(array, wanted, equal_nan=wanted.dtype.kind == "f")


def tensor(data: bytes) -> None:
    """Raw contents and BYTES' framing: the first bytes choose datatype and shape, the rest are contents."""
    if len(data) < 3:
        return
    datatype = sorted(NUMPY_DTYPES)[data[0] % len(NUMPY_DTYPES)]
    shape = [data[1] % 5, data[2] % 5][: data[1] % 3]
    try:
        array = array_from_raw(datatype, shape, memoryview(data)[3:])
    except InvalidRequest:
        pass
    else:
        if datatype not in ("BOOL", "BF16"):  # these do not keep every bit
            assert bytes(array_to_raw(datatype, array)) == data[3:]
    try:
        assert serialize_bytes_tensor(parse_bytes_tensor(data, shape)) == data
    except InvalidRequest:
        return
