"""A loaded model described as Triton's ModelConfig message and as the v2 ModelMetadata message.

The configuration tells what is really so: only fields that mmcore acts upon are filled. Shapes in it leave the batch
dimension out where ``max_batch_size`` is above zero, those of the metadata never do (Triton, model configuration).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from mmcore.model import ModelSettings, TensorSpec
from mmcore.pb import inference_pb2, model_config_pb2
from mmcore.runtimes import LoadedModel

#: v2 datatype to the enumeration of model_config.proto; all but BYTES have their own name there.
CONFIG_DATATYPES: Final = {
    name: f"TYPE_{name}"
    for name in (
        *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
        *("FP16", "FP32", "FP64", "BF16"),
    )
} | {"BYTES": "TYPE_STRING"}

#: Platform to the backend that config.pbtxt names; Triton's "python" is a contract of its own, which is not ours.
_BACKENDS: Final = {"onnxruntime_onnx": "onnxruntime", "python": "mmcore_python"}


def model_config(name: str, model: LoadedModel, settings: ModelSettings, filename: str) -> model_config_pb2.ModelConfig:
    """The configuration of one loaded version; ``filename`` is the model file's name in its folder."""
    batched = settings.max_batch_size > 0
    config = model_config_pb2.ModelConfig(
        name=name,
        platform=model.platform,
        backend=_BACKENDS.get(model.platform, model.platform),
        max_batch_size=settings.max_batch_size,
        default_model_filename=filename,
    )
    # Every version that the repository has can be asked for.
    config.version_policy.all.SetInParent()
    config.model_transaction_policy.decoupled = False
    for spec in model.inputs:
        config.input.add(
            name=spec.name, data_type=CONFIG_DATATYPES[spec.datatype], dims=_dims(spec.shape, batched=batched)
        )
    for spec in model.outputs:
        config.output.add(
            name=spec.name,
            data_type=CONFIG_DATATYPES[spec.datatype],
            dims=_dims(spec.shape, batched=batched),
            label_filename="labels.txt" if settings.labels.get(spec.name) else "",
        )
    for key, value in settings.parameters.items():
        config.parameters[key].string_value = value
    return config


def model_metadata(name: str, versions: Sequence[str], model: LoadedModel) -> inference_pb2.ModelMetadataResponse:
    """The metadata of one loaded version; ``versions`` are all that can be asked for."""
    return inference_pb2.ModelMetadataResponse(
        name=name,
        versions=versions,
        platform=model.platform,
        inputs=_tensors(model.inputs),
        outputs=_tensors(model.outputs),
    )


def _dims(shape: tuple[int, ...], *, batched: bool) -> tuple[int, ...]:
    # A model configuration cannot say "no dimension": a scalar per request is written as [1] there.
    return (shape[1:] or (1,)) if batched else shape


def _tensors(specs: Iterable[TensorSpec]) -> list[inference_pb2.ModelMetadataResponse.TensorMetadata]:
    return [
        inference_pb2.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        for spec in specs
    ]
