"""TensorFlow's C API (tensorflow/c/c_api.h) as far as models are served with it: graphs, sessions, tensors.

The Python package is never imported: that takes some seconds and 230 MB more, and its cheapest call of a small model
takes 100 µs where ``TF_SessionRun`` takes 12. Sessions run on the thread that calls, and share the process's pools.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mmcore.runtimes.interface import Array

#: TF_DataType (tensorflow/c/tf_datatype.h) by V2 datatype. Others cannot be sent.
NUMBERS: Final[dict[str, int]] = {
    "FP32": 1, "FP64": 2, "INT32": 3, "UINT8": 4, "INT16": 5, "INT8": 6, "BYTES": 7, "INT64": 9, "BOOL": 10,
    "BF16": 14, "UINT16": 17, "FP16": 19, "UINT32": 22, "UINT64": 23,
}  # fmt: skip
DATATYPES: Final = {number: datatype for datatype, number in NUMBERS.items()}

_STRING: Final = NUMBERS["BYTES"]
_BFLOAT16: Final = NUMBERS["BF16"]
_NUMPY: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype(np.float32), 2: np.dtype(np.float64), 3: np.dtype(np.int32), 4: np.dtype(np.uint8),
    5: np.dtype(np.int16), 6: np.dtype(np.int8), 9: np.dtype(np.int64), 10: np.dtype(np.bool_),
    14: np.dtype(np.uint16), 17: np.dtype(np.uint16), 19: np.dtype(np.float16), 22: np.dtype(np.uint32),
    23: np.dtype(np.uint64),
}  # fmt: skip
_STRING_BYTES: Final = 24  # sizeof(TF_TString) (tensorflow/c/tf_tstring.h)

#: Codes of TF_GetCode: the arguments of the call are at fault; what the call needs is not there.
INVALID_ARGUMENT: Final = 3
FAILED_PRECONDITION: Final = 9

#: ConfigProto (tensorflow/core/protobuf/config.proto): intra_op_parallelism_threads (2) is 1, and
#: inter_op_parallelism_threads (5) is -1, which runs a graph's operators on the thread that calls.
_SESSION_CONFIG: Final = b"\x10\x01\x28" + b"\xff" * 9 + b"\x01"

#: Larger arrays are copied once, from where they lie; for smaller ones asking numpy where that is takes longer.
_LARGE_BYTES: Final = 32 * 1024


class TensorflowError(Exception):
    """What the library says of a call that failed; ``code`` is its own."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Output(ctypes.Structure):
    """TF_Output: one output of an operation."""

    _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("deallocator", ctypes.c_void_p))


