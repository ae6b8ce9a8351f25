"""The service ``inference.GRPCInferenceService``: which method answers what.

The methods that only tell or switch something are here; inference, streaming, the repository and statistics have files
of their own. Messages, names and texts follow the Open Inference Protocol and the extensions in Triton's documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar, cast

from google.protobuf.message import Message

import mmcore
from mmcore._ext.responses import ResponseCache
from mmcore.errors import Unimplemented
from mmcore.pb import inference_pb2
from mmcore.routing import Mesh, Names, Router
from mmcore.server import settings
from mmcore.server.calls import Answer, Body, Waiting, immediate
from mmcore.server.dataplane import DataplaneConfig
from mmcore.server.inference import Inference
from mmcore.server.naming import Naming
from mmcore.server.repository import Repository
from mmcore.server.shared_memory import SharedMemory
from mmcore.server.statistics import statistics_of
from mmcore.server.streaming import StreamInference
from mmcore.server.tracing import Tracing
from mmcore.server.watched import Handler
from mmcore.transport import Server, ServerCall, StreamCall
from mmcore.transport.server import Guard, UnaryHandler

SERVICE: Final = "inference.GRPCInferenceService"
STREAM_INFER: Final = f"/{SERVICE}/ModelStreamInfer"

#: What ServerMetadata promises; an extension is named here when all of it is served over gRPC.
EXTENSIONS: Final = (
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
    "system_shared_memory",
    "trace",
    "logging",
)

RequestT = TypeVar("RequestT", bound=Message)


class V2Service:
    """The service of one instance. ``config`` says what is served and where requests name their model; None: as usual.
    ``guard`` stands before each message of a stream.

    ``passes_through``: what a model answers itself is answered by a runtime, see :mod:`mmcore.server.passing`.
    ``loads``: whether clients may load and unload models by the repository extension.

    Attributes:
        ready: what ServerReady answers; the node sets it when models asked for at start are loaded, and takes it back
            when it drains.
    """

    def __init__(
        self,
        router: Router,
        names: Names,
        *,
        server_name: str,
        response_cache_bytes: int,
        config: Callable[[], DataplaneConfig] | None = None,
        mesh: Mesh | None = None,
        passes_through: bool = False,
        loads: bool = True,
        guard: Guard | None = None,
    ) -> None:
        self.ready = False
        self._loads = loads
        self._name = server_name
        self._router = router
        self._repository = Repository(router)
        self._regions = SharedMemory()
        self._waiting = Waiting()
        self._tracing = Tracing(router)
        responses = ResponseCache(response_cache_bytes)
        self._inference = Inference(router, names, self._regions, self._tracing, self._waiting, responses, mesh)
        self._config = config
        self._naming = Naming(names, self._waiting, config or DataplaneConfig)
        self._mesh = mesh
        self._passes_through = passes_through
        self._guard = guard
        # Each message of a stream is a request of its own.
        self._infer_in_stream = self._guarded(STREAM_INFER, self._infer("ModelStreamInfer"))
        self._streams = StreamInference(self._infer_in_stream)

    def register(self, server: Server) -> None:
        """Add every method to ``server``."""
        if not self._passes_through:
            server.add_unary(f"/{SERVICE}/ModelInfer", self._infer("ModelInfer"))
            server.add_stream(STREAM_INFER, self._serve_stream, each=True)

        def at_once(name: str, request_type: type[RequestT], method: Callable[[RequestT], Message]) -> None:
            self._add(server, name, immediate(request_type, method))

        pb = inference_pb2
        at_once("ServerLive", pb.ServerLiveRequest, self._server_live)
        at_once("ServerReady", pb.ServerReadyRequest, self._server_ready)
        at_once("ServerMetadata", pb.ServerMetadataRequest, self._server_metadata)
        at_once("TraceSetting", pb.TraceSettingRequest, self._tracing.update)
        at_once("LogSettings", pb.LogSettingsRequest, settings.update_log_settings)
        at_once("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest, self._region_status)
        at_once("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest, self._register_region)
        at_once("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest, self._unregister_region)
        self._add(server, "CudaSharedMemoryStatus", _no_cuda)
        self._add(server, "CudaSharedMemoryRegister", _no_cuda)
        at_once("CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest, self._unregister_cuda)

        waiting, repository = self._waiting, self._repository
        self._add(server, "RepositoryIndex", waiting.handler(pb.RepositoryIndexRequest, repository.index))
        load = waiting.handler(pb.RepositoryModelLoadRequest, repository.load)
        unload = waiting.handler(pb.RepositoryModelUnloadRequest, repository.unload)
        self._add(server, "RepositoryModelLoad", load if self._loads else _mesh_loads)
        self._add(server, "RepositoryModelUnload", unload if self._loads else _mesh_loads)
        not_ready = pb.ModelReadyResponse(ready=False)
        for name, request, answer, absent, passed_on in (
            ("ModelReady", pb.ModelReadyRequest, repository.model_ready, not_ready, None),
            ("ModelStatistics", pb.ModelStatisticsRequest, self._model_statistics, None, None),
            ("ModelMetadata", pb.ModelMetadataRequest, repository.model_metadata, None, self._passed_on),
            ("ModelConfig", pb.ModelConfigRequest, repository.model_config, None, self._passed_on),
        ):
            if self._passes_through and passed_on is not None:
                continue
            method = f"{SERVICE}/{name}"
            handler = self._naming.handler(method, request, answer, absent=absent, passed_on=passed_on)
            server.add_unary(f"/{method}", handler)

    def apart(self, path: str) -> Handler:
        """What answers traced requests of ModelInfer, and those within streams."""
        handler = self._inference.apart if self._config is None else self._infer(path.rpartition("/")[2])
        return self._guarded(path, handler)

    def surround(self, around: Callable[[str, Handler], Handler] | None) -> None:
        """Have the requests within streams looked at; see :meth:`mmcore.transport.Server.surround`."""
        infer = self._infer_in_stream
        self._streams.infer = infer if around is None else around(STREAM_INFER, infer)

    def _guarded(self, path: str, handler: Handler) -> Handler:
        # Requests of a stream, and of REST, answer like a transport's calls.
        return handler if self._guard is None else cast(Handler, self._guard.unary(path, handler))

    def _passed_on(self, call: Answer, body: bytes, model: str, path: str, here: Callable[[], object]) -> bool:
        """Whether a question about a model that is not loaded here goes to another instance."""
        if self._mesh is None or self._router.in_folder(model) or self._router.copies(model):
            return False
        return self._mesh.pass_on(call, body, model, here, resolved=True, path=path)

    async def _serve_stream(self, call: StreamCall) -> None:
        if self._config is not None:
            self._config().of(f"{SERVICE}/ModelStreamInfer")
        await self._streams.serve(call)

    def _infer(self, name: str) -> Callable[[Answer, bytes], Body | None]:
        """What answers inferences that come through a method: the quick path, unless there is a configuration."""
        if self._config is None:
            return self._inference.infer
        return self._inference.configured(f"{SERVICE}/{name}", self._config)

    def _add(self, server: Server, name: str, handler: UnaryHandler) -> None:
        """Serve a method that is for no model in particular, if the configuration allows it."""
        config = self._config

        def allowed(call: ServerCall, body: bytes) -> Body | None:
            assert config is not None
            config().of(f"{SERVICE}/{name}")
            return handler(call, body)

        server.add_unary(f"/{SERVICE}/{name}", handler if config is None else allowed)

    def drain(self) -> None:
        """Answer ServerReady with no, and end streams that have nothing under way."""
        self.ready = False
        self._streams.drain()

    def _server_live(self, request: inference_pb2.ServerLiveRequest) -> inference_pb2.ServerLiveResponse:
        return inference_pb2.ServerLiveResponse(live=True)

    def _server_ready(self, request: inference_pb2.ServerReadyRequest) -> inference_pb2.ServerReadyResponse:
        return inference_pb2.ServerReadyResponse(ready=self.ready)

    def _server_metadata(self, request: inference_pb2.ServerMetadataRequest) -> inference_pb2.ServerMetadataResponse:
        return inference_pb2.ServerMetadataResponse(name=self._name, version=mmcore.__version__, extensions=EXTENSIONS)

    async def _model_statistics(
        self, request: inference_pb2.ModelStatisticsRequest
    ) -> inference_pb2.ModelStatisticsResponse:
        return await statistics_of(self._router, request.name, request.version)

    def _region_status(
        self, request: inference_pb2.SystemSharedMemoryStatusRequest
    ) -> inference_pb2.SystemSharedMemoryStatusResponse:
        status = inference_pb2.SystemSharedMemoryStatusResponse.RegionStatus
        return inference_pb2.SystemSharedMemoryStatusResponse(
            regions={
                region.name: status(name=region.name, key=region.key, offset=region.offset, byte_size=region.byte_size)
                for region in self._regions.status(request.name)
            }
        )

    def _register_region(
        self, request: inference_pb2.SystemSharedMemoryRegisterRequest
    ) -> inference_pb2.SystemSharedMemoryRegisterResponse:
        self._regions.register(request.name, request.key, request.offset, request.byte_size)
        return inference_pb2.SystemSharedMemoryRegisterResponse()

    def _unregister_region(
        self, request: inference_pb2.SystemSharedMemoryUnregisterRequest
    ) -> inference_pb2.SystemSharedMemoryUnregisterResponse:
        self._regions.unregister(request.name)
        return inference_pb2.SystemSharedMemoryUnregisterResponse()

    def _unregister_cuda(
        self, request: inference_pb2.CudaSharedMemoryUnregisterRequest
    ) -> inference_pb2.CudaSharedMemoryUnregisterResponse:
        # Clients of system shared memory (Triton's examples, perf_analyzer) unregister both kinds to begin afresh, and
        # to forget a region that is not there is no error with either.
        return inference_pb2.CudaSharedMemoryUnregisterResponse()


def _mesh_loads(call: ServerCall, body: bytes) -> bytes:
    raise Unimplemented("models are loaded and unloaded here by the mesh alone, through mmesh.ModelRuntime")


def _no_cuda(call: ServerCall, body: bytes) -> bytes:
    raise Unimplemented("this server keeps tensors in host memory; CUDA shared memory is not supported")
