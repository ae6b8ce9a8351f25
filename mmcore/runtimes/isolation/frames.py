"""What the serving process and a worker tell each other: frames over a socket, tensors in them or in shared memory.

A frame is a header (bytes of the whole frame, kind), a body of one of the kinds below, and the bytes of small tensors.
Numbers are little-endian. Tensors are named by their place among the model's inputs or outputs; their bytes are
numpy's own in C order, BYTES in V2 framing, and begin at multiples of 64 in the shared memory and of 8 in the frame.
Everything here refuses bytes that are not so, since a worker may send anything: nothing that it sends is unpickled.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np

from mmcore._ext.tensor import parse_bytes_tensor, serialize_bytes_tensor
from mmcore.errors import (
    Cancelled,
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    LoadFailed,
    MmcoreError,
    NotFound,
    Overloaded,
    Unavailable,
    Unimplemented,
)
from mmcore.model import NUMPY_DTYPES, TensorSpec
from mmcore.runtimes.interface import DATATYPES, Array, OutputTensor
from mmcore.runtimes.isolation.segment import Segment

#: Tensors that take more together go through the shared memory.
INLINE_BYTES: Final = 64 * 2**10
#: A longer frame is not taken from a worker; the longest that it should send describes a model of many tensors.
_FRAME_LIMIT: Final = 16 * 2**20
#: One read of so much takes nearly every frame whole.
_READ_BYTES: Final = INLINE_BYTES + 8 * 2**10
_TEXT_LIMIT: Final = 2000
#: numpy 1 has arrays of no more dimensions.
_RANK_LIMIT: Final = 32

_HEADER: Final = struct.Struct("<IB3x")
#: Whether the tensors' bytes are in the shared memory; number of tensors; number of outputs asked for.
_COUNTS: Final = struct.Struct("<BxHI")
#: Place, datatype, number of dimensions, bytes; the dimensions follow.
_TENSOR: Final = struct.Struct("<HBB4xQ")
_SIZE: Final = struct.Struct("<Q")

_CODES: Final = {datatype: code for code, datatype in enumerate(NUMPY_DTYPES)}
_BY_CODE: Final = tuple(NUMPY_DTYPES.items())


class Kind(IntEnum):
    """What a frame says; in brackets who sends it."""

    LOAD = 1  #: (server) the pickled source and the limit of memory
    LOADED = 2  #: (worker) the model's tensors, JSON
    FAILED = 3  #: (worker) a status and a text, instead of LOADED or ANSWER
    INFER = 4  #: (server) the inputs and the places of the outputs wanted
    ANSWER = 5  #: (worker) the outputs
    NEED = 6  #: (worker) the bytes of shared memory that the answer takes
    GROWN = 7  #: (server) there are so many now
    REFUSED = 8  #: (server) there will not be so many


class BrokenFrame(Exception):
    """Bytes that are no frame of ours."""


@dataclass(frozen=True, slots=True)
class Described:
    """What a worker says of the model it has loaded; see ``LoadedModel`` for the fields."""

    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    default_outputs: tuple[str, ...]
    any_input_name: bool
    accepts: dict[str, tuple[str, ...]]


def frame(kind: Kind, body: bytes = b"") -> bytes:
    """A frame without tensors."""
    return _HEADER.pack(_HEADER.size + len(body), kind) + body


def receive(sock: socket.socket) -> tuple[Kind, bytes] | None:
    """The next frame and its kind, header included; None at the end of the stream.

    It expects the other side to send nothing more before it is answered. A timeout before the first byte (of the kind
    that is set with SO_RCVTIMEO) is raised as the BlockingIOError that it is.

    Raises:
        BrokenFrame: it is no frame, or is cut off.
    """
    data = sock.recv(_READ_BYTES)
    if not data:
        return None
    while len(data) < _HEADER.size:
        data += _more(sock, _HEADER.size - len(data))
    length, kind = _HEADER.unpack_from(data)
    if not max(_HEADER.size, len(data)) <= length <= _FRAME_LIMIT:
        raise BrokenFrame(f"a frame of {length} bytes")
    if len(data) < length:
        parts = [data]
        missing = length - len(data)
        while missing:
            parts.append(_more(sock, min(missing, 2**20)))
            missing -= len(parts[-1])
        data = b"".join(parts)
    try:
        return Kind(kind), data
    except ValueError:
        raise BrokenFrame(f"a frame of kind {kind}") from None


def _more(sock: socket.socket, size: int) -> bytes:
    try:
        data = sock.recv(size)
    except BlockingIOError:
        raise BrokenFrame("a frame was not finished") from None
    if not data:
        raise BrokenFrame("a frame was cut off")
    return data


# Tensors.


class Packed:
    """Tensors on their way into a frame or into shared memory."""

    __slots__ = ("_descriptions", "_parts", "total")

    def __init__(self, tensors: Sequence[tuple[int, str, Array]]) -> None:
        self._descriptions: list[bytes] = []
        self._parts: list[bytes | Array] = []
        #: Bytes that they take in shared memory.
        self.total = 0
        for place, datatype, array in tensors:
            part: bytes | Array = serialize_bytes_tensor(array) if datatype == "BYTES" else array
            size = len(part) if isinstance(part, bytes) else array.nbytes
            self._descriptions.append(
                _TENSOR.pack(place, _CODES[datatype], array.ndim, size) + struct.pack(f"<{array.ndim}q", *array.shape)
            )
            self._parts.append(part)
            self.total += _aligned(size, 64)

    def frame(self, kind: Kind, places: Sequence[int], segment: Segment) -> bytes:
        """The frame; tensors too large for it are written to ``segment``, which must be large enough."""
        shared = self.total > INLINE_BYTES
        body = b"".join(
            (
                _COUNTS.pack(shared, len(self._parts), len(places)),
                struct.pack(f"<{len(places)}H", *places),
                *self._descriptions,
            )
        )
        if shared:
            self._share(segment)
            return frame(kind, body)
        parts = [body]
        for part in self._parts:
            parts.append(b"\0" * (-len(parts[-1]) % 8))
            parts.append(part if isinstance(part, bytes) else part.tobytes())
        return frame(kind, b"".join(parts))

    def _share(self, segment: Segment) -> None:
        memory = segment.memory()
        offset = 0
        for part in self._parts:
            if isinstance(part, bytes):
                memory[offset : offset + len(part)] = part
                offset += _aligned(len(part), 64)
            else:
                np.copyto(np.ndarray(part.shape, part.dtype, memory, offset), part)
                offset += _aligned(part.nbytes, 64)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Tensors as they came: place, V2 datatype and array, and the places of the outputs asked for."""

    tensors: list[tuple[int, str, Array]]
    places: tuple[int, ...]
    #: Bytes of shared memory that were used.
    shared: int


