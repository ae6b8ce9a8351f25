"""LightGBM's text models, whatever their file is called.

Answers are those of ``Booster.predict``, as MLServer serves them: ``predict`` in FP64, [n, 1] or [n, classes].

The library is called through its C API (LightGBM's documentation, "C API") and its Python package is never imported:
that would bring scikit-learn along, a second and 70 MB, and ``Booster.predict`` takes twenty times as long as
the function for single rows does.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mmcore.errors import InvalidRequest, LoadFailed
from mmcore.model import NUMPY_DTYPES, ModelSource, TensorSpec
from mmcore.runtimes import trees
from mmcore.runtimes.builtin import BuiltinModel
from mmcore.runtimes.declared import method_outputs, single_input
from mmcore.runtimes.interface import NUMERIC_DATATYPES, Array, LoadedModel, OutputTensor
from mmcore.runtimes.size import estimated_size

log = logging.getLogger(__name__)

_INPUT: Final = "predict"
_OUTPUT: Final = "predict"

#: Measured (LightGBM 4.7): 22 KB in memory for 17 KB of text, 437 KB for 517 KB, 4.7 MB for 6.2 MB.
_SIZE_FACTOR: Final = 0.8
_SIZE_BASE: Final = 12 * 1024

#: Values of the C API (LightGBM/c_api.h): the kind of prediction, and the dtypes of a matrix that it reads as they are,
#: by numpy's characters for them.
_NORMAL: Final = 0
_NATIVE: Final = {"f": 0, "d": 1}
_ALL_ITERATIONS: Final = -1
_OPTIONS: Final = b"num_threads=1 verbosity=-1"

_TREE_SIZES: Final = re.compile(rb"^tree_sizes=([0-9 ]*)$", re.MULTILINE)


class LightgbmModel(BuiltinModel):
    """One booster. Satisfies ``LoadedModel``."""

    platform = "lightgbm"
    any_input_name = True

    def __init__(
        self,
        name: str,
        methods: Mapping[str, trees.Prediction],
        input_spec: TensorSpec,
        outputs: tuple[TensorSpec, ...],
        *,
        default_output: str,
        width: int,
        size_bytes: int,
    ) -> None:
        super().__init__(
            name,
            (input_spec,),
            outputs,
            default_outputs=(default_output,),
            size_bytes=size_bytes,
            accepts={input_spec.name: NUMERIC_DATATYPES},
        )
        self._input = input_spec.name
        self._methods = {spec.name: (spec.datatype, methods[spec.name]) for spec in outputs}
        self._width = width

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[OutputTensor]:
        """Predict for a matrix of rows; see ``LoadedModel.infer``."""
        features = inputs[self._input]
        # The settings may leave the width free, and the library reads that many numbers of a row.
        if features.ndim != 2 or features.shape[1] != self._width:
            raise InvalidRequest(
                f"input {self._input!r}: expected shape [-1, {self._width}], got {list(features.shape)}"
            )
        answer = []
        for name in outputs or self.default_outputs:
            found = self._methods.get(name)
            if found is None:
                raise self.unknown_output(name)
            datatype, method = found
            try:
                answer.append((name, datatype, method(features)))
            except Exception as error:
                raise self._failures.failed(error) from error
        return answer

    def close(self) -> None:
        """Drop the booster; its memory is freed with the last reference."""
        self._methods.clear()


class LightgbmError(Exception):
    """What the library says of a call that failed."""


class _Booster:
    """Owns a booster of the library, and a prepared call for single rows per dtype."""

    def __init__(self, text: bytes) -> None:
        self._handle = ctypes.c_void_p()
        self._prepared: dict[str, ctypes.c_void_p] = {}
        iterations = ctypes.c_int()
        _call(_library.LGBM_BoosterLoadModelFromString, text, ctypes.byref(iterations), ctypes.byref(self._handle))
        width = ctypes.c_int()
        _call(_library.LGBM_BoosterGetNumFeature, self._handle, ctypes.byref(width))
        self.width = width.value
        length = ctypes.c_int64()
        _call(
            _library.LGBM_BoosterCalcNumPredict,
            *(self._handle, 1, _NORMAL, 0, _ALL_ITERATIONS, ctypes.byref(length)),
        )
        self.columns = length.value
        self._row: Any = ctypes.c_double * self.columns
        for dtype, number in _NATIVE.items():
            self._prepared[dtype] = ctypes.c_void_p()
            _call(
                _library.LGBM_BoosterPredictForMatSingleRowFastInit,
                *(self._handle, _NORMAL, 0, _ALL_ITERATIONS, number, self.width, _OPTIONS),
                ctypes.byref(self._prepared[dtype]),
            )

    def values(self, features: Array) -> Array:
        """FP64 [n, columns]: what the objective makes of the trees' sum."""
        dtype = features.dtype.char
        if dtype not in _NATIVE:
            features = features.astype(np.float32)  # as the library's own Python package does
            dtype = "f"
        if features.shape[0] == 1:
            # Arrays of ctypes and bytes go to the library as they are; asking numpy for an address takes longer.
            row = self._row()
            if _predict_single(self._prepared[dtype], features.tobytes(), _LENGTH_AT, row):
                raise LightgbmError(_last_error())
            return np.frombuffer(row, np.float64).reshape(1, self.columns)
        return self._matrix(np.ascontiguousarray(features), _NATIVE[dtype])

    def _matrix(self, features: Array, dtype: int) -> Array:
        rows = features.shape[0]
        answer = np.empty((rows, self.columns))
        if rows and _predict_matrix(
            *(self._handle, features.ctypes.data, dtype, rows, self.width, 1),
            *(_NORMAL, 0, _ALL_ITERATIONS, _OPTIONS, _LENGTH_AT, answer.ctypes.data),
        ):
            raise LightgbmError(_last_error())
        return answer

    def values_fp32(self, features: Array) -> Array:
        """FP32 [n, columns], the precision in which Triton's tree backend answers."""
        return self.values(features).astype(np.float32)

    def __del__(self) -> None:
        for prepared in self._prepared.values():
            _library.LGBM_FastConfigFree(prepared)
        if self._handle:
            _library.LGBM_BoosterFree(self._handle)


