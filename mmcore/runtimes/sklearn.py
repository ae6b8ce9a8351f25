"""scikit-learn estimators, and anything pickled that has their methods.

As MLServer serves them, for its clients: the one input has any name, the outputs are the estimator's methods
(``predict`` unless a request asks for others or the settings' parameter ``predict_fn`` says otherwise), datatypes are
numpy's, and a one-dimensional answer gets a trailing dimension of one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import joblib
import numpy as np
import sklearn
from sklearn.exceptions import InconsistentVersionWarning
from sklearn.utils.validation import check_array
from threadpoolctl import threadpool_limits

from mmcore.errors import InvalidRequest, LoadFailed
from mmcore.model import NUMPY_DTYPES, ModelSource, TensorSpec
from mmcore.runtimes.builtin import BuiltinModel
from mmcore.runtimes.declared import method_outputs, single_input
from mmcore.runtimes.failures import describe
from mmcore.runtimes.interface import NUMERIC_DATATYPES, Array, LoadedModel, OutputTensor, bytes_to_text, wire_array
from mmcore.runtimes.size import estimated_size
from mmcore.runtimes.sklearn_direct import direct

log = logging.getLogger(__name__)

#: The methods offered as outputs, where the estimator has them.
_METHODS: Final = ("predict", "predict_proba", "decision_function", "transform")

#: The name that a request's tensor is bound under, and that clients of the archived stack send.
_INPUT: Final = "predict"

#: Pickles hold arrays as they are in memory; joblib compresses them on demand, a forest to a fifth.
_SIZE_FACTOR: Final = 1.1
_SIZE_FACTOR_COMPRESSED: Final = 5.0
_SIZE_BASE: Final = 8 * 1024


class SklearnModel(BuiltinModel):
    """One unpickled estimator. Satisfies ``LoadedModel``."""

    platform = "sklearn"
    any_input_name = True

    def __init__(
        self,
        name: str,
        methods: dict[str, Callable[[Any], Any]],
        input_spec: TensorSpec,
        outputs: tuple[TensorSpec, ...],
        *,
        default_output: str,
        takes: tuple[str, ...],
        size_bytes: int,
    ) -> None:
        super().__init__(
            name,
            (input_spec,),
            outputs,
            default_outputs=(default_output,),
            size_bytes=size_bytes,
            accepts={input_spec.name: takes},
        )
        self._input = input_spec.name
        self._methods = methods

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[OutputTensor]:
        """Call the methods asked for; see ``LoadedModel.infer``."""
        features = inputs[self._input]
        if features.dtype == np.object_:
            features = self._text(features)
        answer = []
        for name in outputs or self.default_outputs:
            method = self._methods.get(name)
            if method is None:
                raise self.unknown_output(name)
            try:
                datatype, array = _answer(method(features))
            except Exception as error:
                if _refuses_inputs(error):
                    raise InvalidRequest(f"model {self.name!r}: {describe(error)}") from error
                raise self._failures.failed(error) from error
            answer.append((name, datatype, array))
        return answer

    def close(self) -> None:
        """Drop the estimator."""
        self._methods.clear()

    def _text(self, features: Array) -> Array:
        try:
            text = bytes_to_text(features)
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"input {self._input!r}: the model takes text, but an element is not UTF-8") from error
        # A vectorizer takes a list of documents; a request's rows are [n] or, in MLServer's habit, [n, 1].
        return text.ravel() if text.ndim == 2 and text.shape[1] == 1 else text


def _refuses_inputs(error: Exception) -> bool:
    """Whether it is scikit-learn's check of the values that it is given: no NaN, no infinity, at least one row."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (
        isinstance(error, ValueError)
        and trace is not None
        and trace.tb_frame.f_globals.get("__name__") == check_array.__module__
    )


def load(source: ModelSource) -> LoadedModel:
    """Read ``source.path`` (skops by its suffix; joblib and pickle are told from content); find out what it answers.

    Each method is called once with a row of zeros, or of text if it takes none, which is also its warm-up.

    Raises:
        LoadFailed: no pickle, one that this scikit-learn cannot read, or an object without a method to serve.
    """
    _prepare_warnings()
    estimator = _read(source.path)
    _bound_threads(estimator, source.settings.parameters.get("n_jobs", "1"))
    offered = [method for method in _METHODS if callable(getattr(estimator, method, None))]
    default = source.settings.parameters.get("predict_fn") or next(iter(offered), "")
    if default not in offered:
        raise LoadFailed(
            f"{source.path.name!r} holds a {type(estimator).__name__}, which has no"
            f" {default or 'predict or transform'} method"
        )
    width = getattr(estimator, "n_features_in_", None)
    found, taken = _probe(estimator, offered, width)
    outputs, methods, default_output = method_outputs(found, default, source.settings.outputs)
    declared = {spec.name: NUMPY_DTYPES[spec.datatype] for spec in source.settings.outputs}
    # A vectorizer takes rows of one text and nothing else; they come as [n] or, in MLServer's habit, as [n, 1].
    documents = taken == "BYTES" and width is None
    shape = (-1,) if documents else (-1, -1 if width is None else int(width))
    takes = ("BYTES",) if documents else NUMERIC_DATATYPES if taken == "FP32" else (*NUMERIC_DATATYPES, "BYTES")
    spec = single_input(TensorSpec(_INPUT, taken or "FP32", shape), source.settings.inputs)
    return SklearnModel(
        source.name,
        {
            name: _bound(direct(estimator, method) or getattr(estimator, method), declared.get(name))
            for name, method in methods.items()
        },
        spec,
        outputs,
        default_output=default_output,
        takes=takes,
        size_bytes=estimated_size(source, source.path, factor=_size_factor(source.path), base=_SIZE_BASE),
    )


