"""Paths and the gRPC methods behind them: everything of the V2 protocol and of Triton's extensions but inference.

Each is a coroutine ``(request, names in the path …)`` to what its JSON answer holds. They ask the same handlers that a
gRPC call reaches, so that there is one answer to a question whichever way it comes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, ParamSpec, TypeVar

from google.protobuf.message import Message

from mmcore._ext.v2codec import decode_infer_response
from mmcore.errors import InvalidRequest
from mmcore.pb import inference_pb2 as pb
from mmcore.server.rest.answers import UnaryHandler, answer_of
from mmcore.server.rest.encodings import decoded
from mmcore.server.rest.large import LARGE_BYTES
from mmcore.server.rest.messages import plain
from mmcore.server.rest.request import Request
from mmcore.server.rest.tensors import loads
from mmcore.server.rest.v1 import predictions_of, request_of
from mmcore.server.v2 import SERVICE

ResponseT = TypeVar("ResponseT", bound=Message)
ResultT = TypeVar("ResultT")
P = ParamSpec("P")

#: A path's answer: what the JSON holds, None for an empty body; with the status where it is not 200.
Answered = Any
Method = Callable[..., Coroutine[Any, Any, Answered]]

#: What the path's extensions are called beside those of gRPC.
_EXTENSION: Final = "binary_tensor_data"


class NotReady(Exception):
    """What is asked about is not ready: a JSON answer under status 503."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__()
        self.told = told