def unpack(data: bytes, segment: Segment) -> Unpacked:
    """The tensors of a frame; arrays from shared memory are copies, the others read-only views of ``data``.

    Raises:
        BrokenFrame: shapes, sizes, datatypes or framing do not agree with the bytes there are.
    """
    try:
        shared, count, asked = _COUNTS.unpack_from(data, _HEADER.size)
        at = _HEADER.size + _COUNTS.size
        places = struct.unpack_from(f"<{asked}H", data, at)
        at += 2 * asked
        described = []
        for _ in range(count):
            place, code, rank, size = _TENSOR.unpack_from(data, at)
            at += _TENSOR.size
            if rank > _RANK_LIMIT or code >= len(_BY_CODE):
                raise BrokenFrame(f"a tensor of datatype {code} and {rank} dimensions")
            described.append((place, code, struct.unpack_from(f"<{rank}q", data, at), size))
            at += 8 * rank
    except struct.error as error:
        raise BrokenFrame(f"a frame is too short: {error}") from None
    source: Any = segment.memory() if shared and segment.size else data
    limit, step = (segment.size, 64) if shared else (len(data), 8)
    at = 0 if shared else at
    tensors = []
    for place, code, shape, size in described:
        at = _aligned(at, step)
        datatype, dtype = _BY_CODE[code]
        if at + size > limit or any(dimension < 0 for dimension in shape):
            raise BrokenFrame(f"a tensor of shape {list(shape)} and {size} bytes, where {max(0, limit - at)} are")
        tensors.append((place, datatype, _array(datatype, dtype, shape, size, source, at, copied=bool(shared))))
        at += size
    return Unpacked(tensors, places, at if shared else 0)


def _array(
    datatype: str, dtype: np.dtype[Any], shape: tuple[int, ...], size: int, source: Any, at: int, *, copied: bool
) -> Array:
    if datatype == "BYTES":
        try:
            # Copied first: the other side could change lengths between their check and their use.
            return parse_bytes_tensor(bytes(source[at : at + size]), shape)
        except InvalidRequest as error:
            raise BrokenFrame(f"a BYTES tensor: {error}") from None
    if math.prod(shape) * dtype.itemsize != size:
        raise BrokenFrame(f"a {datatype} tensor of shape {list(shape)} in {size} bytes")
    try:
        array = np.ndarray(shape, dtype, source, at)
    except (ValueError, TypeError) as error:
        raise BrokenFrame(f"a {datatype} tensor of shape {list(shape)}: {error}") from None
    return array.copy() if copied else array