def load(source: ModelSource) -> LoadedModel:
    """Read the text model at ``source.path``.

    Raises:
        LoadFailed: another library's model, a truncated or corrupt file, or settings that contradict the model.
    """
    booster = _read(source.path)
    settings = source.settings
    backend = trees.TreeBackend.configured(settings.parameters)
    if backend is None:
        input_name, default = _INPUT, _OUTPUT
        own, columns = "FP64", booster.columns
        values: trees.Prediction = booster.values
    else:
        input_name, default, own = trees.INPUT, trees.OUTPUT, "FP32"
        columns, values = backend.method(booster.values_fp32, booster.columns)
    found = (TensorSpec(default, own, (-1, columns)),)
    outputs, _, default_output = method_outputs(found, default, settings.outputs)
    return LightgbmModel(
        source.name,
        {spec.name: _typed(values, own, spec.datatype) for spec in outputs},
        single_input(TensorSpec(input_name, "FP32", (-1, booster.width)), settings.inputs),
        outputs,
        default_output=default_output,
        width=booster.width,
        size_bytes=estimated_size(source, source.path, factor=_SIZE_FACTOR, base=_SIZE_BASE),
    )


def _read(path: Path) -> _Booster:
    content = path.read_bytes()
    if not content.startswith((b"tree\n", b"tree\r\n")):
        raise LoadFailed(f"{path.name!r} is no text model of LightGBM: it does not begin with 'tree'")
    content = content.replace(b"\r\n", b"\n")  # the sizes in the head are those with single line ends
    if not _is_whole(content):
        raise LoadFailed(f"{path.name!r} is cut short or changed: it does not hold the trees that it announces")
    if b"\0" in content:
        raise LoadFailed(f"{path.name!r} is no text model of LightGBM: it holds zero bytes")
    try:
        return _Booster(content)
    except LightgbmError as error:
        raise LoadFailed(f"{path.name!r} is no model that LightGBM reads: {error}") from error


