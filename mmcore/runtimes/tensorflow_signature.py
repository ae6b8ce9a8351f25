"""A SavedModel's signatures, out of its MetaGraphDef message (tensorflow/core/protobuf/meta_graph.proto).

A signature names a function's inputs and outputs, and the graph's tensor behind each. The fields that say so are read
here by their published numbers; the message's largest part, the graph itself, is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

_META_GRAPH_SIGNATURES: Final = 5
_SIGNATURE_INPUTS: Final = 1
_SIGNATURE_OUTPUTS: Final = 2
_SIGNATURE_METHOD: Final = 3
_MAP_KEY: Final = 1
_MAP_VALUE: Final = 2
_INFO_NAME: Final = 1
_INFO_DTYPE: Final = 2
_INFO_SHAPE: Final = 3
_SHAPE_DIM: Final = 2
_SHAPE_UNKNOWN_RANK: Final = 3
_DIM_SIZE: Final = 1

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a signature: its name in the graph (empty for a sparse one), TF_DataType, and shape as in specs."""

    tensor: str
    number: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs by name, in the order of their names: the message keeps none."""

    method: str = ""
    inputs: dict[str, TensorInfo] = field(default_factory=dict)
    outputs: dict[str, TensorInfo] = field(default_factory=dict)


def read_signatures(meta_graph: bytes) -> dict[str, Signature]:
    """The signatures in a serialized MetaGraphDef, by name."""
    entries = (_entry(value) for number, value in _fields(meta_graph) if number == _META_GRAPH_SIGNATURES)
    return {name: _signature(value) for name, value in sorted(entries)}


def _signature(message: bytes) -> Signature:
    method, inputs, outputs = "", [], []
    for number, value in _fields(message):
        if number == _SIGNATURE_METHOD:
            method = _text(value)
        elif number == _SIGNATURE_INPUTS:
            inputs.append(_entry(value))
        elif number == _SIGNATURE_OUTPUTS:
            outputs.append(_entry(value))
    return Signature(
        method,
        {name: _tensor_info(value) for name, value in sorted(inputs)},
        {name: _tensor_info(value) for name, value in sorted(outputs)},
    )


def _tensor_info(message: bytes) -> TensorInfo:
    tensor, dtype = "", 0
    shape: tuple[int, ...] = ()
    for number, value in _fields(message):
        if number == _INFO_NAME:
            tensor = _text(value)
        elif number == _INFO_DTYPE and isinstance(value, int):
            dtype = value
        elif number == _INFO_SHAPE:
            shape = _shape(value)
    return TensorInfo(tensor, dtype, shape)


def _shape(message: int | bytes) -> tuple[int, ...]:
    sizes = []
    for number, value in _fields(message):
        if number == _SHAPE_UNKNOWN_RANK and value:
            return ()
        if number == _SHAPE_DIM:
            stated = next((size for inner, size in _fields(value) if inner == _DIM_SIZE), 0)
            assert isinstance(stated, int)
            sizes.append(-1 if stated >= 1 << 63 else stated)
    return tuple(sizes)


def _entry(message: int | bytes) -> tuple[str, bytes]:
    """Key and value of a map's entry."""
    key, value = "", b""
    for number, part in _fields(message):
        if number == _MAP_KEY:
            key = _text(part)
        elif number == _MAP_VALUE and isinstance(part, bytes):
            value = part
    return key, value


def _text(value: int | bytes) -> str:
    assert isinstance(value, bytes)
    return value.decode()


def _fields(message: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message that the library has written (protobuf's encoding, "wire types")."""
    assert isinstance(message, bytes)
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
        elif kind == _BYTES:
            length, at = _varint(message, at)
            yield number, message[at : at + length]
            at += length
        else:
            assert kind in (_FIXED64, _FIXED32)
            at += 8 if kind == _FIXED64 else 4


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