class Graph:
    """A graph and the session over it."""

    def __init__(self) -> None:
        self._graph: int = _new_graph()
        self._session: int | None = None
        self._finalizer = weakref.finalize(self, _free, None, self._graph)
        self._finalizer.atexit = False

    def load_saved_model(self, folder: Path, tags: Sequence[str]) -> bytes:
        """Fill the graph from a SavedModel, restore its variables and tables; its MetaGraphDef message.

        Raises:
            TensorflowError: it cannot be read.
        """
        meta, status, options = _new_buffer(), _new_status(), _session_options()
        try:
            names = (ctypes.c_char_p * len(tags))(*(tag.encode() for tag in tags))
            session = _load_saved_model(
                *(options, None, str(folder).encode(), names, len(tags), self._graph, meta, status)
            )
            _check(status)
            self._own(session)
            held = ctypes.cast(meta, ctypes.POINTER(_Buffer)).contents
            return ctypes.string_at(held.data, held.length)
        finally:
            _delete_buffer(meta)
            _delete_options(options)
            _delete_status(status)

    def import_definition(self, definition: bytes) -> None:
        """Fill the graph from a GraphDef message, and open a session.

        Raises:
            TensorflowError: it is none, or names an operator that this TensorFlow does not know.
        """
        buffer, status = _new_buffer_from(definition, len(definition)), _new_status()
        imports, options = _new_import_options(), _session_options()
        try:
            _import_graph(self._graph, buffer, imports, status)
            _check(status)
            session = _new_session(self._graph, options, status)
            _check(status)
            self._own(session)
        finally:
            _delete_import_options(imports)
            _delete_options(options)
            _delete_buffer(buffer)
            _delete_status(status)

    def _own(self, session: int) -> None:
        self._session = session
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _free, session, self._graph)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Free the session and the graph; nothing is called after it."""
        self._finalizer()

    def output(self, tensor: str) -> Output | None:
        """The tensor ``operation`` or ``operation:index``; None where the graph has no such one."""
        name, colon, index = tensor.rpartition(":")
        if not colon or not index.isdigit():
            name, index = tensor, "0"
        operation = _operation_by_name(self._graph, name.encode())
        if not operation or int(index) >= _number_of_outputs(operation):
            return None
        return Output(operation, int(index))

    def ends(self) -> tuple[list[str], list[str]]:
        """The names of the graph's placeholders, and of the operations whose results no other one uses."""
        position = ctypes.c_size_t()
        placeholders, results = [], []
        while operation := _next_operation(self._graph, ctypes.byref(position)):
            name, kind = _operation_name(operation).decode(), _operation_type(operation).decode()
            if kind in ("Placeholder", "PlaceholderV2"):
                placeholders.append(name)
            elif _number_of_outputs(operation) and kind != "Const" and not self._is_used(operation):
                results.append(name)
        return placeholders, results

    @staticmethod
    def _is_used(operation: int) -> bool:
        if _number_of_control_consumers(operation):
            return True
        return any(_number_of_consumers(Output(operation, index)) for index in range(_number_of_outputs(operation)))

    @staticmethod
    def datatype(output: Output) -> str | None:
        """The V2 datatype of a tensor; None where it has none."""
        return DATATYPES.get(_output_type(output))

    def shape(self, output: Output) -> tuple[int, ...]:
        """The shape of a tensor, -1 where a dimension is free; nothing where not even its rank is known."""
        status = _new_status()
        try:
            rank = _shape_rank(self._graph, output, status)
            _check(status)
            if rank < 0:
                return ()
            sizes = (ctypes.c_int64 * rank)()
            _shape(self._graph, output, sizes, rank, status)
            _check(status)
            return tuple(sizes)
        finally:
            _delete_status(status)

    def run(self, feeds: Any, inputs: Sequence[tuple[int, Array]], fetches: Any) -> list[Array]:
        """Run the graph: ``feeds`` and ``fetches`` are arrays of ``Output``, ``inputs`` TF_DataType and array of each.

        Raises:
            TensorflowError: an operator failed.
        """
        given = (ctypes.c_void_p * len(inputs))()
        got = (ctypes.c_void_p * len(fetches))()
        status = _new_status()
        try:
            for index, (number, array) in enumerate(inputs):
                given[index] = _tensor(number, array)
            _session_run(
                *(self._session, None, feeds, given, len(inputs), fetches, got, len(fetches)),
                *(None, 0, None, status),
            )
            if _get_code(status):
                _check(status)
            return [_array(tensor) for tensor in got if tensor is not None]
        finally:
            for tensor in (*given, *got):
                if tensor:
                    _delete_tensor(tensor)
            _delete_status(status)


def _tensor(number: int, array: Array) -> int:
    shape = array.shape
    dims = (ctypes.c_int64 * len(shape))(*shape)
    if number == _STRING:
        return _string_tensor(array, dims)
    if number == _BFLOAT16:
        array = _narrowed(array)
    size = array.nbytes
    tensor: int = _allocate_tensor(number, dims, len(shape), size)
    if size > _LARGE_BYTES and array.flags.c_contiguous:
        ctypes.memmove(_tensor_data(tensor), array.ctypes.data, size)
    elif size:
        ctypes.memmove(_tensor_data(tensor), array.tobytes(), size)
    return tensor


