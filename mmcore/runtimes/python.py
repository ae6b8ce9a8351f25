"""Models that are a Python class in ``model.py``.

The contract, whole::

    class Model:                                            # or the name in the settings' parameter "class"
        inputs = [("INPUT0", "INT32", [-1, 16])]            # name, V2 datatype, shape; -1 where free
        outputs = [("OUTPUT0", "INT32", [-1, 16])]          # the settings' tensors win where they are given

        def load(self, path, parameters): ...               # optional: the model's folder, the settings' parameters
        def predict(self, inputs): ...                      # dict of arrays in, dict of arrays out
        def close(self): ...                                # optional

``predict`` is called from several threads at once, and its arrays may be read-only views over a request; it may
return them. BYTES tensors are object arrays of ``bytes`` (``str`` is taken in an answer). An answered array of another
dtype of the same kind (float64 for FP32) is converted. Any exception becomes INTERNAL with its text; to blame the
caller, raise ``mmcore.errors.InvalidRequest``. Files beside ``model.py`` are imported relatively.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Final

import numpy as np

from mmcore.errors import InferenceFailed, LoadFailed, MmcoreError
from mmcore.model import NUMPY_DTYPES, ModelSource, TensorSpec
from mmcore.runtimes.builtin import BuiltinModel
from mmcore.runtimes.declared import check_datatypes
from mmcore.runtimes.failures import describe
from mmcore.runtimes.interface import Array, LoadedModel, OutputTensor, text_to_bytes
from mmcore.runtimes.python_import import forget, import_model_file
from mmcore.runtimes.size import estimated_size

log = logging.getLogger(__name__)

_FILE: Final = "model.py"
_CLASS: Final = "Model"

#: The folder's files (weights, vocabularies) as they are, and a module's code.
_SIZE_FACTOR: Final = 1.0
_SIZE_BASE: Final = 16 * 1024


class PythonModel(BuiltinModel):
    """One instance of a model's class. Satisfies ``LoadedModel``."""

    platform = "python"

    def __init__(
        self,
        name: str,
        module: ModuleType,
        instance: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        size_bytes: int,
    ) -> None:
        super().__init__(
            name, inputs, outputs, default_outputs=tuple(spec.name for spec in outputs), size_bytes=size_bytes
        )
        self._module = module
        self._instance = instance
        self._predict: Callable[[Mapping[str, Array]], Any] = instance.predict
        self._typed = {spec.name: (spec.datatype, NUMPY_DTYPES[spec.datatype]) for spec in outputs}

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[OutputTensor]:
        """Call ``predict``; see ``LoadedModel.infer``."""
        try:
            returned = self._predict(inputs)
        except MmcoreError:
            raise  # the model knows our errors and chose one
        except Exception as error:
            raise self._failures.failed(error) from error
        answer = []
        for name in outputs or self.default_outputs:
            try:
                value = returned[name]
                datatype, dtype = self._typed[name]
            except (KeyError, TypeError, IndexError) as error:
                raise self._without(name, returned) from error
            if type(value) is not np.ndarray or value.dtype is not dtype or dtype.hasobject:
                value = self._converted(name, value, datatype, dtype)
            answer.append((name, datatype, value))
        return answer

    def close(self) -> None:
        """Call the model's ``close`` where it has one, then forget its modules."""
        try:
            if hasattr(self._instance, "close"):
                self._instance.close()
        except Exception:  # a model's clean-up must not keep its memory
            log.warning("model %r failed to close", self.name, exc_info=True)
        finally:
            del self._instance, self._predict
            forget(self._module)

    def _without(self, name: str, returned: object) -> MmcoreError:
        if name not in self._typed:
            return self.unknown_output(name)
        found = ", ".join(map(repr, returned)) if isinstance(returned, Mapping) else type(returned).__name__
        return InferenceFailed(f"model {self.name!r} returned no output {name!r}, but {found or 'nothing'}")

    def _converted(self, name: str, value: object, datatype: str, dtype: np.dtype[Any]) -> Array:
        try:
            array = np.asarray(value)
            return text_to_bytes(array) if dtype.hasobject else array.astype(dtype, casting="same_kind", copy=False)
        except (TypeError, ValueError) as error:
            raise InferenceFailed(
                f"model {self.name!r} returned output {name!r} that is no {datatype}: {error}"
            ) from error


def load(source: ModelSource) -> LoadedModel:
    """Import ``source.path``, a ``model.py`` or the folder of one, and make an instance of its class.

    Raises:
        LoadFailed: no such file or class, no tensors declared, or its code raised.
    """
    file = source.path / _FILE if source.path.is_dir() else source.path
    if not file.is_file():
        raise LoadFailed(f"{source.path.name!r} holds no {_FILE}")
    settings = source.settings
    module = import_model_file(source.name, file)
    try:
        instance = _instance(file.name, module, settings.parameters.get("class", _CLASS))
        if hasattr(instance, "load"):
            instance.load(file.parent, dict(settings.parameters))
        inputs = settings.inputs or _declared(file.name, instance, "inputs")
        outputs = settings.outputs or _declared(file.name, instance, "outputs")
        size = estimated_size(source, file.parent, factor=_SIZE_FACTOR, base=_SIZE_BASE)
        return PythonModel(source.name, module, instance, inputs, outputs, size_bytes=size)
    except BaseException:
        forget(module)
        raise


def _instance(file: str, module: ModuleType, name: str) -> Any:
    made = getattr(module, name, None)
    if not isinstance(made, type) or not callable(getattr(made, "predict", None)):
        raise LoadFailed(f"{file!r} has no class {name!r} with a predict method")
    return made()


def _declared(file: str, instance: object, kind: str) -> tuple[TensorSpec, ...]:
    declared = getattr(instance, kind, None)
    if not declared:
        raise LoadFailed(
            f"{file!r} declares no {kind}: give the class {kind} = [(name, datatype, shape)], or write them into"
            " mmcore.yaml or config.pbtxt"
        )
    try:
        specs = tuple(_spec(entry) for entry in declared)
    except (TypeError, ValueError, KeyError) as error:
        raise LoadFailed(f"{file!r}: {kind} is no list of (name, datatype, shape): {describe(error)}") from error
    check_datatypes(specs)
    return specs


def _spec(entry: TensorSpec | Mapping[str, Any] | Iterable[Any]) -> TensorSpec:
    if isinstance(entry, TensorSpec):
        return entry
    if isinstance(entry, Mapping):
        entry = (entry["name"], entry["datatype"], entry["shape"])
    name, datatype, shape = entry
    return TensorSpec(str(name), str(datatype), tuple(int(size) for size in shape))