def _is_whole(content: bytes) -> bool:
    """Whether every tree lies where the head says: the library believes it, and reads what is not there."""
    sizes = _TREE_SIZES.search(content)
    if sizes is None:
        return False
    at = content.find(b"\nTree=", sizes.end()) + 1
    for size in sizes[1].split():
        if not content.startswith(b"Tree=", at) or int(size) <= 0:
            return False
        at += int(size)
    return content.startswith(b"end of trees\n", at) if at else content.find(b"\nend of trees\n", sizes.end()) > 0


def _typed(values: trees.Prediction, own: str, datatype: str) -> trees.Prediction:
    """The prediction, converted where the settings declare another datatype than it has."""
    if own == datatype:
        return values
    dtype = NUMPY_DTYPES[datatype]
    if dtype == np.object_:
        raise LoadFailed("a LightGBM model answers numbers; the settings declare a BYTES output")
    return lambda features: values(features).astype(dtype)


def _find_library() -> ctypes.CDLL:
    """The library inside the installed package, which is found without importing it."""
    package = importlib.util.find_spec("lightgbm")
    if package is None or package.origin is None:
        raise ImportError("No module named 'lightgbm'", name="lightgbm")
    folder = Path(package.origin).parent
    for file in (folder / "lib" / "lib_lightgbm.so", folder / "bin" / "lib_lightgbm.so", folder / "lib_lightgbm.so"):
        if file.is_file():
            try:
                return ctypes.CDLL(str(file))
            except OSError as error:  # libgomp is the system's
                raise ImportError(f"lightgbm: {error}", name="lightgbm") from error
    raise ImportError(f"lightgbm: there is no lib_lightgbm.so in {folder}", name="lightgbm")


def _write_log(text: bytes) -> None:
    """What the library would write to stdout, which is the ready line's."""
    if line := text.decode(errors="replace").strip():
        log.info("LightGBM: %s", line)


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        raise LightgbmError(_last_error())


def _last_error() -> str:
    return str(_library.LGBM_GetLastError().decode(errors="replace"))


#: Where the library writes how many values it has answered: the same number each time, so that nobody reads it.
_length = ctypes.c_int64()
_LENGTH_AT: Final = ctypes.addressof(_length)

_library = _find_library()
_library.LGBM_GetLastError.restype = ctypes.c_char_p
_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_write_log)
_library.LGBM_RegisterLogCallback(_log_callback)
# OpenMP keeps a team for every thread that has ever asked for one: requests are what runs in parallel here.
_library.LGBM_SetMaxThreads(1)
_predict_single = _library.LGBM_BoosterPredictForMatSingleRowFast
_predict_single.restype = ctypes.c_int
_predict_single.argtypes = [
    ctypes.c_void_p,  # prepared call
    ctypes.c_void_p,  # the row
    ctypes.c_void_p,  # length
    ctypes.c_void_p,  # answer
]
_predict_matrix = _library.LGBM_BoosterPredictForMat
_predict_matrix.restype = ctypes.c_int
_predict_matrix.argtypes = [
    ctypes.c_void_p,  # booster
    ctypes.c_void_p,  # the matrix
    ctypes.c_int,  # its dtype
    ctypes.c_int32,  # rows
    ctypes.c_int32,  # columns
    ctypes.c_int,  # row-major
    ctypes.c_int,  # kind of prediction
    ctypes.c_int,  # first iteration
    ctypes.c_int,  # number of iterations
    ctypes.c_char_p,  # options
    ctypes.c_void_p,  # length
    ctypes.c_void_p,  # answer
]
