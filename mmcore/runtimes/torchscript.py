"""TorchScript modules, made by ``torch.jit.script`` or ``torch.jit.trace``, on PyTorch's CPU kernels.

Names, datatypes and shapes come from the settings, see ``torchscript_signature``. A request runs on the thread that
brought it; the module is in evaluation mode and frozen, and no gradients are recorded.
"""

from __future__ import annotations

import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from mmcore.errors import InvalidRequest, LoadFailed
from mmcore.model import NUMPY_DTYPES, ModelSource, TensorSpec
from mmcore.runtimes.builtin import BuiltinModel
from mmcore.runtimes.failures import describe
from mmcore.runtimes.interface import DATATYPES, NUMERIC_DATATYPES, Array, LoadedModel, OutputTensor, text_to_bytes
from mmcore.runtimes.size import estimated_size
from mmcore.runtimes.torchscript_signature import Inputs, Outputs, read_inputs, read_outputs

log = logging.getLogger(__name__)

#: What an undeclared input takes besides FP32. BF16 arrives widened, so that it has to be declared.
_ACCEPTED: Final = tuple(datatype for datatype in NUMERIC_DATATYPES if datatype not in ("FP32", "BF16"))

#: The interpreter profiles a module's first run and compiles it in the second.
_WARM_UP_RUNS: Final = 2

#: Measured (PyTorch 2.13) after three runs: 345 KB in memory for 10 KB on disk, 1.28 MB for 0.81 MB, 13.1 MB for 12.6.
_SIZE_FACTOR: Final = 1.02
_SIZE_BASE: Final = 360 * 1024

Converter = Callable[[Array], Any]
_load_archive: Final[Callable[..., Any]] = torch.jit.load  # typed: the function itself is not


class TorchscriptModel(BuiltinModel):
    """One module. Satisfies ``LoadedModel``."""

    platform = "pytorch_libtorch"

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        inputs: Inputs,
        outputs: Outputs,
        *,
        mutates: bool,
        size_bytes: int,
    ) -> None:
        accepts = {} if inputs.declared else {spec.name: _ACCEPTED for spec in inputs.specs if spec.datatype != "BYTES"}
        super().__init__(
            name,
            inputs.specs,
            outputs.specs,
            default_outputs=tuple(spec.name for spec in outputs.specs),
            size_bytes=size_bytes,
            accepts=accepts,
        )
        self._forward = forward
        converters = {spec.name: _converter(spec, copies=mutates) for spec in inputs.specs}
        self._order = tuple((name, _nothing if name is None else converters[name]) for name in inputs.order)
        self._collected = inputs.collected
        self._results = {
            spec.name: (outputs.keys[spec.name], spec.datatype if outputs.declared else None) for spec in outputs.specs
        }
        self._mutates = mutates

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[OutputTensor]:
        """Run ``forward``; see ``LoadedModel.infer``."""
        arguments = [None if name is None else convert(inputs[name]) for name, convert in self._order]
        if self._collected is not None:
            arguments = [self._together(arguments)]
        try:
            with torch.inference_mode():
                returned = self._forward(*arguments)
        except Exception as error:
            raise self._failures.failed(error, _short(error)) from error
        return [self._answer(name, returned) for name in outputs or self.default_outputs]

    def close(self) -> None:
        """Drop the module; its memory is freed with the last reference."""
        del self._forward

    def _together(self, arguments: list[Any]) -> list[Any] | dict[str, Any]:
        if self._collected == "list":
            return arguments
        return {str(name): argument for (name, _), argument in zip(self._order, arguments, strict=True)}

    def _answer(self, name: str, returned: Any) -> OutputTensor:
        found = self._results.get(name)
        if found is None:
            raise self.unknown_output(name)
        key, datatype = found
        try:
            value = returned if key is None else returned[key]
            own, array = _array(value)
        except (LookupError, TypeError, RuntimeError) as error:
            raise self._failures.failed(error, f"output {name!r}: {_short(error)}") from error
        if datatype is not None and datatype != own:
            array, own = self._converted(name, array, own, datatype), datatype
        # What a module keeps for itself and answers would change under the answer.
        return name, own, array.copy() if self._mutates else array

    def _converted(self, name: str, array: Array, own: str, datatype: str) -> Array:
        if "BYTES" in (own, datatype):
            error = TypeError(f"output {name!r} is {own}, but the settings declare {datatype}")
            raise self._failures.failed(error)
        return array.astype(NUMPY_DTYPES[datatype])


