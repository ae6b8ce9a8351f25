"""OpenVINO's intermediate representation (``.xml`` beside its ``.bin``) on the CPU plugin.

Names, datatypes and shapes are the model's own, a dynamic dimension is -1. A tensor of several names (a converter keeps
``x`` and ``x:0``) has the one that the settings use, else the first. A request runs on the thread that brought it:
compiled for a stream, as is the plugin's default, every model would own two threads more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import openvino

from mmcore.errors import InvalidRequest, LoadFailed
from mmcore.model import ModelSource, TensorSpec
from mmcore.runtimes.builtin import BuiltinModel
from mmcore.runtimes.declared import merge_declared
from mmcore.runtimes.failures import describe
from mmcore.runtimes.interface import Array, LoadedModel, OutputTensor, bytes_to_text, text_to_bytes
from mmcore.runtimes.size import estimated_size

#: Element types to V2 datatypes. bf16 and the types of less than a byte have no numpy form that OpenVINO takes.
_DATATYPES: Final[dict[str, str]] = {
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "u64": "UINT64",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "f32": "FP32",
    "f64": "FP64",
    "string": "BYTES",
}

#: Measured (OpenVINO 2026.4): no streams leaves the process at the threads it had, one stream adds two for each model.
_OPTIONS: Final = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 0}

#: The plugin computes in bf16 where the processor can, so that a model's answers would depend on the instance it is on.
_PRECISION: Final = "INFERENCE_PRECISION_HINT"
_FULL_PRECISION: Final = "f32"

#: Measured (OpenVINO 2026.4): 218 KB in memory for 6 KB on disk, 2.0 MB for 0.8 MB, 25.7 MB for 12.6 MB: weights are
#: held a second time, laid out for the kernels.
_SIZE_FACTOR: Final = 2.0
_SIZE_BASE: Final = 200 * 1024

_HEAD_BYTES: Final = 4096


class OpenvinoModel(BuiltinModel):
    """One compiled model. Satisfies ``LoadedModel``."""

    platform = "openvino"

    def __init__(
        self,
        name: str,
        compiled: openvino.CompiledModel,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        default_outputs: tuple[str, ...],
        size_bytes: int,
    ) -> None:
        super().__init__(name, inputs, outputs, default_outputs=default_outputs, size_bytes=size_bytes)
        self._compiled = compiled
        self._ports = tuple((index, spec.name, spec.datatype == "BYTES") for index, spec in enumerate(inputs))
        self._answers = {spec.name: (index, spec.datatype) for index, spec in enumerate(outputs)}
        # A request of the framework answers one call at a time: there are as many as there were ever threads at once.
        self._idle: list[openvino.InferRequest] = []

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[OutputTensor]:
        """Run the graph; see ``LoadedModel.infer``."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            try:
                self._fill(request, inputs)
                request.start_async()
            except RuntimeError as error:  # what the framework says of shapes that it does not take
                raise InvalidRequest(f"model {self.name!r}: {_short(error)}") from error
            try:
                request.wait()
            except Exception as error:
                raise self._failures.failed(error, _short(error)) from error
            return [self._answer(request, name) for name in outputs or self.default_outputs]
        finally:
            self._idle.append(request)

    def close(self) -> None:
        """Drop the compiled model; its memory is freed with the last reference."""
        self._idle.clear()
        del self._compiled

    def _fill(self, request: openvino.InferRequest, inputs: Mapping[str, Array]) -> None:
        # Copied into the request's own tensors: OpenVINO takes no arrays that are read-only.
        for index, name, is_text in self._ports:
            array = inputs[name]
            if is_text:
                request.set_input_tensor(index, openvino.Tensor(self._text(name, array)))
                continue
            tensor = request.get_input_tensor(index)
            target = tensor.data
            if target.shape != array.shape:
                tensor.shape = array.shape
                target = tensor.data
            np.copyto(target, array)

    def _text(self, name: str, array: Array) -> Array:
        try:
            return bytes_to_text(array).astype(np.str_)
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"input {name!r}: the model takes text, but an element is not UTF-8") from error

    def _answer(self, request: openvino.InferRequest, name: str) -> OutputTensor:
        found = self._answers.get(name)
        if found is None:
            raise self.unknown_output(name)
        index, datatype = found
        tensor = request.get_output_tensor(index)
        if datatype == "BYTES":
            return name, datatype, text_to_bytes(tensor.str_data)
        return name, datatype, tensor.data.copy()


def load(source: ModelSource) -> LoadedModel:
    """Read and compile ``source.path``, an ``.xml`` whose ``.bin`` lies beside it.

    Raises:
        LoadFailed: no such pair, an operator this OpenVINO does not know, a tensor of a type that V2 cannot carry, or
            settings that contradict the model.
    """
    if b"<net" not in _head(source.path):
        # OpenVINO would try the readers of every other format it knows.
        raise LoadFailed(f"{source.path.name!r} is no model of OpenVINO: it holds no <net>")
    options = _OPTIONS | {_PRECISION: source.settings.parameters.get(_PRECISION, _FULL_PRECISION)}
    try:
        compiled = _core.compile_model(_core.read_model(source.path), "CPU", options)
    except RuntimeError as error:
        raise LoadFailed(
            f"{source.path.name!r} is no model that OpenVINO {openvino.__version__} reads: {_short(error)}"
        ) from error
    settings = source.settings
    inputs = merge_declared("input", _specs("input", compiled.inputs, settings.inputs), settings.inputs)
    outputs = merge_declared("output", _specs("output", compiled.outputs, settings.outputs), settings.outputs)
    asked = tuple(spec.name for spec in settings.outputs) or tuple(spec.name for spec in outputs)
    size = estimated_size(source, source.path, factor=_SIZE_FACTOR, base=_SIZE_BASE)
    return OpenvinoModel(source.name, compiled, inputs, outputs, default_outputs=asked, size_bytes=size)


def _specs(kind: str, ports: Sequence[Any], declared: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    specs = []
    for port in ports:
        name = _name(port, declared)
        element = port.get_element_type().get_type_name()
        if element not in _DATATYPES:
            raise LoadFailed(f"{kind} {name!r} is of {element}, which cannot be sent over KServe v2")
        shape = port.get_partial_shape()
        sizes = () if shape.rank.is_dynamic else tuple(-1 if size.is_dynamic else size.get_length() for size in shape)
        specs.append(TensorSpec(name, _DATATYPES[element], sizes))
    return tuple(specs)


def _name(port: Any, declared: tuple[TensorSpec, ...]) -> str:
    """One of the tensor's names: the one declared, else the first, else its node's."""
    names = sorted(port.get_names())
    if not names:
        return str(port.get_node().get_friendly_name())
    return next((spec.name for spec in declared if spec.name in names), names[0])


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _short(error: Exception) -> str:
    """The framework's text without the C++ files and lines it writes before it: its last line."""
    lines = [line.strip() for line in describe(error).splitlines()]
    return [line for line in lines if line][-1].removeprefix(f"{type(error).__name__}: ")


_core = openvino.Core()
# A file that its owner overwrites must not become the memory of a model in use.
_core.set_property({"ENABLE_MMAP": False})
