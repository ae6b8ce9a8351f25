"""The service ``mmesh.ModelRuntime``: a mesh says which models are here, and this process obeys.

What an answer means is that protocol's (protos/model_runtime.proto): a load that is answered with FAILED_PRECONDITION
or INVALID_ARGUMENT has left nothing in memory, an unload is answered when the memory has been given back, and READY
when no model is here any more. Requests for the models come by their own methods.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mmcore.adapters import SERVICE, ExternalModel
from mmcore.cache import Copy
from mmcore.errors import AlreadyExists, Cancelled, InvalidRequest, MmcoreError, NotFound
from mmcore.model import ModelInfo, ModelSource
from mmcore.pb import model_runtime_pb2 as pb
from mmcore.routing import Router
from mmcore.server.calls import Waiting
from mmcore.storage import Cancellation, Origin
from mmcore.transport import Server

log = logging.getLogger(__name__)

#: A model is one version, whatever the mesh calls it.
VERSION: Final = "1"
#: How long a question for the status waits for models to go; it is asked again then.
PURGE_S: Final = 10.0


class ModelRuntime:
    """The service over the models of ``router``, whose cache makes no room by itself.

    ``told`` is what this process says of itself, and ``origin`` gives the files of a model as the mesh describes it.
    """

    def __init__(
        self, router: Router, told: Callable[[], pb.RuntimeStatusResponse], origin: Callable[[ModelInfo], Origin]
    ) -> None:
        self._router = router
        self._told = told
        self._origin = origin
        self._models: dict[str, ModelInfo] = {}

    def register(self, server: Server) -> None:
        """Add every method to ``server``."""
        waiting = Waiting()
        for name, handler in {
            "runtimeStatus": waiting.handler(pb.RuntimeStatusRequest, self._status),
            "loadModel": waiting.handler(pb.LoadModelRequest, self._load),
            "unloadModel": waiting.handler(pb.UnloadModelRequest, self._unload),
            "predictModelSize": waiting.handler(pb.PredictModelSizeRequest, self._predict),
            "modelSize": waiting.handler(pb.ModelSizeRequest, self._size),
        }.items():
            server.add_unary(f"/{SERVICE}/{name}", handler)

    async def _status(self, request: pb.RuntimeStatusRequest) -> pb.RuntimeStatusResponse:
        """What this process is ready for; whoever asks begins anew, so every model goes."""
        told = self._told()
        if told.status != pb.RuntimeStatusResponse.READY:
            return told
        if self._models:
            log.info("a mesh begins anew: unloading %d models", len(self._models))
        for name in list(self._models):
            self._forget(name)
        try:
            async with asyncio.timeout(PURGE_S):
                await self._router.cache.settled()
        except TimeoutError:
            return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING)
        return told

    async def _load(self, request: pb.LoadModelRequest) -> pb.LoadModelResponse:
        """Load a model; the same again answers what the first one is answered.

        Raises:
            InvalidRequest: it has no id, or its path is not absolute.
            AlreadyExists: a model of that id is here that is described otherwise.
            LoadFailed: it was not loaded, and takes no memory.
            Cancelled: it was unloaded meanwhile.
        """
        name = _checked(request.modelId)
        info = _info(request)
        if name not in self._models:
            # What is left of an earlier one counts for that one.
            await self._router.cache.settled(name)
        known = self._models.get(name)
        if known is None:
            self._models[name] = info
            self._router.register(name, (VERSION,), _Kept(self._origin(info)))
        elif known != info:
            raise AlreadyExists(f"model '{name}' is loaded from {known.path} as {known.type}")
        try:
            copy = await self._router.load(name)
        except NotFound:
            raise Cancelled(f"model '{name}' was unloaded while it was loaded") from None
        except asyncio.CancelledError:
            # The mesh has given up; its unload follows, perhaps.
            self._forget(name)
            raise
        except MmcoreError:
            self._forget(name)
            await self._router.cache.settled(name)
            raise
        return pb.LoadModelResponse(sizeInBytes=max(copy.weight, 1), maxConcurrency=_most_at_once(copy))

    async def _unload(self, request: pb.UnloadModelRequest) -> pb.UnloadModelResponse:
        """Give up a model, or its load; answered when its memory has been given back."""
        name = _checked(request.modelId)
        self._forget(name)
        await self._router.cache.settled(name)
        return pb.UnloadModelResponse()

    async def _predict(self, request: pb.PredictModelSizeRequest) -> pb.PredictModelSizeResponse:
        name = _checked(request.modelId)
        size = await self._router.cache.predict(name, VERSION, self._origin(_info(request)))
        return pb.PredictModelSizeResponse(sizeInBytes=size)

    async def _size(self, request: pb.ModelSizeRequest) -> pb.ModelSizeResponse:
        """What a model takes now, which may be more than when it was loaded: inferences make some models grow.

        Raises:
            NotFound: it is not loaded.
        """
        copies = self._router.copies(_checked(request.modelId))
        if not copies:
            raise NotFound(f"model '{request.modelId}' is not loaded")
        return pb.ModelSizeResponse(sizeInBytes=copies[0].weight)

    def _forget(self, name: str) -> None:
        if self._models.pop(name, None) is not None:
            self._router.remove(name)


class _Kept:
    """An origin whose models stay until the mesh says otherwise, whatever their settings say."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin

    def source(self, name: str, version: str, cancelled: Cancellation | None = None) -> ModelSource:
        source = self._origin.source(name, version, cancelled)
        return replace(source, settings=replace(source.settings, pinned=True, idle_timeout_s=None))

    def confirm(self, name: str) -> None:
        self._origin.confirm(name)


def _checked(name: str) -> str:
    if not name:
        raise InvalidRequest("modelId is missing")
    return name


def _info(request: pb.LoadModelRequest | pb.PredictModelSizeRequest) -> ModelInfo:
    return ModelInfo(request.modelType, request.modelPath, request.modelKey)


def _most_at_once(copy: Copy) -> int:
    return copy.model.max_concurrency if isinstance(copy.model, ExternalModel) else 0
