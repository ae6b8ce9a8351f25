"""Servers with a model repository and the v2 protocol's extension that loads from it: Triton and MLServer.

A model is laid out in a folder of its own below the server's repository, as links to the files that were pulled, and
loaded by name.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final, TypeVar

from google.protobuf.message import Message

from mmcore.adapters.model_folders import LaidOut, Layout, ModelFolders, files_size
from mmcore.adapters.ready import ready
from mmcore.adapters.runtime import Tls
from mmcore.adapters.server_memory import ServerMemory, guessed_size
from mmcore.config import TransportSettings
from mmcore.errors import LoadFailed, RpcError, Status
from mmcore.pb import inference_pb2 as v2
from mmcore.pb import model_runtime_pb2 as pb
from mmcore.transport import Channel

_SERVICE: Final = "inference.GRPCInferenceService"
_METHODS: Final = {
    f"{_SERVICE}/{name}": (1,)
    for name in ("ModelInfer", "ModelStreamInfer", "ModelMetadata", "ModelConfig", "ModelReady", "ModelStatistics")
}
LOAD_S: Final = 90.0
_STATISTICS_S: Final = 5.0
#: Of what a server says that a model takes (Triton, the statistics extension), all but a device's memory.
_DEVICE: Final = "GPU"
#: Answers to an unload that say that the model is not there.
_NOT_THERE: Final = (Status.NOT_FOUND, Status.INVALID_ARGUMENT)

ResponseT = TypeVar("ResponseT", bound=Message)


class RepositoryRuntime:
    """A server that loads from a folder. Satisfies :class:`mmcore.adapters.runtime.Runtime`.

    ``repository`` is the folder, which is this runtime's alone: what is in it at the start is removed.
    """

    def __init__(
        self, address: str, repository: Path, layout: Layout, *, loads_at_once: int = 1, tls: Tls | None = None
    ) -> None:
        self.address: str = address
        # MLServer's own settings.
        self._folders = ModelFolders(repository, layout, kept=("settings.json",))
        self._memory = ServerMemory(address)
        self._loads_at_once = loads_at_once
        self._channel = Channel(address, settings=TransportSettings(max_message_bytes=2**28), ssl=tls)

    def prepare(self) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`: its repository."""
        self._folders.root.mkdir(parents=True, exist_ok=True)

    async def status(self, timeout_s: float) -> pb.RuntimeStatusResponse:
        """See :class:`mmcore.adapters.runtime.Runtime`: ready once the server is live and its models are unloaded."""
        live = await self._call("ServerLive", v2.ServerLiveRequest(), v2.ServerLiveResponse, timeout_s)
        if not live.live:
            return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING)
        index = await self._call(
            "RepositoryIndex", v2.RepositoryIndexRequest(ready=True), v2.RepositoryIndexResponse, timeout_s
        )
        for model in index.models:
            await self._unload(model.name, timeout_s)
        await asyncio.to_thread(self._folders.clear)
        await asyncio.to_thread(self._memory.find)
        told = await self._call("ServerMetadata", v2.ServerMetadataRequest(), v2.ServerMetadataResponse, timeout_s)
        version = f"{told.name} {told.version}"
        return ready(self._memory, version, _METHODS, loads_at_once=self._loads_at_once, load_s=LOAD_S)

    async def load(self, request: pb.LoadModelRequest, timeout_s: float) -> pb.LoadModelResponse:
        """See :class:`mmcore.adapters.runtime.Runtime`; INVALID_ARGUMENT for files that cannot be laid out."""
        try:
            laid_out = await asyncio.to_thread(self._folders.make, request)
        except (LoadFailed, OSError) as error:
            raise RpcError(Status.INVALID_ARGUMENT, str(error)) from error
        asked = v2.RepositoryModelLoadRequest(model_name=request.modelId)
        try:
            async with self._memory.load(laid_out.kind) as growth:
                await self._call("RepositoryModelLoad", asked, v2.RepositoryModelLoadResponse, timeout_s)
        except RpcError as error:
            if error.status in (Status.INVALID_ARGUMENT, Status.FAILED_PRECONDITION):
                # The server has tried, whatever it says.
                raise RpcError(Status.INTERNAL, error.details) from error
            raise
        return pb.LoadModelResponse(sizeInBytes=await self._size_of(request.modelId, laid_out, growth.bytes))

    async def _size_of(self, model: str, laid_out: LaidOut, growth: int | None) -> int:
        """As the server says, or as it has grown, and never less than the files make one think."""
        size = max(guessed_size(laid_out.size_bytes), growth or 0)
        try:
            asked = v2.ModelStatisticsRequest(name=model)
            told = await self._call("ModelStatistics", asked, v2.ModelStatisticsResponse, _STATISTICS_S)
        except RpcError:  # MLServer has none
            return size
        uses = [use for one in told.model_stats for use in one.memory_usage if use.type != _DEVICE]
        return max(size, sum(use.byte_size for use in uses))

    async def unload(self, model: str, timeout_s: float) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`; returns when the server does not list it as ready any more."""
        await self._unload(model, timeout_s)
        await asyncio.to_thread(self._folders.remove, model)

    async def predict_size(self, request: pb.PredictModelSizeRequest, timeout_s: float) -> int:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        return guessed_size(await asyncio.to_thread(files_size, Path(request.modelPath)))

    async def size(self, model: str, timeout_s: float) -> int:
        """See :class:`mmcore.adapters.runtime.Runtime`: no such server tells."""
        raise RpcError(Status.UNIMPLEMENTED, "this server tells no sizes")

    async def close(self) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        await self._channel.close()

    async def _unload(self, model: str, timeout_s: float) -> None:
        try:
            asked = v2.RepositoryModelUnloadRequest(model_name=model)
            await self._call("RepositoryModelUnload", asked, v2.RepositoryModelUnloadResponse, timeout_s)
        except RpcError as error:
            if error.status not in _NOT_THERE:
                raise
        # Triton answers before the model is gone.
        ends_at = time.monotonic() + timeout_s
        while await self._is_leaving(model, timeout_s):
            if time.monotonic() > ends_at:
                raise RpcError(Status.DEADLINE_EXCEEDED, f"model {model} is still being unloaded")
            await asyncio.sleep(0.02)

    async def _is_leaving(self, model: str, timeout_s: float) -> bool:
        index = await self._call("RepositoryIndex", v2.RepositoryIndexRequest(), v2.RepositoryIndexResponse, timeout_s)
        return any(one.name == model and one.state == "UNLOADING" for one in index.models)

    async def _call(self, method: str, request: Message, answer: type[ResponseT], timeout_s: float) -> ResponseT:
        message = await self._channel.unary(f"/{_SERVICE}/{method}", request.SerializeToString(), timeout_s=timeout_s)
        return answer.FromString(message)
