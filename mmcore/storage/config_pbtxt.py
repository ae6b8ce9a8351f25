"""Triton's ``config.pbtxt``: what of it mmcore acts upon, and a refusal of what would change the answers if ignored.

Fields are those of model_config.proto. Hints that do not change an answer (optimisation, rate limits, devices) are
accepted and left to mmcore's own judgement.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from google.protobuf import json_format, text_format

from mmcore.errors import InvalidModel
from mmcore.model import Batching, QueuePolicy, TensorSpec, Warmup, WarmupInput
from mmcore.pb import model_config_pb2
from mmcore.storage.containment import inside
from mmcore.storage.stated import MOST_INSTANCES, Stated, VersionPolicy

log = logging.getLogger(__name__)

CONFIG_PBTXT: Final = "config.pbtxt"
#: What an error names when the configuration came with a load request.
CONFIG_OVERRIDE: Final = "config"

_LABELS_LIMIT_BYTES: Final = 16 * 2**20
_MOST_LEVELS: Final = 64
_COMMENT: Final = re.compile(r"#[^\n]*")

#: Format by platform (older configurations) and by backend; None: whatever the folder holds.
_PLATFORMS: Final[dict[str, str | None]] = {
    "onnxruntime_onnx": "onnx",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
    "tensorrt_plan": "tensorrt",
    "pytorch_libtorch": "torchscript",
    "openvino": "openvino",
    "sklearn": "sklearn",
    "xgboost": "xgboost",
    "lightgbm": "lightgbm",
    "python": "python",
}
_BACKENDS: Final[dict[str, str | None]] = {
    "onnxruntime": "onnx",
    "tensorflow": "tensorflow",
    "tensorrt": "tensorrt",
    "pytorch": "torchscript",
    "openvino": "openvino",
    "fil": None,
    "sklearn": "sklearn",
    "xgboost": "xgboost",
    "lightgbm": "lightgbm",
    "mmcore_python": "python",
}
_DATATYPES: Final = {
    number: "BYTES" if name == "TYPE_STRING" else name.removeprefix("TYPE_")
    for name, number in model_config_pb2.DataType.items()
    if name != "TYPE_INVALID"
}


def read_config_pbtxt(text: str, folder: Path) -> Stated:
    """What a ``config.pbtxt`` states; label files are read from ``folder``.

    The name in it is not looked at: Triton demands that it equals the folder's.

    Raises:
        InvalidModel: it is not a text-format ModelConfig, or states what cannot be served.
    """
    try:
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeError) as error:
        raise InvalidModel(f"{CONFIG_PBTXT}: {error}") from error
    return _stated(config, folder, CONFIG_PBTXT, sized="max_batch_size" in _COMMENT.sub("", text))


def read_config_json(text: str, folder: Path) -> Stated:
    """What the ``config`` parameter of a load request states: a ModelConfig as JSON (Triton, model repository).

    Raises:
        InvalidModel: it is not a ModelConfig in JSON, or states what cannot be served.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise InvalidModel(f"{CONFIG_OVERRIDE}: is not a JSON object")
        config = json_format.ParseDict(values, model_config_pb2.ModelConfig(), max_recursion_depth=20)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise InvalidModel(f"{CONFIG_OVERRIDE}: {error}") from error
    sized = "max_batch_size" in values or "maxBatchSize" in values
    return _stated(config, folder, CONFIG_OVERRIDE, sized=sized)


