"""OpenVINO Model Server: one file lists its models, and it reads the file again when it is told to.

It is told by its REST port, ``POST /v1/config/reload`` and ``GET /v1/config`` (its documentation, "Model Server REST
API"); requests go to its gRPC port. It runs with ``--config_path`` and ``--file_system_poll_wait_seconds=0``. Loads and
unloads that come while it reads are put into the next reading together. A load is confirmed when the server lists the
version as available, an unload when it does not list it any more.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from pathlib import Path
from typing import Any, Final

from mmcore.adapters.model_folders import ModelFolders, files_size, newest_version
from mmcore.adapters.ready import ready
from mmcore.adapters.runtime import Tls
from mmcore.adapters.server_memory import ServerMemory, guessed_size
from mmcore.errors import InvalidModel, RpcError, Status
from mmcore.pb import model_runtime_pb2 as pb

#: How long requests are gathered before the server is told to read again.
GATHER_S: Final = 0.05
LOAD_S: Final = 90.0
#: They are read one after the other, those that come meanwhile together.
_LOADS_AT_ONCE: Final = 8
#: The server loads what is new before it answers.
_RELOAD_S: Final = 90.0
_ASK_S: Final = 10.0
_LOOK_S: Final = 0.05
#: Of a version: answers requests, is coming, is going. One that is END has gone or never came.
_AVAILABLE: Final = "AVAILABLE"
_END: Final = "END"
_METHODS: Final = {
    "inference.GRPCInferenceService/ModelInfer": (1,),
    "inference.GRPCInferenceService/ModelStreamInfer": (1,),
    "inference.GRPCInferenceService/ModelMetadata": (1,),
    "inference.GRPCInferenceService/ModelReady": (1,),
    "tensorflow.serving.PredictionService/Predict": (1, 1),
    "tensorflow.serving.PredictionService/GetModelMetadata": (1, 1),
    "tensorflow.serving.ModelService/GetModelStatus": (1, 1),
}


def lay_out(folder: Path, name: str, kind: str, path: Path, schema: Path | None) -> None:
    """Link the model's newest version into ``folder``; a schema is not looked at, since the files hold it.

    Raises:
        OSError: a link cannot be made.
    """
    version, content = newest_version(path)
    if content.is_dir():
        (folder / version).symlink_to(content)
        return
    (folder / version).mkdir()
    (folder / version / ("model.onnx" if kind == "onnx" else content.name)).symlink_to(content)
    weights = content.with_suffix(".bin")
    if content.suffix == ".xml" and weights.is_file():
        (folder / version / weights.name).symlink_to(weights)


class OvmsRuntime:
    """An OpenVINO Model Server. Satisfies :class:`mmcore.adapters.runtime.Runtime`.

    ``repository`` is the folder for models, this runtime's alone, ``config`` the file that the server reads, and
    ``rest`` where it is told to. With ``tls`` both of its ports are behind what speaks TLS for it.
    """

    def __init__(self, address: str, rest: str, repository: Path, config: Path, *, tls: Tls | None = None) -> None:
        self.address: str = address
        self._rest = rest
        self._tls = tls
        self._folders = ModelFolders(repository, lay_out, kept=(config.name,) if config.parent == repository else ())
        self._config = config
        self._memory = ServerMemory(address)
        #: The models that the file lists.
        self._models: dict[str, Path] = {}
        self._reading = asyncio.Lock()
        self._next: asyncio.Task[dict[str, Any]] | None = None

    def prepare(self) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`: the file that it reads, with no model in it."""
        if not self._config.exists():
            _replace(self._config, json.dumps({"model_config_list": []}))

    async def status(self, timeout_s: float) -> pb.RuntimeStatusResponse:
        """See :class:`mmcore.adapters.runtime.Runtime`: ready once the server answers and lists no model."""
        try:
            await self._ask("GET", "/v1/config", _ASK_S)
        except RpcError:
            return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING)
        self._models.clear()
        listed = await self._read_again()
        ends_at = time.monotonic() + timeout_s
        while any(_states(listed, name) for name in listed):
            if time.monotonic() > ends_at:
                return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING)
            await asyncio.sleep(_LOOK_S)
            listed = await self._listed()
        await asyncio.to_thread(self._folders.clear)
        await asyncio.to_thread(self._memory.find)
        return ready(self._memory, "OpenVINO Model Server", _METHODS, loads_at_once=_LOADS_AT_ONCE, load_s=LOAD_S)

    async def load(self, request: pb.LoadModelRequest, timeout_s: float) -> pb.LoadModelResponse:
        """See :class:`mmcore.adapters.runtime.Runtime`; INVALID_ARGUMENT for files that cannot be laid out."""
        name = request.modelId
        try:
            laid_out = await asyncio.to_thread(self._folders.make, request)
        except (InvalidModel, OSError) as error:
            raise RpcError(Status.INVALID_ARGUMENT, str(error)) from error
        self._models[name] = laid_out.folder
        try:
            async with asyncio.timeout(timeout_s), self._memory.load(laid_out.kind) as growth:
                listed = await self._read_again()
                while not _is_available(listed, name):
                    await asyncio.sleep(_LOOK_S)
                    listed = await self._listed()
        except TimeoutError:
            raise RpcError(Status.DEADLINE_EXCEEDED, f"model {name} is not available yet") from None
        return pb.LoadModelResponse(sizeInBytes=max(guessed_size(laid_out.size_bytes), growth.bytes or 0))

    async def unload(self, model: str, timeout_s: float) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`; returns when the server does not list it any more."""
        ends_at = time.monotonic() + timeout_s
        self._models.pop(model, None)
        listed = await self._read_again()
        while _states(listed, model):
            if time.monotonic() > ends_at:
                raise RpcError(Status.DEADLINE_EXCEEDED, f"model {model} is still being unloaded")
            await asyncio.sleep(_LOOK_S)
            listed = await self._listed()
        if model not in self._models:
            await asyncio.to_thread(self._folders.remove, model)

    async def predict_size(self, request: pb.PredictModelSizeRequest, timeout_s: float) -> int:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        return guessed_size(await asyncio.to_thread(files_size, Path(request.modelPath)))

    async def size(self, model: str, timeout_s: float) -> int:
        """See :class:`mmcore.adapters.runtime.Runtime`: this server does not tell."""
        raise RpcError(Status.UNIMPLEMENTED, "this server tells no sizes")

    async def close(self) -> None:
        """See :class:`mmcore.adapters.runtime.Runtime`."""
        if self._next is not None:
            self._next.cancel()

    async def _read_again(self) -> dict[str, Any]:
        """What the server lists after it has read the file as it is now; all who ask meanwhile share one reading."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._read_next(), name="have the server read again")
        return await asyncio.shield(self._next)

    async def _read_next(self) -> dict[str, Any]:
        try:
            await asyncio.sleep(GATHER_S)
            await self._reading.acquire()
        finally:
            # Who comes from now on is not in this file.
            self._next = None
        try:
            models = [
                {"config": {"name": name, "base_path": str(folder)}} for name, folder in sorted(self._models.items())
            ]
            await asyncio.to_thread(_replace, self._config, json.dumps({"model_config_list": models}))
            status, listed = await self._answer("POST", "/v1/config/reload", _RELOAD_S)
            # Where one model is wrong it tells of none: that is asked then.
            return listed if status in (200, 201) else await self._listed()
        finally:
            self._reading.release()

    async def _listed(self) -> dict[str, Any]:
        return await self._ask("GET", "/v1/config", _ASK_S)

    async def _ask(self, method: str, path: str, timeout_s: float) -> dict[str, Any]:
        status, content = await self._answer(method, path, timeout_s)
        if status != 200:
            raise RpcError(Status.INTERNAL, f"{path} answers {status}: {content.get('error', 'no reason')}")
        return content

    async def _answer(self, method: str, path: str, timeout_s: float) -> tuple[int, dict[str, Any]]:
        try:
            status, body = await asyncio.to_thread(self._exchange, method, path, timeout_s)
            content = json.loads(body or b"{}")
        except (OSError, http.client.HTTPException) as error:
            raise RpcError(Status.UNAVAILABLE, f"{self._rest}{path}: {error}") from error
        except ValueError as error:
            raise RpcError(Status.INTERNAL, f"{self._rest}{path} answers what is no JSON") from error
        return status, content if isinstance(content, dict) else {}

    def _exchange(self, method: str, path: str, timeout_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._rest, timeout=timeout_s)
        if self._tls is not None:
            connection = http.client.HTTPSConnection(self._rest, timeout=timeout_s, context=self._tls())
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _replace(file: Path, text: str) -> None:
    """Write the file whole: the server reads it whenever it likes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_name(f".{file.name}.new")
    made.write_text(text, encoding="utf-8")
    made.replace(file)


def _states(listed: dict[str, Any], name: str) -> list[tuple[str, str, str]]:
    """State, error code and text of each version of a model that has not ended."""
    found = []
    for version in (listed.get(name) or {}).get("model_version_status") or ():
        status = version.get("status") or {}
        if version.get("state") != _END:
            found.append((str(version.get("state")), status.get("error_code", "OK"), status.get("error_message", "")))
    return found


def _is_available(listed: dict[str, Any], name: str) -> bool:
    """Whether a model answers requests.

    Raises:
        RpcError: INTERNAL, with the server's words: it does not, and is not on its way.
    """
    states = _states(listed, name)
    if any(state == _AVAILABLE for state, _, _ in states):
        return True
    for _, code, text in states:
        if code != "OK":
            raise RpcError(Status.INTERNAL, f"{code}: {text}")
    if not states:
        ended = (listed.get(name) or {}).get("model_version_status") or [{}]
        status = ended[0].get("status") or {}
        said = status.get("error_message") or "the server does not list it; its log tells why"
        raise RpcError(Status.INTERNAL, f"model {name} was not loaded: {said}")
    return False
