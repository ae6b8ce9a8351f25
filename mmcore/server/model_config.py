"""A loaded model described as Triton's ModelConfig message and as the v2 ModelMetadata message.

The configuration tells what is really so: only fields that mmcore acts upon are filled. Shapes in it leave the batch
dimension out where ``max_batch_size`` is above zero, those of the metadata never do (Triton, model configuration).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from mmcore.model import Batching, ModelSettings, QueuePolicy, TensorSpec
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


def model_config(
    name: str, model: LoadedModel, settings: ModelSettings, filename: str, *, merged: int = 0
) -> model_config_pb2.ModelConfig:
    """The configuration of one loaded version.

    ``filename`` is the model file's name in its folder; ``merged`` the rows up to which its requests are merged, 0
    where they are not.
    """
    most_rows = settings.max_batch_size or merged
    batched = most_rows > 0
    config = model_config_pb2.ModelConfig(
        name=name,
        platform=model.platform,
        backend=_BACKENDS.get(model.platform, model.platform),
        max_batch_size=most_rows,
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
    if merged:
        _tell_batching(config.dynamic_batching, settings.batching)
    if settings.instances:
        kind = model_config_pb2.ModelInstanceGroup.KIND_CPU
        config.instance_group.add(name=f"{name}_0", count=settings.instances, kind=kind)
    if settings.response_cache:
        config.response_cache.enable = True
    for warmup in settings.warmups:
        told = config.model_warmup.add(name=warmup.name, count=warmup.count)
        for input_name, stated in warmup.inputs.items():
            tensor = told.inputs[input_name]
            filled = model_config_pb2.ModelWarmup.Input(
                data_type=CONFIG_DATATYPES[stated.datatype], dims=_dims(stated.shape, batched=batched)
            )
            tensor.MergeFrom(filled)
            if stated.data is not None:
                tensor.input_data_file = stated.data.name
            elif stated.random:
                tensor.random_data = True
            else:
                tensor.zero_data = True
            if batched:
                told.batch_size = stated.shape[0]
    return config


def _tell_batching(message: model_config_pb2.ModelDynamicBatching, batching: Batching) -> None:
    message.preferred_batch_size.extend(batching.preferred)
    message.max_queue_delay_microseconds = batching.delay_us
    message.preserve_ordering = batching.ordered
    message.priority_levels = batching.levels
    message.default_priority_level = batching.default_level
    message.SetInParent()
    if batching.policy != QueuePolicy():
        _tell_policy(message.default_queue_policy, batching.policy)
    for level, policy in batching.policies.items():
        _tell_policy(message.priority_queue_policy[level], policy)


def _tell_policy(message: model_config_pb2.ModelQueuePolicy, policy: QueuePolicy) -> None:
    message.max_queue_size = policy.limit
    message.default_timeout_microseconds = policy.timeout_us
    message.allow_timeout_override = policy.takes_timeouts
    message.timeout_action = (
        model_config_pb2.ModelQueuePolicy.DELAY if policy.delays else model_config_pb2.ModelQueuePolicy.REJECT
    )


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