def _stated(config: model_config_pb2.ModelConfig, folder: Path, file: str, *, sized: bool) -> Stated:
    """What the message says; ``sized``: a batch size is stated, if only 0, which the message does not tell."""
    if config.WhichOneof("scheduling_choice") in ("sequence_batching", "ensemble_scheduling"):
        raise InvalidModel(f"{file}: {config.WhichOneof('scheduling_choice')}: is not supported")
    if config.model_transaction_policy.decoupled:
        raise InvalidModel(f"{file}: model_transaction_policy.decoupled: is not supported")
    if config.max_batch_size < 0:
        raise InvalidModel(f"{file}: max_batch_size: must not be negative, got {config.max_batch_size}")
    filename = config.default_model_filename or None
    if filename is not None:
        inside(folder, filename, f"{file}: default_model_filename")
    batched = config.max_batch_size > 0
    return Stated(
        format=_format(config, file),
        file=filename,
        max_batch_size=config.max_batch_size,
        inputs=_tensors(config.input, f"{file}: input", batched=batched),
        outputs=_tensors(config.output, f"{file}: output", batched=batched),
        labels={
            output.name: _labels(folder, output.label_filename, f"{file}: output '{output.name}': label_filename")
            for output in config.output
            if output.label_filename
        },
        parameters=_parameters(config),
        policy=_policy(config.version_policy, file),
        merges=batched if sized else None,
        instances=_instances(config, folder, file),
        batching=_batching(config, file),
        warmups=tuple(_warmup(config, warmup, folder, file) for warmup in config.model_warmup),
        response_cache=config.response_cache.enable if config.HasField("response_cache") else None,
    )


def _instances(config: model_config_pb2.ModelConfig, folder: Path, file: str) -> int | None:
    """The instances of all groups together; one that states no number has one (Triton, ModelInstanceGroup)."""
    groups = [group for group in config.instance_group if not group.passive]
    if any(group.count < 0 for group in groups):
        raise InvalidModel(f"{file}: instance_group: count: must not be negative")
    stated = sum(max(1, group.count) for group in groups)
    if stated > MOST_INSTANCES:
        raise InvalidModel(f"{file}: instance_group: must not be above {MOST_INSTANCES} instances, got {stated}")
    if any(group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU for group in groups):
        log.warning("model folder %s: its instance_group asks for a GPU; it runs on the CPU", folder.name)
    return stated or None


def _batching(config: model_config_pb2.ModelConfig, file: str) -> Batching | None:
    if not config.HasField("dynamic_batching"):
        return None
    stated = config.dynamic_batching
    where = f"{file}: dynamic_batching"
    if any(size <= 0 or size > config.max_batch_size for size in stated.preferred_batch_size):
        raise InvalidModel(f"{where}.preferred_batch_size: must be from 1 to max_batch_size")
    if stated.priority_levels > _MOST_LEVELS:
        raise InvalidModel(f"{where}.priority_levels: must not be above {_MOST_LEVELS}")
    levels = stated.priority_levels
    if levels and not 1 <= stated.default_priority_level <= levels:
        raise InvalidModel(f"{where}.default_priority_level: must be from 1 to priority_levels")
    if any(not 1 <= level <= levels for level in stated.priority_queue_policy):
        raise InvalidModel(f"{where}.priority_queue_policy: has a level that is not from 1 to priority_levels")
    return Batching(
        delay_us=stated.max_queue_delay_microseconds,
        preferred=tuple(sorted(stated.preferred_batch_size)),
        ordered=stated.preserve_ordering,
        levels=levels,
        default_level=stated.default_priority_level,
        policy=_queue_policy(stated.default_queue_policy),
        policies={level: _queue_policy(policy) for level, policy in stated.priority_queue_policy.items()},
    )


def _queue_policy(stated: model_config_pb2.ModelQueuePolicy) -> QueuePolicy:
    return QueuePolicy(
        limit=stated.max_queue_size,
        timeout_us=stated.default_timeout_microseconds,
        delays=stated.timeout_action == model_config_pb2.ModelQueuePolicy.DELAY,
        # Without a timeout of the owner's there is none for a request to override.
        takes_timeouts=stated.allow_timeout_override or not stated.default_timeout_microseconds,
    )


def _warmup(
    config: model_config_pb2.ModelConfig, stated: model_config_pb2.ModelWarmup, folder: Path, file: str
) -> Warmup:
    where = f"{file}: model_warmup '{stated.name}'"
    inputs: dict[str, WarmupInput] = {}
    for name, tensor in stated.inputs.items():
        named = f"{where}: input '{name}'"
        if tensor.data_type not in _DATATYPES:
            raise InvalidModel(f"{named}: data_type: is missing")
        if any(dim < 0 for dim in tensor.dims):
            raise InvalidModel(f"{named}: dims: must not be negative, got {list(tensor.dims)}")
        shape = (max(1, stated.batch_size), *tensor.dims) if config.max_batch_size > 0 else tuple(tensor.dims)
        data = None
        match tensor.WhichOneof("input_data_type"):
            case "input_data_file":
                # Files of raw tensor bytes lie in the folder "warmup" (Triton, "Model Warmup").
                data = inside(folder, f"warmup/{tensor.input_data_file}", f"{named}: input_data_file")
            case None:
                raise InvalidModel(f"{named}: states neither zero_data nor random_data nor input_data_file")
        inputs[name] = WarmupInput(_DATATYPES[tensor.data_type], shape, tensor.random_data, data)
    if not inputs:
        raise InvalidModel(f"{where}: inputs: are missing")
    return Warmup(stated.name, inputs, max(1, stated.count))