def _size_factor(path: Path) -> float:
    with path.open("rb") as file:
        plain = file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")
    return _SIZE_FACTOR if plain else _SIZE_FACTOR_COMPRESSED


def _prepare_warnings() -> None:
    # An estimator of another version mostly works: its owner is told in the log, whatever the process's filters are.
    warnings.filterwarnings("always", category=InconsistentVersionWarning)
    # Requests are arrays by design; a model that was fitted on a data frame would warn at each of them.
    warnings.filterwarnings("ignore", message="X does not have valid feature names", category=UserWarning)


def _read(path: Path) -> Any:
    if path.suffix == ".skops":
        return _read_skops(path)
    try:
        return joblib.load(path)
    except (MemoryError, ModuleNotFoundError):
        raise
    except AttributeError as error:
        raise LoadFailed(
            f"{path.name!r} was pickled with other versions or code than are installed"
            f" (scikit-learn {sklearn.__version__}, numpy {np.__version__}): {describe(error)}"
        ) from error
    except Exception as error:  # a pickle can raise anything
        raise LoadFailed(
            f"{path.name!r} is no joblib or pickle file that scikit-learn {sklearn.__version__} reads:"
            f" {describe(error)}"
        ) from error


def _read_skops(path: Path) -> Any:
    """Read the format that runs no code of the file's: types outside of scikit-learn, scipy and numpy are refused."""
    try:
        from skops.io import get_untrusted_types, load
    except ImportError as error:
        raise LoadFailed(f"{path.name!r} needs skops; install it with: pip install 'mmcore[skops]'") from error
    try:
        untrusted = get_untrusted_types(file=path)
        if not untrusted:
            return load(path)
    except Exception as error:  # a damaged archive can raise anything
        raise LoadFailed(f"{path.name!r} is no skops file: {describe(error)}") from error
    raise LoadFailed(f"{path.name!r} holds types that skops does not trust: {', '.join(sorted(untrusted))}")


def _bound_threads(estimator: Any, n_jobs: str) -> None:
    """Make an estimator that was fitted with many jobs answer with one: requests are what runs in parallel here."""
    if not hasattr(estimator, "get_params") or not hasattr(estimator, "set_params"):
        return
    jobs = [name for name in estimator.get_params() if name == "n_jobs" or name.endswith("__n_jobs")]
    if jobs:
        try:
            estimator.set_params(**dict.fromkeys(jobs, int(n_jobs)))
        except ValueError as error:
            raise LoadFailed(f"the parameter n_jobs is {n_jobs!r}: {error}") from error


def _probe(estimator: Any, methods: Sequence[str], width: int | None) -> tuple[tuple[TensorSpec, ...], str | None]:
    """The spec of every method's answer, and the datatype of the features: FP32, BYTES of text, or None if unknown."""
    rows: dict[str, Array] = {} if width is None else {"FP32": np.zeros((1, width), dtype=np.float32)}
    rows["BYTES"] = np.full(1 if width is None else (1, width), "text", dtype=np.object_)
    for datatype, row in rows.items():
        found = [_spec(estimator, method, row) for method in methods]
        if any(found):
            unknown = (TensorSpec(method, _label_datatype(estimator, method), (-1, -1)) for method in methods)
            return tuple(spec or other for spec, other in zip(found, unknown, strict=True)), datatype
    return tuple(TensorSpec(method, _label_datatype(estimator, method), (-1, -1)) for method in methods), None


def _spec(estimator: Any, method: str, row: Array) -> TensorSpec | None:
    try:
        datatype, array = _answer(getattr(estimator, method)(row))
    except Exception as error:  # the row may mean nothing to it; the first real request will tell
        log.debug("a row of %r has no %s: %s", row.flat[0], method, error)
        return None
    return TensorSpec(method, datatype, (-1, *array.shape[1:]))


def _label_datatype(estimator: Any, method: str) -> str:
    """What a method answers as far as can be told without calling it: a classifier's labels, else FP64."""
    labels = getattr(estimator, "classes_", None)
    if method == "predict" and isinstance(labels, np.ndarray):
        return wire_array(labels)[0]
    return "FP64"


def _bound(method: Callable[[Any], Any], dtype: np.dtype[Any] | None) -> Callable[[Any], Any]:
    """The method, its answer converted to the dtype that the settings declare, where they do."""
    if dtype is None or dtype == np.object_:
        return method

    def converted(features: Any) -> Array:
        return _answer(method(features))[1].astype(dtype, copy=False)

    return converted


def _answer(value: Any) -> tuple[str, Array]:
    if isinstance(value, list):  # predict_proba over several outputs: one array of classes for each
        value = np.stack(value, axis=1)
    elif hasattr(value, "toarray"):  # a sparse matrix
        value = value.toarray()
    datatype, array = wire_array(value)
    return datatype, array.reshape(-1, 1) if array.ndim == 1 else array


#: Matrix products of single rows gain nothing from BLAS threads, which would fight with the serving threads.
threadpool_limits(limits=1, user_api="blas")
