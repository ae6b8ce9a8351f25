"""What every built-in runtime gives back: one loaded model, ready to answer.

The rooms above (cache, batching, routing, server) know models through this Protocol alone; which framework is
behind it is decided in ``loading.py`` and visible only as ``platform``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmcore.model import TensorSpec

Array: TypeAlias = NDArray[Any]

#: One answered tensor: name, V2 datatype, array. The array's dtype is the one of ``NUMPY_DTYPES``, BYTES as an object
#: array of ``bytes``; it may be read-only and need not be contiguous.
OutputTensor: TypeAlias = tuple[str, str, Array]


class LoadedModel(Protocol):
    """One copy of one model in memory. ``infer`` may be called from several threads at once."""

    @property
    def platform(self) -> str:
        """What answers, by Triton's name where it has one: ``onnxruntime_onnx``, ``pytorch_libtorch``, ``sklearn``."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs a request must bring."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Every output that can be asked for."""
        ...

    @property
    def default_outputs(self) -> tuple[str, ...]:
        """The names answered when a request asks for none; never empty."""
        ...

    @property
    def any_input_name(self) -> bool:
        """True where the one input may come under any name (MLServer's habit); it is bound under the spec's name."""
        ...

    @property
    def accepts(self) -> Mapping[str, tuple[str, ...]]:
        """Input name to the V2 datatypes taken besides the one in ``inputs``; absent where only that one is."""
        ...

    #: Memory the loaded model takes, in bytes: its owner's statement, else what its load made the process gain where
    #: that could be measured, else an estimate from the files.
    size_bytes: int

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Sequence[OutputTensor]:
        """Answer ``outputs`` (the default ones where empty) in the order asked, for inputs bound by the signature.

        The arrays may be read-only views over a request's bytes. The hot path: nothing is checked here that the
        signature has checked.

        Raises:
            InvalidRequest: an unknown output, or a combination of inputs the framework calls invalid.
            InferenceFailed: the model raised; the text is its exception's.
        """
        ...

    def close(self) -> None:
        """Let go of the framework's memory; nothing is called after it."""
        ...


#: The dtypes numpy arrays come with, to the datatype that names them on the wire.
DATATYPES: dict[np.dtype[Any], str] = {
    np.dtype(dtype): datatype
    for datatype, dtype in (
        ("BOOL", np.bool_),
        ("UINT8", np.uint8),
        ("UINT16", np.uint16),
        ("UINT32", np.uint32),
        ("UINT64", np.uint64),
        ("INT8", np.int8),
        ("INT16", np.int16),
        ("INT32", np.int32),
        ("INT64", np.int64),
        ("FP16", np.float16),
        ("FP32", np.float32),
        ("FP64", np.float64),
    )
}

#: The datatypes a model over plain numbers takes whatever its metadata says: clients send FP32 mostly, FP64 from
#: numpy's default, integers from JSON.
NUMERIC_DATATYPES: tuple[str, ...] = (
    "FP32", "FP64", "INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8", "FP16", "BF16", "BOOL",
)  # fmt: skip


def wire_array(value: object) -> tuple[str, Array]:
    """The V2 datatype of what a framework or a model returned, and the array in that datatype's dtype.

    Text becomes BYTES in UTF-8; a dtype the protocol has no name for (long double, another byte order) is converted
    to the nearest that it has.

    Raises:
        TypeError: the value is no tensor (a ragged list, a complex array, an object that is no text).
    """
    array = np.asarray(value)
    datatype = DATATYPES.get(array.dtype)
    if datatype is not None:
        return datatype, array
    match array.dtype.kind:
        case "O" | "U" | "S":
            return "BYTES", text_to_bytes(array)
        case "b" | "i" | "u" | "f":
            native = array.dtype.newbyteorder("=")
            if native not in DATATYPES:
                native = np.dtype(np.float64)
            return DATATYPES[native], array.astype(native)
        case _:
            raise TypeError(f"an array of {array.dtype} has no V2 datatype")


def text_to_bytes(array: Array) -> Array:
    """An array of text or bytes as the object array of ``bytes`` that BYTES is; the same array where it is one."""
    flat = array.ravel().tolist()
    if array.dtype.kind == "O" and all(type(element) is bytes for element in flat):
        return array
    answer = np.empty(len(flat), dtype=np.object_)
    for index, element in enumerate(flat):
        if isinstance(element, str):
            answer[index] = element.encode()
        elif isinstance(element, (bytes, bytearray, memoryview)):
            answer[index] = bytes(element)
        else:
            raise TypeError(f"an element is {type(element).__name__}, neither text nor bytes")
    return answer.reshape(array.shape)


def bytes_to_text(array: Array) -> Array:
    """An object array of UTF-8 ``bytes`` as one of ``str``.

    Raises:
        UnicodeDecodeError: an element is not UTF-8.
    """
    answer = np.empty(array.size, dtype=np.object_)
    for index, element in enumerate(array.ravel().tolist()):
        answer[index] = element if isinstance(element, str) else bytes(element).decode()
    return answer.reshape(array.shape)
