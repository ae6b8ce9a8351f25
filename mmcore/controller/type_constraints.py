"""Labels of instances, and the files by which instances know which types of models go where.

The names of labels and the files' contents are the archived controller's, so that clients which register models
themselves by ``mt:…`` types find the same instances.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import product
from typing import Final

from mmcore.controller.runtimes import Runtime
from mmcore.placement.constraints import DEFAULT

#: A label that no instance has: what no runtime is there for is refused.
_NOWHERE: Final = "_no_runtime"

_IDS: Final = {
    "inference.GRPCInferenceService/ModelInfer": [1],
    "inference.GRPCInferenceService/ModelMetadata": [1],
    "tensorflow.serving.PredictionService/Predict": [1, 1],
    "org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions": [1],
}


def format_labels(runtime: Runtime) -> list[str]:
    """``mt:FORMAT`` and ``mt:FORMAT:VERSION`` of the formats that it selects by itself."""
    found = {f"mt:{entry.name}" for entry in runtime.formats if entry.auto_select}
    found |= {f"mt:{entry.name}:{entry.version}" for entry in runtime.formats if entry.auto_select and entry.version}
    return sorted(found)


def protocol_labels(runtime: Runtime, *, rest: bool) -> list[str]:
    """``pv:PROTOCOL``; with REST whatever speaks v2 over gRPC does so over REST too."""
    found = {f"pv:{protocol}" for protocol in runtime.protocols}
    return sorted(found | {"pv:v2"} if rest and "pv:grpc-v2" in found else found)


def instance_labels(runtime: Runtime, *, rest: bool) -> list[str]:
    """The labels of a runtime's instances, sorted."""
    return sorted({*format_labels(runtime), *protocol_labels(runtime, rest=rest), runtime.label})


def type_constraints(runtimes: Iterable[Runtime], *, rest: bool) -> str:
    """The labels that each type of model needs, JSON; of runtimes that are disabled or not for many models nothing."""
    required: dict[str, list[str]] = {DEFAULT: [_NOWHERE]}
    for runtime in runtimes:
        if runtime.disabled or not runtime.multi_model:
            continue
        required[runtime.label] = [runtime.label]
        formats, protocols = format_labels(runtime), protocol_labels(runtime, rest=rest)
        required |= {label: [label] for label in formats}
        required |= {f"{one}|{protocol}": [one, protocol] for one, protocol in product(formats, protocols)}
    return json.dumps({name: {"required": needs} for name, needs in required.items()}, sort_keys=True)


def dataplane_config() -> str:
    """Where requests of known methods name their model, JSON; other methods name it in their metadata."""
    methods = {method: {"idExtractionPath": path, "vModelId": True} for method, path in _IDS.items()}
    return json.dumps({"rpcConfigs": methods, "allowOtherRpcs": True}, sort_keys=True)
