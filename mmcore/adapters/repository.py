"""Servers with a model repository and the v2 protocol's extension that loads from it: Triton and MLServer.

A model is laid out in a folder of its own below the server's repository, as links to the files that were pulled, and
loaded by name.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from mmcore.config import TransportSettings
from mmcore.errors import InvalidModel, RpcError, Status
from mmcore.pb import inference_pb2 as v2
from mmcore.pb import model_runtime_pb2 as pb
from mmcore.runtimes.size import files_of
from mmcore.transport import Channel

_SERVICE: Final = "inference.GRPCInferenceService"
#: Methods whose first field is to be the model's id.
_NAMED: Final = ("ModelInfer", "ModelStreamInfer", "ModelMetadata", "ModelConfig", "ModelReady", "ModelStatistics")
LOAD_S: Final = 90.0
#: Of what a model takes in memory: so many times its files, where the server tells nothing.
DISK_FACTOR: Final = 1.25
DEFAULT_BYTES: Final = 1_000_000
#: Answers to an unload that say that the model is not there.
_NOT_THERE: Final = (Status.NOT_FOUND, Status.INVALID_ARGUMENT)

ResponseT = TypeVar("ResponseT", bound=Message)
#: Lays a model out: given its folder, its id, its format, its files and its schema or None.
Layout = Callable[[Path, str, str, Path, Path | None], None]


class RepositoryRuntime:
    """A server that loads from a folder. Satisfies :class:`mmcore.adapters.runtime.Runtime`.

    ``repository`` is the folder, which is this runtime's alone: what is in it at the start is removed.
    """

    def __init__(
        self, address: str, repository: Path, layout: Layout, *, capacity_bytes: int = 0, loads_at_once: int = 1
    ) -> None:
        self.address: str = address
        self._repository = repository
        self._layout = layout
        self._capacity_bytes = capacity_bytes
        self._loads_at_once = loads_at_once
        self._channel = Channel(address, settings=TransportSettings(max_message_bytes=2**28))

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
        await asyncio.to_thread(_empty, self._repository)
        told = await self._call("ServerMetadata", v2.ServerMetadataRequest(), v2.ServerMetadataResponse, timeout_s)
        response = pb.RuntimeStatusResponse(
            status=pb.RuntimeStatusResponse.READY,
            capacityInBytes=self._capacity_bytes,
            maxLoadingConcurrency=self._loads_at_once,
            modelLoadingTimeoutMs=int(LOAD_S * 1000),
            defaultModelSizeInBytes=DEFAULT_BYTES,
            runtimeVersion=f"{told.name} {told.version}",
            allowAnyMethod=True,
        )
        for method in _NAMED:
            response.methodInfos[f"{_SERVICE}/{method}"].idInjectionPath.append(1)
        return response

    async def load(self, request: pb.LoadModelRequest, timeout_s: float) -> pb.LoadModelResponse:
        """See :class:`mmcore.adapters.runtime.Runtime`; INVALID_ARGUMENT for files that cannot be laid out."""
        try:
            size = await asyncio.to_thread(self._lay_out, request)
        except (InvalidModel, OSError) as error:
            raise RpcError(Status.INVALID_ARGUMENT, str(error)) from error
        asked = v2.RepositoryModelLoadRequest(model_name=request.modelId)
        try:
            await self._call("RepositoryModelLoad", asked, v2.RepositoryModelLoadResponse, timeout_s)
        except RpcError as error:
            if error.status in (Status.INVALID_ARGUMENT, Status.FAILED_PRECONDITION):
                # The server has tried, whatever it says.
                raise RpcError(Status.INTERNAL, error.details) from error
            raise
        return pb.LoadModelResponse(sizeInBytes=max(int(size * DISK_FACTOR), DEFAULT_BYTES))

    async def unload(self, model: str, timeout_s: float) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`; returns when the server does not list it as ready any more."""
        await self._unload(model, timeout_s)
        folder = self._repository / model
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def predict_size(self, request: pb.PredictModelSizeRequest, timeout_s: float) -> int:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        size = sum(file.stat().st_size for file in await asyncio.to_thread(files_of, Path(request.modelPath)))
        return max(int(size * DISK_FACTOR), DEFAULT_BYTES)

    async def size(self, model: str, timeout_s: float) -> int:
        """See :class:`mmcore.adapters.runtime.Runtime`: no such server tells."""
        raise RpcError(Status.UNIMPLEMENTED, "this server tells no sizes")

    async def close(self) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        await self._channel.close()

    def _lay_out(self, request: pb.LoadModelRequest) -> int:
        """Make the model's folder; returns what its files take, in bytes. Blocking."""
        name = request.modelId
        if not name or "/" in name or name.startswith(".") or "\0" in name:
            raise InvalidModel(f"{name!r} cannot be the name of a folder in the server's repository")
        key: dict[str, Any] = json.loads(request.modelKey or "{}")
        stated = key.get("model_type", request.modelType)
        if isinstance(stated, dict):
            stated = stated.get("name", "")
        kind = str(stated).removeprefix("mt:").partition(":")[0].lower()
        schema = Path(key["schema_path"]) if key.get("schema_path") else None
        path = Path(request.modelPath).absolute()
        if not path.exists():
            raise InvalidModel(f"{path} does not exist")
        folder = self._repository / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._layout(folder, name, kind, path, schema)
        return sum(file.stat().st_size for file in files_of(path))

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


def _empty(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != "settings.json":  # the server's own
            entry.unlink(missing_ok=True)
