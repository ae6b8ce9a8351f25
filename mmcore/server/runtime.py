"""``mmcore runtime``: a process that holds the models that a mesh tells it to hold, and answers for them.

They are in this process, in our own formats, or in another server that an adapter speaks to. Builds the parts, starts
them, and drains them, as :mod:`mmcore.server.node` does for an instance.
"""

from __future__ import annotations

import json
import logging
import secrets
import ssl
import sys
from typing import Final

import mmcore
from mmcore import log as logs
from mmcore import pb as protocols
from mmcore.adapters import SERVICE, External, open_external
from mmcore.cache import Cache
from mmcore.config import CacheSettings, HeldSettings
from mmcore.errors import InvalidSetting, Unavailable
from mmcore.model import ModelInfo
from mmcore.pb import model_runtime_pb2 as pb
from mmcore.registry import open_registry
from mmcore.routing import Names, Refilling, Router
from mmcore.runtimes.isolation import policy_loader
from mmcore.server import v2
from mmcore.server.allocator import keep_freed_memory
from mmcore.server.calls import Waiting
from mmcore.server.external_cache import external_cache, tell_what_goes
from mmcore.server.interpreter import Collections, take_short_turns
from mmcore.server.model_runtime import ModelRuntime
from mmcore.server.observed import Observed
from mmcore.server.parts import Parts
from mmcore.server.passing import PassThrough
from mmcore.server.ports import listening
from mmcore.server.process import LAST_ANSWERS_S, run_until_told
from mmcore.server.rest import Listener
from mmcore.server.v2 import V2Service
from mmcore.storage import GivenFiles, Origin, PulledOrigin, WholeOrigin
from mmcore.transport import Server, add_health, add_reflection
from mmcore.transport.tls import server_context

log = logging.getLogger(__name__)

#: What is in memory is the mesh's business: it loads nothing before there is room.
_ALL: Final = sys.maxsize
#: What a model takes of whose size nothing is known yet.
_DEFAULT_BYTES: Final = 1_000_000
#: Methods whose requests have the model's name in their first field.
_NAMED: Final = ("ModelInfer", "ModelStreamInfer", "ModelMetadata", "ModelConfig", "ModelReady", "ModelStatistics")


