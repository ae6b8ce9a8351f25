"""``mmesh.ModelMesh`` against its published names and numbers, which no package has descriptors of to compare with."""

from __future__ import annotations

import pytest

from mmcore.pb import model_mesh_pb2 as pb

FIELDS = {
    "RegisterModelRequest": "1 modelId 2 modelInfo 3 loadNow 4 sync 5 lastUsedTime",
    "ModelInfo": "1 type 2 path 3 key",
    "ModelStatusInfo": "1 status 2 errors 3 modelCopyInfos",
    "ModelStatusInfo.ModelCopyInfo": "1 location 2 copyStatus 3 time",
    "UnregisterModelRequest": "1 modelId",
    "UnregisterModelResponse": "",
    "GetStatusRequest": "1 modelId",
    "EnsureLoadedRequest": "1 modelId 2 lastUsedTime 4 sync",
    "SetVModelRequest": (
        "1 vModelId 2 targetModelId 3 updateOnly 4 modelInfo 5 autoDeleteTargetModel 6 loadNow 7 force 8 sync "
        "9 expectedTargetModelId 10 owner"
    ),
    "VModelStatusInfo": "1 status 2 activeModelId 3 targetModelId 4 activeModelStatus 5 targetModelStatus 6 owner",
    "DeleteVModelRequest": "1 vModelId 2 owner",
    "DeleteVModelResponse": "",
    "GetVModelStatusRequest": "1 vModelId 2 owner",
}
METHODS = {
    "registerModel": ("RegisterModelRequest", "ModelStatusInfo"),
    "unregisterModel": ("UnregisterModelRequest", "UnregisterModelResponse"),
    "getModelStatus": ("GetStatusRequest", "ModelStatusInfo"),
    "ensureLoaded": ("EnsureLoadedRequest", "ModelStatusInfo"),
    "setVModel": ("SetVModelRequest", "VModelStatusInfo"),
    "deleteVModel": ("DeleteVModelRequest", "DeleteVModelResponse"),
    "getVModelStatus": ("GetVModelStatusRequest", "VModelStatusInfo"),
}


@pytest.mark.parametrize("message", FIELDS)
def test_fields_have_their_numbers(message: str) -> None:
    outer, _, inner = message.partition(".")
    descriptor = pb.DESCRIPTOR.message_types_by_name[outer]
    if inner:
        descriptor = descriptor.nested_types_by_name[inner]
    assert " ".join(f"{field.number} {field.name}" for field in descriptor.fields) == FIELDS[message]


def test_states_have_their_numbers() -> None:
    states = {"NOT_FOUND": 0, "NOT_LOADED": 1, "LOADING": 2, "LOADED": 3, "LOADING_FAILED": 4, "UNKNOWN": 5}
    assert dict(pb.ModelStatusInfo.ModelStatus.items()) == states
    vmodel_states = {"NOT_FOUND": 0, "DEFINED": 1, "TRANSITIONING": 2, "TRANSITION_FAILED": 3, "UNKNOWN": 5}
    assert dict(pb.VModelStatusInfo.VModelStatus.items()) == vmodel_states


def test_methods_take_and_answer_their_messages() -> None:
    service = pb.DESCRIPTOR.services_by_name["ModelMesh"]
    assert {one.name: (one.input_type.name, one.output_type.name) for one in service.methods} == METHODS
    assert service.full_name == "mmesh.ModelMesh"
