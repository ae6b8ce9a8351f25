"""TensorFlow: SavedModels, frozen graphs (GraphDef), and Keras files, through the library's C API.

Names are those of a SavedModel's signature (``serving_default``, or what the parameter ``TF_SIGNATURE_DEF`` of Triton's
backend says) or of a graph's operations. Strings are BYTES. A Keras file is written as a SavedModel first, as the
archived stack did it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mmcore.errors import InferenceFailed, InvalidRequest, LoadFailed
from mmcore.model import NUMPY_DTYPES, ModelSource, TensorSpec
from mmcore.runtimes import keras_files
from mmcore.runtimes.builtin import BuiltinModel
from mmcore.runtimes.declared import merge_declared
from mmcore.runtimes.failures import describe
from mmcore.runtimes.interface import Array, LoadedModel, OutputTensor
from mmcore.runtimes.size import estimated_size
from mmcore.runtimes.tensorflow_library import (
    DATATYPES,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    NUMBERS,
    Graph,
    Output,
    TensorflowError,
)
from mmcore.runtimes.tensorflow_signature import Signature, read_signatures

log = logging.getLogger(__name__)

#: Parameters of Triton's backend.
_SIGNATURE_PARAMETER: Final = "TF_SIGNATURE_DEF"
_TAG_PARAMETER: Final = "TF_GRAPH_TAG"
_SIGNATURE: Final = "serving_default"
_TAG: Final = "serve"

#: Measured (TensorFlow 2.21): 576 KB in memory for 14 KB on disk, 1.74 MB for 0.81 MB, 14.4 MB for 12.6 MB.
_SIZE_FACTOR: Final = 1.1
_SIZE_BASE: Final = 560 * 1024


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A spec, and the graph's tensor behind it."""

    spec: TensorSpec
    output: Output


class TensorflowModel(BuiltinModel):
    """One graph and its session. Satisfies ``LoadedModel``."""

    def __init__(
        self,
        name: str,
        platform: str,
        graph: Graph,
        inputs: Sequence[_Tensor],
        outputs: Sequence[_Tensor],
        *,
        size_bytes: int,
    ) -> None:
        specs = tuple(one.spec for one in outputs)
        super().__init__(
            name,
            tuple(one.spec for one in inputs),
            specs,
            default_outputs=tuple(spec.name for spec in specs),
            size_bytes=size_bytes,
        )
        self.platform = platform
        self._graph = graph
        self._feeds = (Output * len(inputs))(*(one.output for one in inputs))
        # All of them at once, whichever are asked for: the library compiles a graph for every set of outputs and keeps
        # it, so that requests could fill the memory.
        self._fetches = (Output * len(outputs))(*(one.output for one in outputs))
        self._inputs = tuple((spec.name, NUMBERS[spec.datatype]) for spec in self.inputs)
        self._places = {spec.name: (index, spec.datatype) for index, spec in enumerate(self.outputs)}

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[OutputTensor]:
        """Run the graph; see ``LoadedModel.infer``."""
        try:
            got = self._graph.run(self._feeds, [(number, inputs[name]) for name, number in self._inputs], self._fetches)
        except TensorflowError as error:
            if error.code == INVALID_ARGUMENT:
                raise InvalidRequest(f"model {self.name!r}: {_short(error)}") from error
            raise self._failures.failed(error, _short(error)) from error
        answer = []
        for name in outputs or self.default_outputs:
            found = self._places.get(name)
            if found is None:
                raise self.unknown_output(name)
            index, datatype = found
            answer.append((name, datatype, got[index]))
        return answer

    def close(self) -> None:
        """Free the session and the graph."""
        self._graph.close()


def load(source: ModelSource) -> LoadedModel:
    """Read ``source.path``: a SavedModel's folder, a ``.keras`` or ``.h5`` file, or else a GraphDef.

    Where its inputs' shapes are known it is run once on zeros, because the first run compiles the graph.

    Raises:
        LoadFailed: it is none of these, an operator this TensorFlow does not know, a signature that is not there, a
            tensor that V2 cannot carry, or settings that contradict the model.
    """
    path = source.path.parent if source.path.name == "saved_model.pb" else source.path
    size = estimated_size(source, path, factor=_SIZE_FACTOR, base=_SIZE_BASE)
    graph = Graph()
    if path.suffix in keras_files.SUFFIXES:
        with keras_files.exports.exported(path) as exported:
            inputs, outputs = _saved_model(graph, exported, path.name, source)
        platform = "tensorflow_savedmodel"
    elif path.is_dir():
        inputs, outputs = _saved_model(graph, path, path.name, source)
        platform = "tensorflow_savedmodel"
    else:
        inputs, outputs = _frozen_graph(graph, path, source)
        platform = "tensorflow_graphdef"
    model = TensorflowModel(source.name, platform, graph, inputs, outputs, size_bytes=size)
    _warm_up(model, path.name)
    return model