def load(source: ModelSource) -> LoadedModel:
    """Read the archive at ``source.path``; where the settings tell the shapes, run it once on zeros.

    Raises:
        LoadFailed: no TorchScript archive, an operator this PyTorch does not know, or settings that contradict it.
    """
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning)
    module = _read(source.path)
    schema = module.forward.schema
    graph = module.inlined_graph
    inputs = read_inputs(schema, source.settings.inputs)
    outputs = read_outputs(schema, next(iter(graph.outputs())).node(), source.settings.outputs)
    nodes = list(_nodes(graph))
    mutates = any(_writes(node) for node in nodes)
    model = TorchscriptModel(
        source.name,
        _frozen(module, source.name).forward,
        inputs,
        outputs,
        mutates=mutates,
        size_bytes=estimated_size(source, source.path, factor=_SIZE_FACTOR, base=_SIZE_BASE),
    )
    if inputs.declared and not any(_keeps_state(node) for node in nodes):
        answered = {name: datatype for name, datatype, _ in _warm_up(model)}
        if not outputs.declared:
            model.outputs = tuple(
                TensorSpec(spec.name, answered.get(spec.name, spec.datatype), spec.shape) for spec in outputs.specs
            )
    return model


def _read(path: Path) -> Any:
    if path.is_dir() or not zipfile.is_zipfile(path):
        raise LoadFailed(f"{path.name!r} is no TorchScript archive, or is cut short")
    with zipfile.ZipFile(path) as archive:
        members = {member.partition("/")[2] for member in archive.namelist()}
    if "constants.pkl" not in members:
        saved = "a program of torch.export" if "models/model.json" in members else "weights or a pickled module"
        raise LoadFailed(
            f"{path.name!r} holds {saved}; save the module with torch.jit.script(module).save({path.name!r})"
        )
    try:
        module = _load_archive(path, map_location="cpu")
    except RuntimeError as error:
        raise LoadFailed(
            f"{path.name!r} is no module that PyTorch {torch.__version__} reads: {_short(error)}"
        ) from error
    if not hasattr(module, "forward"):
        raise LoadFailed(f"{path.name!r} has no method forward")
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def _frozen(module: Any, name: str) -> Any:
    """The module with its parameters as constants, so that they are folded; itself where that cannot be done."""
    try:
        return torch.jit.freeze(module)
    except RuntimeError as error:
        log.info("model %r is served unfrozen: %s", name, _short(error))
        return module


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _writes(node: Any) -> bool:
    """Whether an operator writes to a tensor, which may be an input, or calls what cannot be looked into."""
    return node.kind() in ("prim::CallMethod", "prim::CallFunction") or "(a!)" in node.schema()


def _keeps_state(node: Any) -> bool:
    """Whether an operator may change the module itself, whose later answers then depend on earlier requests."""
    if node.kind() == "prim::SetAttr":
        return True
    return _writes(node) and any(value.node().kind() == "prim::GetAttr" for value in node.inputs())


def _warm_up(model: TorchscriptModel) -> list[OutputTensor]:
    """What the module answers to zeros, nothing where it does not."""
    rows = {
        spec.name: np.zeros([max(size, 1) for size in spec.shape], NUMPY_DTYPES[spec.datatype])
        for spec in model.inputs
        if spec.datatype != "BYTES"
    }
    answer: list[OutputTensor] = []
    if len(rows) == len(model.inputs):
        try:
            for _ in range(_WARM_UP_RUNS):
                answer = model.infer(rows, ())
        except Exception as error:  # zeros may mean nothing to it; the first real request will tell
            log.debug("model %r does not answer zeros: %s", model.name, describe(error))
    return answer


def _converter(spec: TensorSpec, *, copies: bool) -> Converter:
    if spec.datatype == "BYTES":
        return _texts
    if spec.datatype == "BF16":
        return lambda array: torch.from_numpy(array).to(torch.bfloat16)
    # A request's bytes are not the module's to write to.
    return (lambda array: torch.from_numpy(array.copy())) if copies else torch.from_numpy


def _nothing(array: Array) -> None:
    del array


def _texts(array: Array) -> list[str]:
    try:
        return [bytes(element).decode() for element in array.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InvalidRequest("the model takes text, but an element is not UTF-8") from error


def _array(value: Any) -> tuple[str, Array]:
    """V2 datatype and array of a tensor or a list of texts."""
    if isinstance(value, list):
        return "BYTES", text_to_bytes(np.array(value, dtype=np.object_))
    if value.dtype is torch.bfloat16:
        return "BF16", value.float().numpy()
    array = value.numpy()
    datatype = DATATYPES.get(array.dtype)
    if datatype is None:
        raise TypeError(f"a tensor of {value.dtype} has no V2 datatype")
    return datatype, array


def _short(error: Exception) -> str:
    """The framework's text without the interpreter's stack: its last line."""
    lines = [line.strip() for line in describe(error).splitlines()]
    return [line for line in lines if line][-1].removeprefix("RuntimeError: ")


def _bound_threads() -> None:
    """One thread for an operator and for a graph: requests are what runs in parallel here."""
    torch.set_num_threads(1)
    try:
        torch.set_num_interop_threads(1)
    except RuntimeError as error:  # a Python model has run a graph before
        log.info("PyTorch's threads between operators are already started: %s", _short(error))


def _take_read_only_arrays() -> None:
    """Give the one warning of PyTorch about read-only arrays now: modules that write are given copies."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
    array = np.zeros(1, np.float32)
    array.setflags(write=False)
    torch.from_numpy(array)


_bound_threads()
_take_read_only_arrays()