def _format(config: model_config_pb2.ModelConfig, file: str) -> str | None:
    if config.backend == "python":
        raise InvalidModel(
            f"{file}: backend: 'python' is Triton's own contract (class TritonPythonModel); mmcore's Python models are "
            f"backend 'mmcore_python'"
        )
    if config.platform == "ensemble":
        raise InvalidModel(f"{file}: platform: ensembles are not supported")
    for field, stated, known in (("backend", config.backend, _BACKENDS), ("platform", config.platform, _PLATFORMS)):
        if stated:
            if stated not in known:
                raise InvalidModel(f"{file}: {field}: '{stated}' is not built in; known are {', '.join(known)}")
            return known[stated]
    return None


def _parameters(config: model_config_pb2.ModelConfig) -> dict[str, str]:
    stated = {key: value.string_value for key, value in config.parameters.items()}
    # The tree backend's first parameter, written out: it is how a runtime tells that backend's models from others.
    return {"output_class": "false", **stated} if config.backend == "fil" else stated


def _tensors(
    stated: Sequence[model_config_pb2.ModelInput] | Sequence[model_config_pb2.ModelOutput], where: str, *, batched: bool
) -> tuple[TensorSpec, ...]:
    """The tensors with their full shapes: a batch dimension, left out in the file, is put first."""
    specs: list[TensorSpec] = []
    for tensor in stated:
        named = f"{where} '{tensor.name}'"
        if not tensor.name:
            raise InvalidModel(f"{where}[{len(specs)}]: name: is missing")
        if any(spec.name == tensor.name for spec in specs):
            raise InvalidModel(f"{named}: is there twice")
        if tensor.data_type not in _DATATYPES:
            raise InvalidModel(f"{named}: data_type: is missing")
        if any(dim < -1 for dim in tensor.dims):
            raise InvalidModel(f"{named}: dims: must be -1 or above, got {list(tensor.dims)}")
        if tensor.HasField("reshape"):
            raise InvalidModel(f"{named}: reshape: is not supported")
        if getattr(tensor, "allow_ragged_batch", False):
            raise InvalidModel(f"{named}: allow_ragged_batch: is not supported")
        shape = (-1, *tensor.dims) if batched else tuple(tensor.dims)
        specs.append(TensorSpec(tensor.name, _DATATYPES[tensor.data_type], shape))
    return tuple(specs)


def _labels(folder: Path, filename: str, where: str) -> tuple[str, ...]:
    """The class labels in a file of the model's folder, one a line."""
    file = inside(folder, filename, where)
    try:
        if file.stat().st_size > _LABELS_LIMIT_BYTES:
            raise InvalidModel(f"{where}: '{filename}' is longer than {_LABELS_LIMIT_BYTES} bytes")
        return tuple(file.read_text("utf-8").splitlines())
    except OSError as error:
        raise InvalidModel(f"{where}: '{filename}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidModel(f"{where}: '{filename}' is not UTF-8 text") from error


def _policy(policy: model_config_pb2.ModelVersionPolicy, file: str) -> VersionPolicy | None:
    choice = policy.WhichOneof("policy_choice")
    if choice == "latest":
        return VersionPolicy(latest=max(1, policy.latest.num_versions))
    if choice == "specific":
        if not policy.specific.versions:
            raise InvalidModel(f"{file}: version_policy.specific: names no version")
        return VersionPolicy(specific=frozenset(str(version) for version in policy.specific.versions))
    return VersionPolicy() if choice == "all" else None