def _saved_model(graph: Graph, folder: Path, called: str, source: ModelSource) -> tuple[list[_Tensor], list[_Tensor]]:
    parameters = source.settings.parameters
    try:
        signatures = read_signatures(graph.load_saved_model(folder, [parameters.get(_TAG_PARAMETER, _TAG)]))
    except TensorflowError as error:
        text = _short(error).replace(str(folder), called)
        raise LoadFailed(f"{called!r} is no SavedModel that TensorFlow reads: {text}") from error
    signature = _chosen(signatures, parameters.get(_SIGNATURE_PARAMETER), called)
    inputs, outputs = _specs(signature)
    settings = source.settings
    found_inputs = merge_declared("input", tuple(inputs), settings.inputs)
    found_outputs = merge_declared("output", tuple(outputs), settings.outputs)
    asked = {spec.name for spec in settings.outputs}
    return (
        [_Tensor(spec, _output(graph, signature.inputs[spec.name].tensor)) for spec in found_inputs],
        [
            _Tensor(spec, _output(graph, signature.outputs[spec.name].tensor))
            for spec in found_outputs
            if not asked or spec.name in asked
        ],
    )


def _chosen(signatures: Mapping[str, Signature], wanted: str | None, called: str) -> Signature:
    served = {name: signature for name, signature in signatures.items() if signature.outputs and name[:2] != "__"}
    if wanted is None:
        wanted = _SIGNATURE if _SIGNATURE in served or len(served) != 1 else next(iter(served))
    if wanted not in served:
        names = ", ".join(map(repr, served)) or "none"
        raise LoadFailed(
            f"{called!r} has no signature {wanted!r}, but {names}; choose one with the parameter {_SIGNATURE_PARAMETER}"
        )
    return served[wanted]


def _specs(signature: Signature) -> tuple[list[TensorSpec], list[TensorSpec]]:
    inputs, outputs = [], []
    for name, info in signature.inputs.items():
        if not info.tensor or info.number not in DATATYPES:
            raise LoadFailed(f"input {name!r} is sparse or of a type that cannot be sent over KServe v2")
        inputs.append(TensorSpec(name, DATATYPES[info.number], info.shape))
    for name, info in signature.outputs.items():
        if not info.tensor or info.number not in DATATYPES:
            log.warning("output %r is sparse or of a type that cannot be sent over KServe v2: left out", name)
        else:
            outputs.append(TensorSpec(name, DATATYPES[info.number], info.shape))
    if not outputs:
        raise LoadFailed("no output is a tensor that KServe v2 can carry")
    return inputs, outputs


def _output(graph: Graph, tensor: str) -> Output:
    output = graph.output(tensor)
    if output is None:
        raise LoadFailed(f"the graph has no tensor {tensor!r}")
    return output


def _frozen_graph(graph: Graph, path: Path, source: ModelSource) -> tuple[list[_Tensor], list[_Tensor]]:
    content = path.read_bytes()
    if not content:
        raise LoadFailed(f"{path.name!r} is empty")
    try:
        graph.import_definition(content)
    except TensorflowError as error:
        raise LoadFailed(f"{path.name!r} is no graph that TensorFlow reads: {_short(error)}") from error
    placeholders, results = graph.ends()
    settings = source.settings
    inputs = _graph_tensors(graph, "input", settings.inputs, placeholders)
    outputs = _graph_tensors(graph, "output", settings.outputs, results)
    if not outputs:
        raise LoadFailed(f"{path.name!r} has no output that KServe v2 can carry")
    return inputs, outputs


def _graph_tensors(graph: Graph, kind: str, declared: tuple[TensorSpec, ...], ends: Sequence[str]) -> list[_Tensor]:
    tensors = []
    for name in [spec.name for spec in declared] or ends:
        output = graph.output(name)
        if output is None:
            known = ", ".join(map(repr, ends))
            raise LoadFailed(f"the settings declare {kind} {name!r}, but the graph's {kind}s are {known}")
        datatype = graph.datatype(output)
        if datatype is not None:
            tensors.append(_Tensor(TensorSpec(name, datatype, graph.shape(output)), output))
        elif declared or kind == "input":
            raise LoadFailed(f"{kind} {name!r} is of a type that cannot be sent over KServe v2")
    merged = merge_declared(kind, tuple(one.spec for one in tensors), declared)
    return [_Tensor(spec, one.output) for spec, one in zip(merged, tensors, strict=True)]


def _warm_up(model: TensorflowModel, called: str) -> None:
    """Run the model on zeros.

    Raises:
        LoadFailed: its variables are not there, which the library does not notice before.
    """
    rows = {
        spec.name: np.zeros([max(size, 1) for size in spec.shape], NUMPY_DTYPES[spec.datatype])
        for spec in model.inputs
        if spec.datatype != "BYTES"
    }
    if len(rows) == len(model.inputs):
        try:
            model.infer(rows, ())
        except InferenceFailed as error:
            cause = error.__cause__
            if isinstance(cause, TensorflowError) and cause.code == FAILED_PRECONDITION:
                raise LoadFailed(f"{called!r} is not whole: {_short(cause)}") from error
            log.debug("model %r does not answer zeros: %s", model.name, error)
        except InvalidRequest as error:  # zeros may mean nothing to it; the first real request will tell
            log.debug("model %r does not answer zeros: %s", model.name, error)


def _short(error: Exception) -> str:
    """The library's text without the nodes of the graph that it names."""
    return describe(error).removeprefix(f"{type(error).__name__}: ").split("\n", 1)[0].split(" [[{{node", 1)[0].strip()
