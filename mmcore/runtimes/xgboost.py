"""XGBoost models: JSON, UBJSON and what is called ``.bst``, told apart by content.

Answers are those of XGBoost's own scikit-learn interface, which is what the archived stack served: a model saved
from a ``Booster`` or a regressor answers ``predict`` in FP32; one saved from an ``XGBClassifier`` answers the class
labels and offers ``predict_proba``. A model trained with early stopping answers from its best iteration.

A model's trees are walked by ``mmcore._ext.trees`` where that is known to answer the same (see ``xgboost_trees``). Else
a request goes straight to the library's C function ``XGBoosterPredictFromDense`` (xgboost/c_api.h): the Python method
around it, ``Booster.inplace_predict``, takes three times as long for a small model.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import xgboost
from xgboost.libpath import find_lib_path

from mmcore.errors import LoadFailed
from mmcore.model import NUMPY_DTYPES, ModelSource, TensorSpec
from mmcore.runtimes import trees, ubjson
from mmcore.runtimes.builtin import BuiltinModel
from mmcore.runtimes.declared import method_outputs, single_input
from mmcore.runtimes.interface import NUMERIC_DATATYPES, Array, LoadedModel, OutputTensor
from mmcore.runtimes.size import estimated_size
from mmcore.runtimes.xgboost_trees import forest

_INPUT: Final = "predict"

#: Measured (XGBoost 3.2): 526 KB in memory for 589 KB of JSON or 397 KB of UBJSON.
_SIZE_FACTOR: Final = 1.3
_SIZE_BASE: Final = 16 * 1024

#: The dtypes that the library reads from an array interface as they are; others are widened to float32 first.
_NATIVE: Final = {np.dtype(dtype): np.dtype(dtype).str for dtype in (np.float32, np.float64, np.int32, np.int64)}

#: Values of ``type`` in the prediction config (xgboost/c_api.h).
_VALUE: Final = 0
_MARGIN: Final = 1

Features = Array
Prediction = Callable[[Features], Array]


class XgboostModel(BuiltinModel):
    """One booster. Satisfies ``LoadedModel``."""

    platform = "xgboost"
    any_input_name = True

    def __init__(
        self,
        name: str,
        methods: dict[str, Prediction],
        input_spec: TensorSpec,
        outputs: tuple[TensorSpec, ...],
        *,
        default_output: str,
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

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[OutputTensor]:
        """Predict for a matrix of rows; see ``LoadedModel.infer``."""
        features = inputs[self._input]
        answer = []
        for name in outputs or self.default_outputs:
            found = self._methods.get(name)
            if found is None:
                raise self.unknown_output(name)
            datatype, method = found
            try:
                answer.append((name, datatype, method(features)))
            except Exception as error:
                raise self._failures.failed(error, _without_stack(error)) from error
        return answer

    def close(self) -> None:
        """Drop the booster; the library frees it with the last reference."""
        self._methods.clear()


class _Booster:
    """A booster's predictions, made without the checks that a request's signature has made.

    Attributes:
        values: FP32 [n, columns], what the objective makes of the trees' sum.
        margins: FP32 [n, classes], the sum itself.

    ``direct`` lets the trees be walked without the library, which is let go of then. ``file`` is what it was read from.
    """

    def __init__(self, booster: xgboost.Booster, *, direct: bool = True, file: bytes = b"") -> None:
        learner = _learner(booster, file)
        shape, attributes = learner["learner_model_param"], learner["attributes"]
        self.width = int(shape["num_feature"])
        self.objective: str = learner["objective"]["name"]
        self.columns = max(int(shape["num_class"]), int(shape.get("num_target", "1")), 1)
        self.classifier = _estimator_type(attributes.get("scikit_learn")) == "classifier"
        self._booster = booster
        self._handle = booster.handle
        best = attributes.get("best_iteration")
        # The linear booster has no in-place prediction, nor iterations to choose from.
        self._linear = learner["gradient_booster"]["name"] == "gblinear"
        self._iterations = 0 if best is None or self._linear else int(best) + 1
        self._value_config = self._config(_VALUE)
        self._margin_config = self._config(_MARGIN)
        self.values: Prediction = self._library_values
        self.margins: Prediction = self._library_margins
        walks = direct and not self._linear
        found = walks and forest(learner, iterations=self._iterations, values=self.values, margins=self.margins)
        if found:
            self.values, self.margins = found.values, found.margins
            del self._booster, self._handle

    def _config(self, kind: int) -> bytes:
        options = {
            "type": kind,
            "training": False,
            "iteration_begin": 0,
            "iteration_end": self._iterations,
            "missing": math.nan,
            "strict_shape": True,
            "cache_id": 0,
        }
        return json.dumps(options).encode()

    def _library_values(self, features: Features) -> Array:
        return self._predict(features, self._value_config)

    def _library_margins(self, features: Features) -> Array:
        return self._predict(features, self._margin_config)

    def probabilities(self, features: Features) -> Array:
        """FP32 [n, columns]: the values, but of each class where the objective chooses one."""
        return _softmax(self.margins(features)) if self.objective == "multi:softmax" else self.values(features)

    def _predict(self, features: Features, config: bytes) -> Array:
        if self._linear:
            matrix = xgboost.DMatrix(features, nthread=1)
            return self._booster.predict(matrix, output_margin=config is self._margin_config, strict_shape=True)
        typestr = _NATIVE.get(features.dtype)
        if typestr is None:
            features = features.astype(np.float32)
            typestr = "<f4"
        features = np.ascontiguousarray(features)
        rows, width = features.shape
        # The array interface protocol, version 3, as the JSON that the C function takes.
        interface = b'{"data":[%d,true],"shape":[%d,%d],"typestr":"%s","version":3}' % (
            features.__array_interface__["data"][0], rows, width, typestr.encode(),
        )  # fmt: skip
        shape = _SHAPE()
        dimensions = ctypes.c_uint64()
        result = _RESULT()
        if _predict_from_dense(self._handle, interface, config, None, shape, dimensions, result):
            raise xgboost.core.XGBoostError(_last_error().decode(errors="replace"))
        # The result lives in the library's memory of this thread until its next call: copied before anything else.
        extent = shape[: dimensions.value]
        values = np.frombuffer(ctypes.string_at(result, 4 * math.prod(extent)), dtype=np.float32)
        return values.reshape(rows, -1) if rows else values.reshape(0, self.columns)


def load(source: ModelSource) -> LoadedModel:
    """Read a model of any of XGBoost's own formats from ``source.path``.

    Raises:
        LoadFailed: another library's model, a truncated or corrupt file, or a format this XGBoost has dropped.
    """
    # What the library warns of (a model of an old version) is raised inside a C callback: it must not be an error.
    warnings.filterwarnings("always", message=r"\[\d\d:\d\d:\d\d\] WARNING", category=UserWarning)
    threads = source.settings.parameters.get("nthread", "1")
    # Who asks for threads has batches worth them.
    content = source.path.read_bytes()
    booster = _Booster(_read(source.path, content, threads), direct=threads == "1", file=content)
    backend = trees.TreeBackend.configured(source.settings.parameters)
    if backend is None:
        input_name, default = _INPUT, "predict"
        methods = _methods(booster)
    else:
        input_name, default = trees.INPUT, trees.OUTPUT
        methods = {default: ("FP32", *backend.method(booster.probabilities, booster.columns))}
    found = tuple(TensorSpec(name, datatype, (-1, columns)) for name, (datatype, columns, _) in methods.items())
    outputs, names, default_output = method_outputs(found, default, source.settings.outputs)
    return XgboostModel(
        source.name,
        {spec.name: _typed(methods[names[spec.name]], spec.datatype) for spec in outputs},
        single_input(TensorSpec(input_name, "FP32", (-1, booster.width)), source.settings.inputs),
        outputs,
        default_output=default_output,
        size_bytes=estimated_size(source, source.path, factor=_SIZE_FACTOR, base=_SIZE_BASE),
    )


def _read(path: Path, content: bytes, nthread: str) -> xgboost.Booster:
    if content[:4] == b"tree":
        raise LoadFailed(f"{path.name!r} is a LightGBM model, not one of XGBoost")
    # Both of XGBoost's formats are one object; on less than two bytes the library ends the process.
    if len(content) < 2 or content[:1] != b"{":
        raise LoadFailed(
            f"{path.name!r} is neither JSON nor UBJSON; XGBoost's older binary format has to be converted"
            " (load it with XGBoost 2 or older, and save_model to a name that ends in .ubj)"
        )
    # The library takes a UBJSON file without its last bytes for a whole one.
    if not content.rstrip().endswith(b"}"):
        raise LoadFailed(f"{path.name!r} is cut short: its outermost object has no end")
    try:
        # The library reads trees with as many threads as the caller's OpenMP allows, whatever nthread says; they would
        # spin beside the requests, and take memory that is not counted as this thread's.
        _set_threads(1)
        booster = xgboost.Booster({"nthread": int(nthread)})
        booster.load_model(bytearray(content))
    except ValueError as error:  # XGBoostError is one, as is int() on no number
        raise LoadFailed(
            f"{path.name!r} is no model that XGBoost {xgboost.__version__} reads: {_without_stack(error)}"
        ) from error
    return booster


def _learner(booster: xgboost.Booster, file: bytes) -> dict[str, Any]:
    """A model as the library would write it; what ``file`` has, if the library has written it as it is."""
    global _own_end
    if _own_end and file.endswith(_own_end):
        # Another's may hold what only the library understands.
        with contextlib.suppress(ValueError, LookupError, TypeError, struct.error, RecursionError):
            learner: dict[str, Any] = ubjson.read(file)["learner"]
            return learner
    saved = bytes(booster.save_raw("ubj"))
    _own_end = saved[saved.rindex(b"version") :]
    written: dict[str, Any] = ubjson.read(saved)["learner"]
    return written


#: How UBJSON ends that this release has written: with its version.
_own_end = b""


def _estimator_type(saved: str | None) -> str:
    """``classifier`` or ``regressor`` where the model was saved from a scikit-learn estimator, else nothing."""
    return str(json.loads(saved).get("_estimator_type", "")) if saved else ""


def _methods(booster: _Booster) -> dict[str, tuple[str, int, Prediction]]:
    """Output name to datatype, number of columns and function."""
    if not booster.classifier:
        columns = 1 if booster.objective == "multi:softmax" else booster.columns
        return {"predict": ("FP32", columns, booster.values)}
    if booster.objective == "multi:softmax":
        return {
            "predict": ("INT32", 1, lambda features: booster.values(features).astype(np.int32)),
            "predict_proba": ("FP32", booster.columns, lambda features: _softmax(booster.margins(features))),
        }
    if booster.objective == "multi:softprob":
        return {
            "predict": ("INT64", 1, lambda features: booster.values(features).argmax(axis=1).reshape(-1, 1)),
            "predict_proba": ("FP32", booster.columns, booster.values),
        }
    if booster.columns > 1:  # several labels at once, each yes or no
        return {
            "predict": ("FP64", booster.columns, lambda features: (booster.values(features) > 0.5).astype(np.float64)),
            "predict_proba": ("FP32", booster.columns, booster.values),
        }
    return {
        "predict": ("INT64", 1, lambda features: (booster.values(features) > 0.5).astype(np.int64)),
        "predict_proba": ("FP32", 2, lambda features: _both_classes(booster.values(features))),
    }


def _typed(method: tuple[str, int, Prediction], datatype: str) -> Prediction:
    """The prediction, converted where the settings declare another datatype than it has."""
    own, _, predict = method
    if own == datatype:
        return predict
    dtype = NUMPY_DTYPES[datatype]
    if dtype == np.object_:
        raise LoadFailed("an XGBoost model answers numbers; the settings declare a BYTES output")
    return lambda features: predict(features).astype(dtype)


def _both_classes(positive: Array) -> Array:
    return np.hstack((np.float32(1.0) - positive, positive))


def _softmax(margins: Array) -> Array:
    powers = np.exp(margins - margins.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _without_stack(error: Exception) -> str:
    """The library's text without the C++ stack, the time and the source line it writes around it."""
    text = str(error).partition("\nStack trace:")[0].strip()
    head, found, tail = text.partition("] ")
    return tail.partition(": ")[2].strip() or tail if found and head.startswith("[") else text


_SHAPE = ctypes.POINTER(ctypes.c_uint64)
_RESULT = ctypes.POINTER(ctypes.c_float)
_library = ctypes.CDLL(find_lib_path()[0])  # the library that the package has loaded: the same handle
# Of the OpenMP library that it is linked to; it holds for the calling thread alone.
_set_threads: Callable[[int], object] = getattr(_library, "omp_set_num_threads", lambda count: None)
_last_error = _library.XGBGetLastError
_last_error.restype = ctypes.c_char_p
_predict_from_dense = _library.XGBoosterPredictFromDense
_predict_from_dense.restype = ctypes.c_int
_predict_from_dense.argtypes = [
    ctypes.c_void_p,  # booster
    ctypes.c_char_p,  # the matrix, as array interface JSON
    ctypes.c_char_p,  # config JSON
    ctypes.c_void_p,  # base margins, none
    ctypes.POINTER(_SHAPE),
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(_RESULT),
]