class RuntimeNode:
    """One such process.

    Attributes:
        addresses: where it listens: ``grpc``, and where it has been told to ``uds`` and ``metrics``.

    Raises:
        InvalidSetting: the adapter's address is none.
    """

    def __init__(self, settings: HeldSettings) -> None:
        self.addresses: dict[str, str] = {}
        self._settings = settings
        self._external = open_external(settings.adapter, "--adapter") if settings.adapter is not None else None
        self._started = False
        self._server = Server(settings=settings.transport)
        self._health = add_health(self._server)
        self._router = Router(capacity_bytes=_ALL, cache=_cache(settings, self._external))
        self._collections = Collections(self._router.cache)
        self._refilling = Refilling(self._router)
        #: Without vmodels: a mesh asks for models by their own names.
        instance = secrets.token_hex(4)
        self._registry = open_registry("memory:", instance)
        names = Names(self._router.table, self._registry, self._router.knows)
        self._service = V2Service(
            self._router,
            names,
            server_name=settings.server_name,
            response_cache_bytes=settings.response_cache_bytes,
            passes_through=self._external is not None,
            loads=False,
        )
        self._service.register(self._server)
        ModelRuntime(self._router, self._told, self._origin).register(self._server)
        if self._external is not None:
            self._passing = PassThrough(self._external, self._router, names, Waiting())
            self._passing.register(self._server)
            tell_what_goes(self._router.cache, self._external)
            self._external.on_down = self._server_lost
            self._external.on_up = self._server_back
        services = [v2.SERVICE, SERVICE, "grpc.health.v1.Health"]
        add_reflection(self._server, protocols.descriptor_protos(), services)
        parts = Parts(
            instance, self._router, self._registry, self._server, lambda: self._service.ready,
            capacity_bytes=lambda: self._capacity_bytes,
        )  # fmt: skip
        self._observed = Observed(parts)
        self._metrics = Listener(self._observed.handle, settings.transport)
        self._set_health(serving=False)

    async def start(self) -> None:
        """Listen, and wait for the server that an adapter speaks to; a mesh that asks meanwhile is told STARTING.

        Raises:
            Unavailable: an address cannot be listened on, or that server is not there in time.
            InvalidSetting: nobody says what models may take together.
        """
        settings = self._settings
        await self._registry.start()
        await self._router.start()
        self._collections.start()
        tls = server_context(settings.tls) if settings.tls is not None else None
        self.addresses["grpc"] = await self._listen(self._server, settings.port, "--grpc-port", tls)
        if settings.metrics_port is not None:
            self.addresses["metrics"] = await self._listen(self._metrics, settings.metrics_port, "--metrics-port")
        if settings.uds is not None:
            try:
                self.addresses["uds"] = (await self._server.listen_unix(str(settings.uds))).removeprefix("unix:")
            except OSError as error:
                raise Unavailable(f"cannot listen on {settings.uds}: {error}; choose another --uds") from error
        if self._external is not None:
            await self._external.start()
            if not self._capacity_bytes:
                raise InvalidSetting("--capacity: the server does not say what its models may take together")
            self._router.cache.resize(_ALL, self._external.loads_at_once)
        self._started = True
        self._set_health(serving=True)

    async def _listen(
        self, server: Server | Listener, port: int, option: str, tls: ssl.SSLContext | None = None
    ) -> str:
        host = self._settings.host
        with listening(host, port, option):
            return await server.listen_tcp(host, port, ssl=tls)

    def ready_line(self) -> str:
        """What is printed when models can be loaded: one line of JSON."""
        return json.dumps({"event": "ready", **self.addresses}, separators=(",", ":"))

    async def drain(self) -> None:
        """Take nothing new, finish what is under way within the grace, and let go of the models."""
        self._set_health(serving=False)
        self._health.close()
        self._service.drain()
        await self._server.drain(self._settings.grace_s)
        self._observed.drained()
        await self._metrics.drain(LAST_ANSWERS_S)
        await self._refilling.close()
        if self._external is not None:
            self._external.give_up_loads()
        await self._router.close()
        if self._external is not None:
            await self._external.close()
        await self._registry.close()
        self._collections.stop()

    def _told(self) -> pb.RuntimeStatusResponse:
        external, settings = self._external, self._settings
        if not self._started or (external is not None and not external.up):
            return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING)
        told = pb.RuntimeStatusResponse()
        if external is not None:
            told.CopyFrom(external.status)
        else:
            told.maxLoadingConcurrency = settings.loader_threads
            told.defaultModelSizeInBytes = _DEFAULT_BYTES
            for method in _NAMED:
                told.methodInfos[f"{v2.SERVICE}/{method}"].idInjectionPath.append(1)
        told.status = pb.RuntimeStatusResponse.READY
        told.capacityInBytes = self._capacity_bytes
        told.modelLoadingTimeoutMs = int(settings.load_timeout_s * 1000)
        told.runtimeVersion = " ".join(filter(None, (f"mmcore {mmcore.__version__}", told.runtimeVersion)))
        return told

    @property
    def _capacity_bytes(self) -> int:
        said = self._external.status.capacityInBytes if self._external is not None else 0
        return self._settings.capacity_bytes or said

    def _origin(self, info: ModelInfo) -> Origin:
        make = PulledOrigin if self._external is None else WholeOrigin
        return make(GivenFiles(), lambda name: info)

    def _server_lost(self) -> None:
        self._refilling.lost()
        self._set_health(serving=False)

    def _server_back(self) -> None:
        assert self._external is not None
        self._router.cache.resize(_ALL, self._external.loads_at_once)
        self._passing.forget_methods()
        self._refilling.back()
        self._set_health(serving=True)

    def _set_health(self, *, serving: bool) -> None:
        self._service.ready = serving
        for service in ("", v2.SERVICE, SERVICE):
            self._health.set(service, serving)


def _cache(settings: HeldSettings, external: External | None) -> Cache:
    if external is not None:
        return external_cache(external, _ALL, CacheSettings(min_residency_s=0.0))
    return Cache(
        capacity_bytes=_ALL,
        load=policy_loader(settings.isolate),
        loader_threads=settings.loader_threads,
        min_residency_s=0.0,
    )


def run(settings: HeldSettings) -> int:
    """Run one until told to end; the exit code: 0 drained, 1 failed or ended at once."""
    keep_freed_memory()
    take_short_turns()
    logs.configure(settings.log_level, settings.log_format)
    log.info("mmcore %s runtime, capacity %d bytes", mmcore.__version__, settings.capacity_bytes)
    return run_until_told(lambda: RuntimeNode(settings), settings.event_loop, settings.grace_s)