def _aligned(size: int, step: int) -> int:
    return -(-size // step) * step


def input_tensors(inputs: Mapping[str, Array], places: Mapping[str, int]) -> list[tuple[int, str, Array]]:
    """A request's bound inputs, each under its place, with the datatype that its numpy dtype has."""
    return [(places[name], DATATYPES.get(array.dtype, "BYTES"), array) for name, array in inputs.items()]


def output_tensors(outputs: Sequence[OutputTensor], places: Mapping[str, int]) -> list[tuple[int, str, Array]]:
    """A model's answer, each output under its place; KeyError for one that the model does not declare."""
    return [
        (places[name], datatype, np.asarray(array, NUMPY_DTYPES[datatype], order="C"))
        for name, datatype, array in outputs
    ]


# Sizes, errors and descriptions.


def size_frame(kind: Kind, size: int) -> bytes:
    """A frame that says a number of bytes."""
    return frame(kind, _SIZE.pack(size))


def size_in(data: bytes) -> int:
    """The number of bytes that a frame says."""
    if len(data) != _HEADER.size + _SIZE.size:
        raise BrokenFrame("a size of another length")
    size: int = _SIZE.unpack_from(data, _HEADER.size)[0]
    return size


#: The errors that a worker may cause, by status. Others become INTERNAL.
_ERRORS: Final[dict[int, type[MmcoreError]]] = {
    int(error.status): error
    for error in (
        *(Cancelled, DeadlineExceeded, InferenceFailed, InvalidRequest, LoadFailed, NotFound, Overloaded),
        *(Unavailable, Unimplemented),
    )
}


def error_frame(error: MmcoreError) -> bytes:
    """A frame that says an error."""
    return frame(Kind.FAILED, bytes([int(error.status)]) + str(error)[:_TEXT_LIMIT].encode(errors="replace"))


def error_in(data: bytes) -> MmcoreError:
    """The error that a frame says."""
    body = data[_HEADER.size :]
    error = _ERRORS.get(body[0] if body else 0, InferenceFailed)
    return error(body[1:].decode(errors="replace")[: 2 * _TEXT_LIMIT])


def description_frame(described: Described) -> bytes:
    """A frame that describes a loaded model."""
    values = {
        "platform": described.platform,
        "inputs": [[spec.name, spec.datatype, spec.shape] for spec in described.inputs],
        "outputs": [[spec.name, spec.datatype, spec.shape] for spec in described.outputs],
        "default_outputs": described.default_outputs,
        "any_input_name": described.any_input_name,
        "accepts": described.accepts,
    }
    return frame(Kind.LOADED, json.dumps(values).encode())


def description_in(data: bytes) -> Described:
    """The description in a frame, with every field checked."""
    try:
        values = json.loads(data[_HEADER.size :])
        described = Described(
            platform=_text(values["platform"]),
            inputs=tuple(_spec(*one) for one in values["inputs"]),
            outputs=tuple(_spec(*one) for one in values["outputs"]),
            default_outputs=tuple(_text(one) for one in values["default_outputs"]),
            any_input_name=values["any_input_name"] is True,
            accepts={_text(name): tuple(_datatype(one) for one in taken) for name, taken in values["accepts"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFrame(f"a description that is none: {error!r}") from None
    outputs = {spec.name for spec in described.outputs}
    if len(outputs) != len(described.outputs) or len({spec.name for spec in described.inputs}) != len(described.inputs):
        raise BrokenFrame("a description that names a tensor twice")
    if not described.default_outputs or not outputs.issuperset(described.default_outputs) or len(outputs) > 2**16:
        raise BrokenFrame("a description whose outputs do not agree")
    return described


def _spec(name: object, datatype: object, shape: object) -> TensorSpec:
    if not isinstance(shape, list) or not all(type(one) is int and -1 <= one < 2**63 for one in shape):
        raise ValueError(f"the shape {shape!r}")
    return TensorSpec(_text(name), _datatype(datatype), tuple(shape))


def _datatype(value: object) -> str:
    if value not in NUMPY_DTYPES:
        raise ValueError(f"the datatype {value!r}")
    return str(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} instead of a text")
    return value
