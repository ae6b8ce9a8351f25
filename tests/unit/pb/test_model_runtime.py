"""``mmesh.ModelRuntime`` against its published names and numbers."""

from __future__ import annotations

import pytest

from mmcore.pb import model_runtime_pb2 as pb

FIELDS = {
    "LoadModelRequest": "1 modelId 2 modelType 3 modelPath 4 modelKey",
    "LoadModelResponse": "1 sizeInBytes 2 maxConcurrency",
    "UnloadModelRequest": "1 modelId",
    "UnloadModelResponse": "",
    "PredictModelSizeRequest": "1 modelId 2 modelType 3 modelPath 4 modelKey",
    "PredictModelSizeResponse": "1 sizeInBytes",
    "ModelSizeRequest": "1 modelId",
    "ModelSizeResponse": "1 sizeInBytes",
    "RuntimeStatusRequest": "",
    "RuntimeStatusResponse": (
        "1 status 2 capacityInBytes 3 maxLoadingConcurrency 4 modelLoadingTimeoutMs 5 defaultModelSizeInBytes "
        "6 runtimeVersion 7 numericRuntimeVersion 8 methodInfos 9 limitModelConcurrency 10 allowAnyMethod"
    ),
}


@pytest.mark.parametrize("message", FIELDS)
def test_fields_have_their_numbers(message: str) -> None:
    descriptor = pb.DESCRIPTOR.message_types_by_name[message]
    assert " ".join(f"{field.number} {field.name}" for field in descriptor.fields) == FIELDS[message]


def test_states_and_paths_have_their_numbers() -> None:
    assert dict(pb.RuntimeStatusResponse.Status.items()) == {"STARTING": 0, "READY": 1, "FAILING": 2}
    path = pb.RuntimeStatusResponse.MethodInfo.DESCRIPTOR.fields_by_name["idInjectionPath"]
    assert (path.number, path.type, path.is_repeated) == (1, path.TYPE_UINT32, True)


def test_methods_take_and_answer_their_messages() -> None:
    service = pb.DESCRIPTOR.services_by_name["ModelRuntime"]
    assert service.full_name == "mmesh.ModelRuntime"
    names = ("LoadModel", "UnloadModel", "PredictModelSize", "ModelSize", "RuntimeStatus")
    for method, name in zip(service.methods, names, strict=True):
        assert method.name == name[0].lower() + name[1:]
        assert (method.input_type.name, method.output_type.name) == (f"{name}Request", f"{name}Response")
