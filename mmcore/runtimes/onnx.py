"""ONNX models on ONNX Runtime's CPU provider.

Names, datatypes and shapes are the graph's own, a symbolic dimension is -1, as Triton's users know them. A request
runs on the thread that brought it: sessions own no threads, and share one arena for activations, while their weights
are allocated apart, so that an unloaded model's memory goes back to the system.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from mmcore.errors import InvalidRequest, LoadFailed
from mmcore.model import ModelSource, TensorSpec
from mmcore.runtimes.builtin import BuiltinModel
from mmcore.runtimes.declared import merge_declared
from mmcore.runtimes.failures import describe
from mmcore.runtimes.interface import Array, LoadedModel, OutputTensor, bytes_to_text, text_to_bytes
from mmcore.runtimes.size import estimated_size

log = logging.getLogger(__name__)

#: ``NodeArg.type`` to V2 datatype. bfloat16, float8, complex and int4 have no numpy form that ONNX Runtime takes.
_DATATYPES: Final[dict[str, str]] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

#: Measured (ONNX Runtime 1.32): 90 KB for a 1 KB graph, 184 KB for one of 26 KB, 3.5 MB for 1.5 MB of weights: those of
#: matrix products are held a second time, packed for the kernels.
_SIZE_FACTOR: Final = 2.3
_SIZE_BASE: Final = 104 * 1024

#: The parameter by which Triton's backend gives one model threads of its own, for one that is large and rarely asked.
_THREADS_PARAMETER: Final = "intra_op_thread_count"

#: ``[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : `` before every text of the framework.
_ERROR_PREFIX: Final = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


class OnnxModel(BuiltinModel):
    """One session. Satisfies ``LoadedModel``."""

    platform = "onnxruntime_onnx"

    def __init__(
        self,
        name: str,
        session: onnxruntime.InferenceSession,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        default_outputs: tuple[str, ...],
        size_bytes: int,
    ) -> None:
        super().__init__(name, inputs, outputs, default_outputs=default_outputs, size_bytes=size_bytes)
        self._session = session
        self._run: Callable[[Sequence[str], Mapping[str, Array]], list[Array]] = session.run
        self._datatypes = {spec.name: spec.datatype for spec in outputs}
        self._text_inputs = tuple(spec.name for spec in inputs if spec.datatype == "BYTES")
        self._text_outputs = "BYTES" in self._datatypes.values()

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[OutputTensor]:
        """Run the graph for the outputs asked; see ``LoadedModel.infer``."""
        names = outputs or self.default_outputs
        datatypes = self._datatypes
        if self._text_inputs:
            inputs = self._with_text(inputs)
        try:
            answer = [
                (name, datatypes[name], value) for name, value in zip(names, self._run(names, inputs), strict=True)
            ]
        except Exception as error:
            raise self._explained(error, names) from error
        return self._with_bytes(answer) if self._text_outputs else answer

    def close(self) -> None:
        """Drop the session; ONNX Runtime frees its memory with the last reference."""
        del self._session, self._run

    def _with_text(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        # ONNX Runtime takes str alone: it would turn b"x" into the four characters b'x'.
        converted = dict(inputs)
        for name in self._text_inputs:
            try:
                converted[name] = bytes_to_text(inputs[name])
            except UnicodeDecodeError as error:
                raise InvalidRequest(f"input {name!r}: the model takes text, but an element is not UTF-8") from error
        return converted

    def _with_bytes(self, answer: list[OutputTensor]) -> list[OutputTensor]:
        return [
            (name, datatype, text_to_bytes(value) if datatype == "BYTES" else value) for name, datatype, value in answer
        ]

    def _explained(self, error: Exception, names: Sequence[str]) -> Exception:
        for name in names:
            if name not in self._datatypes:
                return self.unknown_output(name)
        text = _ERROR_PREFIX.sub("", str(error)).strip()
        if isinstance(error, InvalidArgument):
            return InvalidRequest(f"model {self.name!r}: {text}")
        return self._failures.failed(error, text)


def load(source: ModelSource) -> LoadedModel:
    """Open a session on ``source.path``, an ``.onnx`` file (external data beside it is found by the framework).

    Raises:
        LoadFailed: no ONNX model, an operator or opset this ONNX Runtime does not know, an input of a type that V2
            cannot carry, or settings that contradict the graph.
    """
    options = _options(source.settings.parameters.get(_THREADS_PARAMETER, "1"))
    try:
        session = onnxruntime.InferenceSession(str(source.path), options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        text = _ERROR_PREFIX.sub("", describe(error).removeprefix(f"{type(error).__name__}: "))
        raise LoadFailed(
            f"{source.path.name!r} is no model that ONNX Runtime {onnxruntime.__version__} reads: {text}"
        ) from error
    settings = source.settings
    inputs = merge_declared("input", _input_specs(session), settings.inputs)
    outputs = merge_declared("output", _output_specs(session), settings.outputs)
    asked = tuple(spec.name for spec in settings.outputs) or tuple(spec.name for spec in outputs)
    size = estimated_size(source, source.path, factor=_SIZE_FACTOR, base=_SIZE_BASE)
    return OnnxModel(source.name, session, inputs, outputs, default_outputs=asked, size_bytes=size)


def _options(threads: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    try:
        options.intra_op_num_threads = int(threads)
    except ValueError as error:
        raise LoadFailed(f"the parameter {_THREADS_PARAMETER} is {threads!r}, which is no number") from error
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; its warnings name graph nodes, which no operator of a server can act on
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


def _register_arena() -> None:
    """One arena for the whole process, growing by what is asked instead of doubling."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    unlimited, same_as_requested, default = 0, 1, -1
    config = onnxruntime.OrtArenaCfg(unlimited, same_as_requested, default, default)
    onnxruntime.create_and_register_allocator(memory, config)


def _input_specs(session: onnxruntime.InferenceSession) -> tuple[TensorSpec, ...]:
    specs = []
    for node in session.get_inputs():
        datatype = _DATATYPES.get(node.type)
        if datatype is None:
            raise LoadFailed(f"input {node.name!r} is a {node.type}, which is not served of ONNX models")
        specs.append(TensorSpec(node.name, datatype, _shape(node.shape)))
    return tuple(specs)


def _output_specs(session: onnxruntime.InferenceSession) -> tuple[TensorSpec, ...]:
    specs = []
    for node in session.get_outputs():
        datatype = _DATATYPES.get(node.type)
        if datatype is None:
            log.warning("output %r is a %s, which cannot be sent over KServe v2: left out", node.name, node.type)
        else:
            specs.append(TensorSpec(node.name, datatype, _shape(node.shape)))
    if not specs:
        raise LoadFailed(
            "no output is a tensor that KServe v2 can carry (of an skl2onnx model, export with zipmap=False)"
        )
    return tuple(specs)


def _shape(dimensions: Sequence[Any]) -> tuple[int, ...]:
    """The graph's dimensions: a name or nothing, where it leaves one free, is -1."""
    return tuple(size if isinstance(size, int) and size >= 0 else -1 for size in dimensions)


_register_arena()