class Methods:
    """The paths' methods.

    ``handler`` gives the gRPC handler of a method's full path, ``max_bytes`` is what a body may decompress to.
    """

    def __init__(self, handler: Callable[[str], UnaryHandler], max_bytes: int) -> None:
        self._handler = handler
        self._max_bytes = max_bytes

    # Server.

    async def live(self, request: Request) -> Answered:
        """GET /v2/health/live."""
        return {"live": (await self._ask(request, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)).live}

    async def ready(self, request: Request) -> Answered:
        """GET /v2/health/ready."""
        answer = await self._ask(request, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)
        if not answer.ready:
            raise NotReady({"ready": False})
        return {"ready": True}

    async def server_metadata(self, request: Request) -> Answered:
        """GET /v2."""
        answer = await self._ask(request, "ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
        return {**plain(answer), "extensions": [*answer.extensions, _EXTENSION]}

    # Models.

    async def models(self, request: Request) -> Answered:
        """GET /v2/models and /v1/models."""
        index = await self._ask(request, "RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse)
        return {"models": list(dict.fromkeys(row.name for row in index.models))}

    async def model_ready(self, request: Request, name: str, version: str = "") -> Answered:
        """GET /v2/models/NAME/ready and /v1/models/NAME."""
        asked = pb.ModelReadyRequest(name=name, version=version)
        told = {"name": name, "ready": (await self._ask(request, "ModelReady", asked, pb.ModelReadyResponse)).ready}
        if not told["ready"]:
            raise NotReady(told)
        return told

    async def model_metadata(self, request: Request, name: str, version: str = "") -> Answered:
        """GET /v2/models/NAME; a vmodel goes by its own name."""
        return {**plain(await self.describe(request, name, version)), "name": name}

    async def describe(self, request: Request, name: str, version: str = "") -> pb.ModelMetadataResponse:
        """A model's metadata as a message."""
        asked = pb.ModelMetadataRequest(name=name, version=version)
        return await self._ask(request, "ModelMetadata", asked, pb.ModelMetadataResponse)

    async def model_config(self, request: Request, name: str, version: str = "") -> Answered:
        """GET /v2/models/NAME/config."""
        asked = pb.ModelConfigRequest(name=name, version=version)
        return plain((await self._ask(request, "ModelConfig", asked, pb.ModelConfigResponse)).config)

    async def model_statistics(self, request: Request, name: str = "", version: str = "") -> Answered:
        """GET /v2/models/stats and /v2/models/NAME/stats."""
        asked = pb.ModelStatisticsRequest(name=name, version=version)
        return plain(await self._ask(request, "ModelStatistics", asked, pb.ModelStatisticsResponse))

    async def predict(self, request: Request, name: str) -> Answered:
        """POST /v1/models/NAME:predict."""
        body = await decoded(request, self._max_bytes)
        described = await self.describe(request, name)
        message, rows = await _by_size(len(body), request_of, name, body, described.inputs)
        answer = await answer_of(self._handler(f"/{SERVICE}/ModelInfer"), request, message)
        response = decode_infer_response(answer)
        predictions = await _by_size(len(answer), predictions_of, response, rows, platform=described.platform)
        return {"predictions": predictions}

    # The repository.

    async def index(self, request: Request, repository: str = "") -> Answered:
        """POST /v2/repository/index."""
        document = await self._document(request)
        asked = pb.RepositoryIndexRequest(repository_name=repository, ready=document.get("ready") is True)
        answer = await self._ask(request, "RepositoryIndex", asked, pb.RepositoryIndexResponse)
        return [plain(row) for row in answer.models]

    async def load(self, request: Request, name: str) -> Answered:
        """POST /v2/repository/models/NAME/load."""
        asked = pb.RepositoryModelLoadRequest(model_name=name)
        _fill_parameters(asked.parameters, await self._document(request))
        await self._ask(request, "RepositoryModelLoad", asked, pb.RepositoryModelLoadResponse)

    async def unload(self, request: Request, name: str) -> Answered:
        """POST /v2/repository/models/NAME/unload."""
        asked = pb.RepositoryModelUnloadRequest(model_name=name)
        _fill_parameters(asked.parameters, await self._document(request))
        await self._ask(request, "RepositoryModelUnload", asked, pb.RepositoryModelUnloadResponse)

    # Settings.

    async def trace_settings(self, request: Request, name: str = "") -> Answered:
        """GET and POST /v2/trace/setting and /v2/models/NAME/trace/setting."""
        asked = pb.TraceSettingRequest(model_name=name)
        for key, value in (await self._document(request)).items():
            # null is a setting without values, which falls back to the level above.
            values = [] if value is None else value if isinstance(value, list) else [value]
            asked.settings[key].value.extend(str(one) for one in values)
        answer = await self._ask(request, "TraceSetting", asked, pb.TraceSettingResponse)
        return {
            key: list(setting.value) if key == "trace_level" else ",".join(setting.value)
            for key, setting in answer.settings.items()
        }

    async def log_settings(self, request: Request) -> Answered:
        """GET and POST /v2/logging."""
        asked = pb.LogSettingsRequest()
        for key, value in (await self._document(request)).items():
            setting = asked.settings[key]
            if isinstance(value, bool):
                setting.bool_param = value
            elif isinstance(value, int) and 0 <= value < 2**32:
                setting.uint32_param = value
            elif isinstance(value, str):
                setting.string_param = value
            else:
                raise InvalidRequest(f"log setting '{key}': expected a boolean, a whole number or a string")
        answer = await self._ask(request, "LogSettings", asked, pb.LogSettingsResponse)
        return {
            key: getattr(setting, setting.WhichOneof("parameter_choice")) for key, setting in answer.settings.items()
        }

    # Shared memory.

    async def region_status(self, request: Request, name: str = "") -> Answered:
        """GET /v2/systemsharedmemory/status and /v2/systemsharedmemory/region/NAME/status."""
        asked = pb.SystemSharedMemoryStatusRequest(name=name)
        answer = await self._ask(request, "SystemSharedMemoryStatus", asked, pb.SystemSharedMemoryStatusResponse)
        return [plain(region) for region in answer.regions.values()]

    async def register_region(self, request: Request, name: str) -> Answered:
        """POST /v2/systemsharedmemory/region/NAME/register."""
        document = await self._document(request)
        try:
            asked = pb.SystemSharedMemoryRegisterRequest(
                name=name, key=document["key"], offset=document.get("offset", 0), byte_size=document["byte_size"]
            )
        except KeyError as missing:
            raise InvalidRequest(f"expected {missing} in the request") from None
        except (TypeError, ValueError) as error:
            raise InvalidRequest(str(error)) from None
        await self._ask(request, "SystemSharedMemoryRegister", asked, pb.SystemSharedMemoryRegisterResponse)

    async def unregister_region(self, request: Request, name: str = "") -> Answered:
        """POST /v2/systemsharedmemory/unregister and /v2/systemsharedmemory/region/NAME/unregister."""
        asked = pb.SystemSharedMemoryUnregisterRequest(name=name)
        await self._ask(request, "SystemSharedMemoryUnregister", asked, pb.SystemSharedMemoryUnregisterResponse)

    async def cuda_status(self, request: Request, name: str = "") -> Answered:
        """GET /v2/cudasharedmemory/status and /v2/cudasharedmemory/region/NAME/status."""
        asked = pb.CudaSharedMemoryStatusRequest(name=name)
        answer = await self._ask(request, "CudaSharedMemoryStatus", asked, pb.CudaSharedMemoryStatusResponse)
        return [plain(region) for region in answer.regions.values()]

    async def register_cuda(self, request: Request, name: str) -> Answered:
        """POST /v2/cudasharedmemory/region/NAME/register."""
        asked = pb.CudaSharedMemoryRegisterRequest(name=name)
        await self._ask(request, "CudaSharedMemoryRegister", asked, pb.CudaSharedMemoryRegisterResponse)

    async def unregister_cuda(self, request: Request, name: str = "") -> Answered:
        """POST /v2/cudasharedmemory/unregister and /v2/cudasharedmemory/region/NAME/unregister."""
        asked = pb.CudaSharedMemoryUnregisterRequest(name=name)
        await self._ask(request, "CudaSharedMemoryUnregister", asked, pb.CudaSharedMemoryUnregisterResponse)

    async def _ask(self, request: Request, method: str, message: Message, response_type: type[ResponseT]) -> ResponseT:
        handler = self._handler(f"/{SERVICE}/{method}")
        return response_type.FromString(await answer_of(handler, request, message.SerializeToString()))

    async def _document(self, request: Request) -> dict[str, Any]:
        """The body's JSON object; an empty one where there is no body."""
        body = await decoded(request, self._max_bytes)
        if not body.strip():
            return {}
        document = await _by_size(len(body), loads, body)
        if not isinstance(document, dict):
            raise InvalidRequest("expected the request to be a JSON object")
        return document


async def _by_size(size: int, work: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
    """Call a function, in a thread where there are many bytes to be gone through."""
    return await asyncio.to_thread(work, *args, **kwargs) if size > LARGE_BYTES else work(*args, **kwargs)


def _fill_parameters(parameters: Any, document: Mapping[str, Any]) -> None:
    """A load's or unload's ``parameters`` as ModelRepositoryParameter; files come in base64."""
    told = document.get("parameters") or {}
    if not isinstance(told, dict):
        raise InvalidRequest("expected parameters to be an object")
    for key, value in told.items():
        if isinstance(value, bool):
            parameters[key].bool_param = value
        elif isinstance(value, int) and -(2**63) <= value < 2**63:
            parameters[key].int64_param = value
        elif not isinstance(value, str):
            raise InvalidRequest(f"parameter '{key}': expected a string, a whole number or a boolean")
        elif key.startswith("file:"):
            try:
                parameters[key].bytes_param = base64.b64decode(value, validate=True)
            except binascii.Error as error:
                raise InvalidRequest(f"parameter '{key}': expected the file in base64: {error}") from None
        else:
            parameters[key].string_param = value
