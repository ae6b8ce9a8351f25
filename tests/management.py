"""What tests of the management API share: a client as any program has it, built from the published messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import grpc

from mmcore.pb import model_mesh_pb2 as pb
from tests.serving import write_model

WITHIN_S = 30.0
States = pb.ModelStatusInfo.ModelStatus
VStates = pb.VModelStatusInfo.VModelStatus

SCALE = """
class Model:
    inputs = [("X", "FP32", [-1])]
    outputs = [("Y", "FP32", [-1])]

    def predict(self, inputs):
        return {"Y": inputs["X"] * FACTOR}
"""

#: Is loaded when the file named in its settings exists.
SLOW_LOAD = """
import os, time

class Model:
    inputs = [("X", "FP32", [-1])]
    outputs = [("Y", "FP32", [-1])]

    def load(self, path, parameters):
        while not os.path.exists(parameters["release"]):
            time.sleep(0.005)

    def predict(self, inputs):
        return {"Y": inputs["X"]}
"""

BROKEN = """
class Model:
    inputs = [("X", "FP32", [-1])]
    outputs = [("Y", "FP32", [-1])]

    def load(self, path, parameters):
        raise ValueError("the weights are missing")

    def predict(self, inputs):
        return {"Y": inputs["X"]}
"""


def files(root: Path, name: str, source: str, *, settings: str = "") -> pb.ModelInfo:
    """A model's files below ``root``, and how they are registered."""
    root.mkdir(exist_ok=True)
    path = write_model(root, name, source, settings=settings)
    return pb.ModelInfo(type="python", path=str(path), key=json.dumps({"storage_params": {"type": "local"}}))


def scale(root: Path, factor: int) -> pb.ModelInfo:
    """A model that multiplies by ``factor``."""
    name = f"scale-{factor}"
    if (root / name).exists():
        return pb.ModelInfo(type="python", path=str(root / name), key='{"storage_params": {"type": "local"}}')
    return files(root, name, SCALE.replace("FACTOR", str(factor)))


class Manager:
    """A client of ``mmesh.ModelMesh``."""

    def __init__(self, address: str, service: str = "mmesh.ModelMesh") -> None:
        self._channel = grpc.insecure_channel(address)
        self._service = service

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._channel.close()

    def call(self, method: str, request: Any, response_type: Any) -> Any:
        unary: Callable[..., Any] = self._channel.unary_unary(
            f"/{self._service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response_type.FromString,
        )
        return unary(request, timeout=WITHIN_S)

    def register(self, name: str, info: pb.ModelInfo, **fields: Any) -> pb.ModelStatusInfo:
        request = pb.RegisterModelRequest(modelId=name, modelInfo=info, **fields)
        status: pb.ModelStatusInfo = self.call("registerModel", request, pb.ModelStatusInfo)
        return status

    def unregister(self, name: str) -> None:
        self.call("unregisterModel", pb.UnregisterModelRequest(modelId=name), pb.UnregisterModelResponse)

    def status(self, name: str) -> pb.ModelStatusInfo:
        status: pb.ModelStatusInfo = self.call("getModelStatus", pb.GetStatusRequest(modelId=name), pb.ModelStatusInfo)
        return status

    def state(self, name: str) -> str:
        return States.Name(self.status(name).status)

    def ensure_loaded(self, name: str, **fields: Any) -> pb.ModelStatusInfo:
        request = pb.EnsureLoadedRequest(modelId=name, **fields)
        status: pb.ModelStatusInfo = self.call("ensureLoaded", request, pb.ModelStatusInfo)
        return status

    def set_vmodel(
        self, name: str, target: str, info: pb.ModelInfo | None = None, **fields: Any
    ) -> pb.VModelStatusInfo:
        request = pb.SetVModelRequest(vModelId=name, targetModelId=target, modelInfo=info, **fields)
        status: pb.VModelStatusInfo = self.call("setVModel", request, pb.VModelStatusInfo)
        return status

    def delete_vmodel(self, name: str, owner: str = "") -> None:
        self.call("deleteVModel", pb.DeleteVModelRequest(vModelId=name, owner=owner), pb.DeleteVModelResponse)

    def vmodel_status(self, name: str, owner: str = "") -> pb.VModelStatusInfo:
        request = pb.GetVModelStatusRequest(vModelId=name, owner=owner)
        status: pb.VModelStatusInfo = self.call("getVModelStatus", request, pb.VModelStatusInfo)
        return status