def _string_tensor(array: Array, dims: Any) -> int:
    elements = array.ravel().tolist()
    buffer = ctypes.create_string_buffer(max(len(elements), 1) * _STRING_BYTES)  # zeros: empty strings
    at = ctypes.addressof(buffer)
    _strings[at] = buffer
    for index, element in enumerate(elements):
        _string_copy(at + index * _STRING_BYTES, element, len(element))
    tensor: int = _new_tensor(
        *(_STRING, dims, len(dims), at, len(elements) * _STRING_BYTES, _free_strings_callback, None)
    )
    return tensor


def _free_strings(data: int, length: int, argument: object) -> None:
    """Called by the library, on any of its threads, when nothing holds a tensor of strings any more."""
    del argument
    for at in range(data, data + length, _STRING_BYTES):
        _string_dealloc(at)
    del _strings[data]


def _array(tensor: int) -> Array:
    number = _tensor_type(tensor)
    shape = [_dim(tensor, index) for index in range(_num_dims(tensor))]
    data = _tensor_data(tensor)
    if number == _STRING:
        answer = np.empty(math.prod(shape), np.object_)
        for index in range(answer.size):
            at = data + index * _STRING_BYTES
            answer[index] = ctypes.string_at(_string_data(at), _string_size(at))
        return answer.reshape(shape)
    content = ctypes.string_at(data, _tensor_byte_size(tensor)) if data else b""
    array = np.frombuffer(content, _NUMPY[number]).reshape(shape)
    return _widened(array) if number == _BFLOAT16 else array


