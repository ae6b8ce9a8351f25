"""The codec agrees with the protobuf runtime: on what is valid, on what it says, and on what it writes."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmcore._ext.v2codec import (
    InferRequest,
    InferResponse,
    InferTensor,
    decode_infer_request,
    decode_infer_response,
    encode_infer_request,
    encode_infer_response,
)
from mmcore.errors import InvalidRequest
from mmcore.model import NUMPY_DTYPES
from mmcore.pb import inference_pb2
from tests import wire

FIELDS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
many = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def told(parameters: Any) -> list[tuple[str, str]]:
    """Parameters of either side; repr tells True from 1 and compares NaN."""
    if isinstance(parameters, dict):
        return sorted((name, repr(value)) for name, value in parameters.items())
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    return sorted((name, repr(getattr(parameters[name], kind))) for name, kind in chosen.items() if kind)


def request_told(request: Any, *, with_parameters: bool = True) -> Any:
    head = (request.model_name, request.model_version, request.id)
    tensors = [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in request.inputs]
    outputs = [output.name for output in request.outputs]
    maps = (request, *request.inputs, *request.outputs) if with_parameters else ()
    return head, tensors, outputs, [told(holder.parameters) for holder in maps]


def response_told(response: Any) -> Any:
    head = (response.model_name, response.model_version, response.id)
    tensors = [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in response.outputs]
    return head, tensors, [told(holder.parameters) for holder in (response, *response.outputs)]


@many
@given(wire.requests)
def test_any_valid_request_is_read_as_protobuf_reads_it(body: bytes) -> None:
    expected = inference_pb2.ModelInferRequest.FromString(body)
    request = decode_infer_request(body)
    assert request_told(request) == request_told(expected)
    assert request.output_names == tuple(output.name for output in expected.outputs)


@many
@given(wire.responses)
def test_any_valid_response_is_read_as_protobuf_reads_it(body: bytes) -> None:
    assert response_told(decode_infer_response(body)) == response_told(
        inference_pb2.ModelInferResponse.FromString(body)
    )


@many
@given(wire.requests, wire.mutations)
def test_a_broken_request_is_refused_exactly_when_protobuf_refuses_it(
    body: bytes, changes: list[wire.Mutation]
) -> None:
    body = wire.mutated(body, changes)
    try:
        expected = inference_pb2.ModelInferRequest.FromString(body)
    except DecodeError:
        with pytest.raises(InvalidRequest, match="malformed ModelInferRequest"):
            decode_infer_request(body)
        return
    request = decode_infer_request(body)
    assert request_told(request, with_parameters=False) == request_told(expected, with_parameters=False)
    read_everything(request)


@many
@given(wire.responses, wire.mutations)
def test_a_broken_response_is_refused_exactly_when_protobuf_refuses_it(
    body: bytes, changes: list[wire.Mutation]
) -> None:
    body = wire.mutated(body, changes)
    try:
        inference_pb2.ModelInferResponse.FromString(body)
    except DecodeError:
        with pytest.raises(InvalidRequest, match="malformed ModelInferResponse"):
            decode_infer_response(body)
        return
    read_everything(decode_infer_response(body))


def read_everything(message: InferRequest | InferResponse) -> None:
    """Ask for all there is: arrays come or are refused, nothing else."""
    told(message.parameters)
    for tensor in message.inputs if isinstance(message, InferRequest) else message.outputs:
        told(tensor.parameters)
        try:
            array = tensor.array()
        except InvalidRequest:
            continue
        assert array.shape == tensor.shape
        assert array.dtype == NUMPY_DTYPES[tensor.datatype]


def test_every_truncation_of_a_request_is_answered() -> None:
    """At each offset as protobuf does it, and never past the end."""
    body = encode_infer_request(
        "model",
        [("a", "FP32", np.zeros((2, 3), np.float32)), ("b", "BYTES", np.array([b"x", b"yz"], object))],
        model_version="1", request_id="id", outputs=["o"], raw=False, parameters={"p": 1.5, "q": "text"},
        input_parameters={"a": {"k": True}},
    )  # fmt: skip
    for size in range(len(body)):
        cut = body[:size]
        try:
            expected = inference_pb2.ModelInferRequest.FromString(cut)
        except DecodeError:
            with pytest.raises(InvalidRequest):
                decode_infer_request(cut)
        else:
            assert request_told(decode_infer_request(cut)) == request_told(expected)


# ---- tensors


def elements(datatype: str) -> st.SearchStrategy[Any]:
    if datatype == "BYTES":
        return st.binary(max_size=6)
    dtype = NUMPY_DTYPES[datatype]
    if datatype == "BOOL":
        return st.booleans()
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return st.integers(int(limits.min), int(limits.max))
    widths: dict[int, Literal[16, 32, 64]] = {2: 16, 4: 32, 8: 64}
    return st.floats(width=widths[dtype.itemsize])


@st.composite
def arrays(draw: st.DrawFn, datatype: str) -> NDArray[Any]:
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    count = int(np.prod(shape, dtype=int))
    values = draw(st.lists(elements(datatype), min_size=count, max_size=count))
    flat = np.empty(count, NUMPY_DTYPES[datatype])
    flat[:] = values
    if datatype == "BF16":  # what it can hold
        flat = (flat.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    array = flat.reshape(shape)
    return np.asfortranarray(array) if draw(st.booleans()) else array


@st.composite
def named_arrays(draw: st.DrawFn, datatypes: tuple[str, ...]) -> list[tuple[str, str, NDArray[Any]]]:
    kinds = draw(st.lists(st.sampled_from(datatypes), max_size=6))
    return [(f"{draw(wire.texts)}{index}", kind, draw(arrays(kind))) for index, kind in enumerate(kinds)]


def same(got: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Equal bit for bit; a signalling NaN may come back quiet."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    return bool(np.array_equal(got, expected, equal_nan=expected.dtype.kind == "f"))


def raw_of(datatype: str, array: NDArray[Any]) -> bytes:
    """Raw contents by plain Python."""
    if datatype == "BYTES":
        return b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel())
    if datatype == "BF16":
        return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return array.tobytes()


def in_protobuf(
    message: Any, tensors: Any, raws: Any, named: list[tuple[str, str, NDArray[Any]]], *, raw: bool
) -> bytes:
    """The message with these tensors, as the runtime writes it."""
    for name, datatype, array in named:
        tensor = tensors.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            raws.append(raw_of(datatype, array))
        elif array.size:
            getattr(tensor.contents, FIELDS[datatype]).extend(array.ravel().tolist())
    serialized: bytes = message.SerializeToString(deterministic=True)
    return serialized


maps = st.dictionaries(
    wire.texts, st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | wire.texts, max_size=1
)  # one entry: the order of several is the runtime's own


def put(target: Any, parameters: dict[str, Any]) -> None:
    for name, value in parameters.items():
        kind = {bool: "bool_param", float: "double_param", str: "string_param"}.get(type(value))
        setattr(target[name], kind or ("int64_param" if value < 2**63 else "uint64_param"), value)


def check_tensors(tensors: tuple[InferTensor, ...], named: list[tuple[str, str, NDArray[Any]]]) -> None:
    assert [tensor.name for tensor in tensors] == [name for name, _, _ in named]
    for tensor, (_, datatype, array) in zip(tensors, named, strict=True):
        assert tensor.datatype == datatype
        assert same(tensor.array(), array)


@many
@given(st.data(), st.booleans(), wire.texts, wire.texts, maps, st.lists(wire.texts, max_size=2))
def test_requests_are_written_and_read_as_protobuf_does(
    data: st.DataObject, raw: bool, name: str, version: str, parameters: dict[str, Any], outputs: list[str]
) -> None:
    named = data.draw(named_arrays(tuple(NUMPY_DTYPES) if raw else tuple(FIELDS)))
    expected = inference_pb2.ModelInferRequest(model_name=name, model_version=version, id=version)
    put(expected.parameters, parameters)
    for output in outputs:
        expected.outputs.add(name=output)
    body = in_protobuf(expected, expected.inputs, expected.raw_input_contents, named, raw=raw)
    assert body == encode_infer_request(
        name, named, model_version=version, request_id=version, outputs=outputs, raw=raw, parameters=parameters
    )
    request = decode_infer_request(body)
    assert request_told(request) == request_told(expected)
    check_tensors(request.inputs, named)


@many
@given(st.data(), st.booleans(), wire.texts, wire.texts, maps)
def test_responses_are_written_and_read_as_protobuf_does(
    data: st.DataObject, raw: bool, name: str, version: str, parameters: dict[str, Any]
) -> None:
    named = data.draw(named_arrays(tuple(NUMPY_DTYPES) if raw else tuple(FIELDS)))
    expected = inference_pb2.ModelInferResponse(model_name=name, model_version=version, id=version)
    put(expected.parameters, parameters)
    body = in_protobuf(expected, expected.outputs, expected.raw_output_contents, named, raw=raw)
    assert body == encode_infer_response(name, version, version, named, raw=raw, parameters=parameters)
    response = decode_infer_response(body)
    assert response_told(response) == response_told(expected)
    check_tensors(response.outputs, named)


@many
@given(st.data(), st.sampled_from(tuple(FIELDS)))
@example(None, "INT8")
def test_typed_contents_come_packed_unpacked_and_in_pieces(data: st.DataObject | None, datatype: str) -> None:
    """Several contents messages are one, and each element may stand alone."""
    array = np.array([-1, 5, 7], np.int8) if data is None else data.draw(arrays(datatype)).ravel()
    whole = inference_pb2.InferTensorContents()
    getattr(whole, FIELDS[datatype]).extend(array.tolist())
    cuts = (
        range(array.size) if data is None else data.draw(st.lists(st.integers(0, array.size), max_size=3).map(sorted))
    )
    bounds = [0, *cuts, array.size]
    pieces = []
    for start, end in itertools.pairwise(bounds):
        piece = inference_pb2.InferTensorContents()
        getattr(piece, FIELDS[datatype]).extend(array[start:end].tolist())
        pieces.append(wire.message(5, unpacked(piece) if data is None or data.draw(st.booleans()) else
                                   piece.SerializeToString()))  # fmt: skip
    body = wire.message(5, wire.text(1, "x"), *pieces, wire.text(2, datatype), wire.field(3, wire.VARINT, array.size))
    expected = inference_pb2.ModelInferRequest.FromString(body)
    assert expected.inputs[0].contents == whole or array.dtype.kind == "f"  # NaN differs from itself
    check_tensors(decode_infer_request(body).inputs, [("x", datatype, array)])


def unpacked(contents: Any) -> bytes:
    """The contents with one tag for each element."""
    found = []
    for descriptor, values in contents.ListFields():
        for value in values:
            if descriptor.name == "bytes_contents":
                found.append(wire.field(8, wire.LENGTH, value))
            elif descriptor.name in ("fp32_contents", "fp64_contents"):
                code, kind = ("<f4", wire.FIXED32) if descriptor.number == 6 else ("<f8", wire.FIXED64)
                found.append(wire.field(descriptor.number, kind, np.array(value, code).tobytes()))
            else:
                found.append(wire.field(descriptor.number, wire.VARINT, int(value) % 2**64))
    return b"".join(found)
