"""TorchServe: an archive for each model in its model store, registered and unregistered over its management port.

It runs with ``--model-store DIR``, ``enable_model_api=true`` and ``disable_token_authorization=true``, which newer
releases need for that (its documentation, "Model Control Mode" and "Token Authorization"). Requests go to its gRPC
port for inference. A model's workers are processes of their own, so what it takes is what they take.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import Message

from mmcore.adapters.ready import ready
from mmcore.adapters.runtime import Tls
from mmcore.adapters.server_memory import DEFAULT_BYTES, ServerMemory, anonymous_bytes
from mmcore.config import TransportSettings
from mmcore.errors import InvalidModel, RpcError, Status
from mmcore.pb import model_runtime_pb2 as pb
from mmcore.pb import torchserve_pb2 as management
from mmcore.transport import Channel

_SERVICE: Final = "org.pytorch.serve.grpc.management.ManagementAPIsService"
_INFERENCE: Final = "org.pytorch.serve.grpc.inference.InferenceAPIsService"
_V2: Final = "org.pytorch.serve.grpc.openinference.GRPCInferenceService"
_METHODS: Final = {
    f"{_INFERENCE}/Predictions": (1,),
    f"{_INFERENCE}/StreamPredictions": (1,),
    f"{_V2}/ModelInfer": (1,),
    f"{_V2}/ModelMetadata": (1,),
    f"{_V2}/ModelReady": (1,),
}
#: In its store, what ModelMesh Serving's adapter wrote for it; and what it is to say for models to be managed.
_SETTINGS: Final = "mmconfig.properties"
_SETTINGS_LINES: Final = ("enable_model_api=true", "disable_token_authorization=true", "enable_envvars_config=true")
LOAD_S: Final = 120.0
_PAGE: Final = 500
_LOOK_S: Final = 0.1
#: It looks at its workers' memory once in a while, and says 0 before it has.
_SAYS_WITHIN_S: Final = 20.0
#: A worker holds Python, its framework and the weights, which an archive has compressed.
DISK_FACTOR: Final = 2.75
_WORKER: Final = b"model_service_worker"
_PROC: Final = Path("/proc")


class TorchServeRuntime:
    """A TorchServe. Satisfies :class:`mmcore.adapters.runtime.Runtime`.

    ``address`` takes requests and ``management`` the rest; ``store`` is the model store, whose links are this
    runtime's. A model has ``workers`` processes, each of which answers one request at a time.
    """

    def __init__(self, address: str, management: str, store: Path, *, workers: int = 1, tls: Tls | None = None) -> None:
        self.address: str = address
        self._managed = management
        self._store = store
        self._workers = workers
        self._memory = ServerMemory(address)
        self._channel = Channel(address, ssl=tls)
        self._management = Channel(management, settings=TransportSettings(max_message_bytes=2**28), ssl=tls)

    def prepare(self) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`: the file that ModelMesh Serving's runtime waits for."""
        file = self._store / _SETTINGS
        if file.exists():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        inference, management = (address.rpartition(":")[2] for address in (self.address, self._managed))
        lines = (f"grpc_inference_port={inference}", f"grpc_management_port={management}", *_SETTINGS_LINES)
        made = file.with_name(f".{file.name}")
        made.write_text("\n".join((*lines, f"model_store={self._store}", "")), encoding="utf-8")
        made.replace(file)

    async def status(self, timeout_s: float) -> pb.RuntimeStatusResponse:
        """See :class:`mmcore.adapters.runtime.Runtime`: ready once it is healthy and its models are unregistered."""
        healthy = await self._channel.unary(f"/{_INFERENCE}/Ping", b"", timeout_s=timeout_s)
        if b"Healthy" not in healthy:
            return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING)
        while names := await self._listed(timeout_s):
            for name in names:
                await self.unload(name, timeout_s)
        await asyncio.to_thread(self._clear)
        await asyncio.to_thread(self._memory.find)
        return ready(self._memory, "TorchServe", _METHODS, loads_at_once=2, load_s=LOAD_S)

    async def load(self, request: pb.LoadModelRequest, timeout_s: float) -> pb.LoadModelResponse:
        """See :class:`mmcore.adapters.runtime.Runtime`; INVALID_ARGUMENT for what is no archive."""
        name = request.modelId
        try:
            await asyncio.to_thread(self._link, name, Path(request.modelPath))
        except (InvalidModel, OSError) as error:
            raise RpcError(Status.INVALID_ARGUMENT, str(error)) from error
        asked = management.RegisterModelRequest(
            model_name=name,
            url=_archive(name),
            initial_workers=self._workers,
            synchronous=True,
            startup_timeout=max(1, int(timeout_s)),
        )
        try:
            await self._call("RegisterModel", asked, timeout_s)
        except RpcError as error:
            if error.status in (Status.INVALID_ARGUMENT, Status.FAILED_PRECONDITION):
                # It has tried, whatever it says.
                raise RpcError(Status.INTERNAL, error.details) from error
            raise
        # Its workers are looked at next.
        return pb.LoadModelResponse(sizeInBytes=0)

    async def unload(self, model: str, timeout_s: float) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`; returns when its workers have ended, where they can be seen."""
        ends_at = time.monotonic() + timeout_s
        workers = await self._worker_processes(model, timeout_s)
        try:
            await self._call("UnregisterModel", management.UnregisterModelRequest(model_name=model), timeout_s)
        except RpcError as error:
            if error.status is not Status.NOT_FOUND:
                raise
        while any([await asyncio.to_thread(_worker_bytes, pid) is not None for pid in workers]):
            if time.monotonic() > ends_at:
                raise RpcError(Status.DEADLINE_EXCEEDED, f"the workers of model {model} have not ended")
            await asyncio.sleep(_LOOK_S)
        if model and "/" not in model:
            await asyncio.to_thread((self._store / _archive(model)).unlink, missing_ok=True)

    async def predict_size(self, request: pb.PredictModelSizeRequest, timeout_s: float) -> int:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        archive = await asyncio.to_thread(_only_archive, Path(request.modelPath))
        return max(int(archive.stat().st_size * DISK_FACTOR), DEFAULT_BYTES)

    async def size(self, model: str, timeout_s: float) -> int:
        """What a model's workers take: their processes', else as the server says when it has looked at them.

        Raises:
            RpcError: UNIMPLEMENTED where it has not within a while.
        """
        ends_at = time.monotonic() + min(timeout_s, _SAYS_WITHIN_S)
        while True:
            workers = await self._described(model, timeout_s)
            seen = [await asyncio.to_thread(_worker_bytes, pid) for pid in _pids(workers)]
            if seen and None not in seen:
                return sum(size for size in seen if size is not None)
            said = sum(int(worker.get("memoryUsage") or 0) for worker in workers)
            if said > 0:
                return said
            if time.monotonic() > ends_at:
                raise RpcError(Status.UNIMPLEMENTED, f"the server does not say what model {model} takes")
            await asyncio.sleep(_LOOK_S)

    async def close(self) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        await self._channel.close()
        await self._management.close()

    async def _listed(self, timeout_s: float) -> list[str]:
        """The first page of the models it has."""
        content = await self._call("ListModels", management.ListModelsRequest(limit=_PAGE), timeout_s)
        return [str(one["modelName"]) for one in content.get("models") or ()]

    async def _described(self, model: str, timeout_s: float) -> list[dict[str, Any]]:
        """The workers of a model, of all its versions."""
        asked = management.DescribeModelRequest(model_name=model, model_version="all")
        versions = await self._call("DescribeModel", asked, timeout_s)
        return [worker for version in versions for worker in version.get("workers") or ()]

    async def _worker_processes(self, model: str, timeout_s: float) -> list[int]:
        try:
            return _pids(await self._described(model, timeout_s))
        except RpcError:
            return []

    async def _call(self, method: str, request: Message, timeout_s: float) -> Any:
        """What is in the answer's JSON; the empty mapping where it is no JSON but a text."""
        path = f"/{_SERVICE}/{method}"
        message = await self._management.unary(path, request.SerializeToString(), timeout_s=timeout_s)
        try:
            return json.loads(management.ManagementResponse.FromString(message).msg)
        except ValueError:
            return {}

    def _link(self, name: str, path: Path) -> None:
        if not name or "/" in name or name.startswith(".") or "\0" in name:
            raise InvalidModel(f"{name!r} cannot be the name of an archive in the model store")
        archive = _only_archive(path.absolute())
        self._store.mkdir(parents=True, exist_ok=True)
        link = self._store / _archive(name)
        link.unlink(missing_ok=True)
        link.symlink_to(archive)

    def _clear(self) -> None:
        """Take our links out of the store; what others have put there stays."""
        self._store.mkdir(parents=True, exist_ok=True)
        for entry in self._store.glob("*.mar"):
            if entry.is_symlink():
                entry.unlink(missing_ok=True)


def _archive(name: str) -> str:
    return f"{name}.mar"


def _only_archive(path: Path) -> Path:
    """The archive at a path, or the only one in a folder.

    Raises:
        InvalidModel: there is none.
    """
    found = sorted(path.glob("*.mar")) if path.is_dir() else [path]
    if len(found) != 1 or found[0].suffix != ".mar" or not found[0].is_file():
        raise InvalidModel(f"{path} is not a TorchServe archive (.mar), nor a folder with one")
    return found[0]


def _pids(workers: list[dict[str, Any]]) -> list[int]:
    return [int(worker["pid"]) for worker in workers if int(worker.get("pid") or 0) > 0]


def _worker_bytes(pid: int) -> int | None:
    """What a worker's process takes; None where it is none of this machine that can be seen from here, or has gone."""
    process = _PROC / str(pid)
    try:
        if _WORKER not in (process / "cmdline").read_bytes():
            return None
    except OSError:
        return None
    return anonymous_bytes(process)