def _narrowed(array: Array) -> Array:
    """bfloat16 of float32, to the nearest, as the 16 bits that they are."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _widened(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _check(status: int) -> None:
    code = _get_code(status)
    if code:
        raise TensorflowError(code, _message(status).decode(errors="replace"))


def _session_options() -> int:
    options: int = _new_session_options()
    status = _new_status()
    try:
        _set_config(options, _SESSION_CONFIG, len(_SESSION_CONFIG), status)
        _check(status)
    finally:
        _delete_status(status)
    return options


def _free(session: int | None, graph: int) -> None:
    if session is not None:
        status = _new_status()
        _close_session(session, status)
        _delete_session(session, status)
        _delete_status(status)
    _delete_graph(graph)


def _find_library() -> str:
    """The library inside the installed package, which is found without importing it."""
    package = importlib.util.find_spec("tensorflow")
    if package is None or package.origin is None:
        raise ImportError("No module named 'tensorflow'", name="tensorflow")
    file = Path(package.origin).parent / "libtensorflow_cc.so.2"
    if not file.is_file():
        raise ImportError(f"tensorflow: there is no {file.name} in {file.parent}", name="tensorflow")
    return str(file)


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function: Any = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


# Warnings name operators and instructions of the processor, which no operator of a server can act on.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_PATH: Final = _find_library()
try:
    #: For what takes long: other threads run meanwhile.
    _long = ctypes.CDLL(_PATH)
    #: For what takes less time than handing the interpreter over.
    _short = ctypes.PyDLL(_PATH)
except OSError as error:
    raise ImportError(f"tensorflow: {error}", name="tensorflow") from error

_pointer, _int, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_new_status = _function(_short, "TF_NewStatus", _pointer)
_get_code = _function(_short, "TF_GetCode", _int, _pointer)
_message = _function(_short, "TF_Message", ctypes.c_char_p, _pointer)
_delete_status = _function(_short, "TF_DeleteStatus", None, _pointer)
_new_buffer = _function(_short, "TF_NewBuffer", _pointer)
_new_buffer_from = _function(_short, "TF_NewBufferFromString", _pointer, ctypes.c_char_p, _size)
_delete_buffer = _function(_short, "TF_DeleteBuffer", None, _pointer)
_new_session_options = _function(_short, "TF_NewSessionOptions", _pointer)
_delete_options = _function(_short, "TF_DeleteSessionOptions", None, _pointer)
_set_config = _function(_short, "TF_SetConfig", None, _pointer, ctypes.c_char_p, _size, _pointer)
_new_graph = _function(_short, "TF_NewGraph", _pointer)
_delete_graph = _function(_long, "TF_DeleteGraph", None, _pointer)
_new_import_options = _function(_short, "TF_NewImportGraphDefOptions", _pointer)
_delete_import_options = _function(_short, "TF_DeleteImportGraphDefOptions", None, _pointer)
_import_graph = _function(_long, "TF_GraphImportGraphDef", None, _pointer, _pointer, _pointer, _pointer)
_new_session = _function(_long, "TF_NewSession", _pointer, _pointer, _pointer, _pointer)
_close_session = _function(_long, "TF_CloseSession", None, _pointer, _pointer)
_delete_session = _function(_long, "TF_DeleteSession", None, _pointer, _pointer)
_load_saved_model = _function(
    *(_long, "TF_LoadSessionFromSavedModel", _pointer),
    *(_pointer, _pointer, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p), _int, _pointer, _pointer, _pointer),
)
_session_run = _function(
    *(_long, "TF_SessionRun", None, _pointer, _pointer, _pointer, _pointer, _int, _pointer, _pointer, _int),
    *(_pointer, _int, _pointer, _pointer),
)
_operation_by_name = _function(_short, "TF_GraphOperationByName", _pointer, _pointer, ctypes.c_char_p)
_next_operation = _function(_short, "TF_GraphNextOperation", _pointer, _pointer, _pointer)
_operation_name = _function(_short, "TF_OperationName", ctypes.c_char_p, _pointer)
_operation_type = _function(_short, "TF_OperationOpType", ctypes.c_char_p, _pointer)
_number_of_outputs = _function(_short, "TF_OperationNumOutputs", _int, _pointer)
_number_of_consumers = _function(_short, "TF_OperationOutputNumConsumers", _int, Output)
_number_of_control_consumers = _function(_short, "TF_OperationNumControlOutputs", _int, _pointer)
_output_type = _function(_short, "TF_OperationOutputType", _int, Output)
_shape_rank = _function(_short, "TF_GraphGetTensorNumDims", _int, _pointer, Output, _pointer)
_shape = _function(_short, "TF_GraphGetTensorShape", None, _pointer, Output, _pointer, _int, _pointer)
_allocate_tensor = _function(_short, "TF_AllocateTensor", _pointer, _int, _pointer, _int, _size)
_new_tensor = _function(
    *(_short, "TF_NewTensor", _pointer, _int, _pointer, _int, _pointer, _size, _pointer, _pointer),
)
_delete_tensor = _function(_short, "TF_DeleteTensor", None, _pointer)
_tensor_data = _function(_short, "TF_TensorData", _pointer, _pointer)
_tensor_byte_size = _function(_short, "TF_TensorByteSize", _size, _pointer)
_tensor_type = _function(_short, "TF_TensorType", _int, _pointer)
_num_dims = _function(_short, "TF_NumDims", _int, _pointer)
_dim = _function(_short, "TF_Dim", ctypes.c_int64, _pointer, _int)
_string_copy = _function(_short, "TF_StringCopy", None, _pointer, ctypes.c_char_p, _size)
_string_dealloc = _function(_short, "TF_StringDealloc", None, _pointer)
_string_data = _function(_short, "TF_StringGetDataPointer", _pointer, _pointer)
_string_size = _function(_short, "TF_StringGetSize", _size, _pointer)

#: The memory of the tensors of strings that are in use, by its address.
_strings: dict[int, Any] = {}
_free_strings_callback = ctypes.cast(
    _free_strings_function := ctypes.CFUNCTYPE(None, _pointer, _size, _pointer)(_free_strings), _pointer
)
