"""The service ``mmesh.ModelMesh``: registered models and vmodels, as ModelMesh's clients know it.

What it answers for an error is that API's: a load that failed is a status, not an error of the call; a model or vmodel
that is not there is the status NOT_FOUND; an error of the call means that nothing was changed.
"""

from __future__ import annotations

from typing import Final

from mmcore.model import ModelInfo
from mmcore.pb import model_mesh_pb2 as pb
from mmcore.routing import ModelStatus, Registered, VModels, VModelStatus, Wanted, in_transition
from mmcore.server.calls import Waiting
from mmcore.transport import Server

SERVICE: Final = "mmesh.ModelMesh"

#: Names that older clients call the methods and the service by.
_OLD_NAMES: Final = {"addModel": "registerModel", "deleteModel": "unregisterModel"}
_OLD_SERVICE: Final = "com.ibm.watson.tas.proto.TasRuntime"


class Management:
    """The service of one instance."""

    def __init__(self, registered: Registered, vmodels: VModels) -> None:
        self._registered = registered
        self._vmodels = vmodels
        waiting = Waiting()
        self._handlers = {
            "registerModel": waiting.handler(pb.RegisterModelRequest, self._register_model),
            "unregisterModel": waiting.handler(pb.UnregisterModelRequest, self._unregister_model),
            "getModelStatus": waiting.handler(pb.GetStatusRequest, self._get_model_status),
            "ensureLoaded": waiting.handler(pb.EnsureLoadedRequest, self._ensure_loaded),
            "setVModel": waiting.handler(pb.SetVModelRequest, self._set_vmodel),
            "deleteVModel": waiting.handler(pb.DeleteVModelRequest, self._delete_vmodel),
            "getVModelStatus": waiting.handler(pb.GetVModelStatusRequest, self._get_vmodel_status),
        }

    def register(self, server: Server) -> None:
        """Add every method to ``server``, under its old names too."""
        names = {name: name for name in self._handlers} | _OLD_NAMES
        for service in (SERVICE, _OLD_SERVICE):
            for name, current in names.items():
                server.add_unary(f"/{service}/{name}", self._handlers[current])

    async def _register_model(self, request: pb.RegisterModelRequest) -> pb.ModelStatusInfo:
        status = await self._registered.register(
            request.modelId,
            _info(request.modelInfo),
            load_now=request.loadNow,
            sync=request.sync,
            last_used_ms=request.lastUsedTime,
        )
        return model_status(status)

    async def _unregister_model(self, request: pb.UnregisterModelRequest) -> pb.UnregisterModelResponse:
        await self._registered.unregister(request.modelId)
        return pb.UnregisterModelResponse()

    async def _get_model_status(self, request: pb.GetStatusRequest) -> pb.ModelStatusInfo:
        return model_status(await self._registered.find(request.modelId))

    async def _ensure_loaded(self, request: pb.EnsureLoadedRequest) -> pb.ModelStatusInfo:
        status = await self._registered.ensure_loaded(
            request.modelId, sync=request.sync, last_used_ms=request.lastUsedTime
        )
        return model_status(status)

    async def _set_vmodel(self, request: pb.SetVModelRequest) -> pb.VModelStatusInfo:
        wanted = Wanted(
            target=request.targetModelId,
            info=_info(request.modelInfo) if request.HasField("modelInfo") else None,
            auto_delete=request.autoDeleteTargetModel,
            update_only=request.updateOnly,
            load_now=request.loadNow,
            force=request.force,
            expected=request.expectedTargetModelId,
            owner=request.owner,
        )
        return vmodel_status(await self._vmodels.assign(request.vModelId, wanted, sync=request.sync))

    async def _delete_vmodel(self, request: pb.DeleteVModelRequest) -> pb.DeleteVModelResponse:
        await self._vmodels.delete(request.vModelId, request.owner)
        return pb.DeleteVModelResponse()

    async def _get_vmodel_status(self, request: pb.GetVModelStatusRequest) -> pb.VModelStatusInfo:
        status = await self._vmodels.find(request.vModelId, request.owner)
        return vmodel_status(status) if status is not None else pb.VModelStatusInfo()


def model_status(status: ModelStatus) -> pb.ModelStatusInfo:
    """The status as a message."""
    message = pb.ModelStatusInfo(status=status.state.name, errors=status.errors)
    for copy in status.copies:
        message.modelCopyInfos.add(location=copy.location, copyStatus=copy.state.name, time=copy.since_ms)
    return message


def vmodel_status(status: VModelStatus) -> pb.VModelStatusInfo:
    """The status as a message."""
    record = status.record
    states = pb.VModelStatusInfo.VModelStatus
    state = states.DEFINED
    if in_transition(record):
        state = states.TRANSITION_FAILED if record.failed else states.TRANSITIONING
    return pb.VModelStatusInfo(
        status=state,
        activeModelId=record.active,
        targetModelId=record.target,
        activeModelStatus=model_status(status.active),
        targetModelStatus=model_status(status.target) if status.target is not None else None,
        owner=record.owner,
    )


def _info(message: pb.ModelInfo) -> ModelInfo:
    return ModelInfo(message.type, message.path, message.key)
