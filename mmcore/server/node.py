"""One serving instance: builds its parts, starts them, says when it is ready, and drains it.

The only place of the serving side that constructs things. What :meth:`Node.start` makes, :meth:`Node.drain` gives back
in the opposite order.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import mmcore
from mmcore import log as logs
from mmcore import pb, placement
from mmcore._ext.calls import CallCounters
from mmcore.adapters import External, open_external
from mmcore.cache import Cache
from mmcore.config import ServeSettings, StorageSettings
from mmcore.errors import InvalidSetting, Unavailable
from mmcore.placement import TypeConstraints
from mmcore.registry import InstanceRecord, Registry, open_registry
from mmcore.routing import Forwarding, Members, Mesh, Names, Refilling, Registered, Router, Transitions, VModels
from mmcore.routing.watched_file import WatchedFile
from mmcore.runtimes.isolation import policy_loader
from mmcore.server import cluster, management
from mmcore.server.access import Access, Addresses
from mmcore.server.allocator import keep_freed_memory
from mmcore.server.calls import Answer, Body, Waiting
from mmcore.server.dashboard.events import Events
from mmcore.server.dashboard.recent import Recent
from mmcore.server.dataplane import parse_dataplane_config
from mmcore.server.elsewhere import Elsewhere
from mmcore.server.external_cache import external_cache, tell_what_goes
from mmcore.server.inference import MODEL_INFER
from mmcore.server.interpreter import Collections, take_short_turns
from mmcore.server.observed import Observed
from mmcore.server.parts import Parts
from mmcore.server.passing import KNOWN, PassThrough
from mmcore.server.payloads import PayloadLog
from mmcore.server.peer import add_peer_methods, listen_for_peers
from mmcore.server.ports import listening
from mmcore.server.process import LAST_ANSWERS_S, run_until_told
from mmcore.server.request_log import RequestLog
from mmcore.server.rest import Listener, Request
from mmcore.server.static_models import StaticModels, parse_static_models
from mmcore.server.tokens import Grants, parse_tokens
from mmcore.server.v2 import SERVICE, STREAM_INFER, V2Service
from mmcore.server.watched import Watcher, watched
from mmcore.server.workers import run_workers
from mmcore.storage import DiskCache, ModelFolder, PulledOrigin, Puller, StorageConfig, WholeOrigin
from mmcore.tracing import RequestTrace, Tracer
from mmcore.transport import Server, add_health, add_reflection
from mmcore.transport.tls import HTTP_1, HTTP_2, peer_context, server_context

if TYPE_CHECKING:
    from mmcore.server.dashboard.dashboard import Dashboard

log = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")

#: The share of the grace that handing models over may take; the rest is for the calls in flight.
HANDOVER_SHARE: Final = 0.6

#: How long a new instance that others stand in for may be loading ahead before it is ready.
FILL_WAIT_S: Final = 20.0

#: The services that reflection tells of.
_SERVICES: Final = (SERVICE, management.SERVICE, cluster.SERVICE, "grpc.health.v1.Health")


class Node:
    """One instance.

    Attributes:
        instance: its id, new at every start.
        addresses: where it listens, by kind: ``grpc``, ``rest``, ``metrics``, and where it has been told to ``uds``,
            ``management`` and ``peer``.

    Raises:
        InvalidSetting: a file of settings, or the address of the registry, says what cannot be.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.instance = secrets.token_hex(4)
        self.addresses: dict[str, str] = {}
        self._started_ms = time.time_ns() // 1_000_000
        self._starting = True
        self._settings = settings
        self._files: list[WatchedFile[Any]] = []
        self._following: list[asyncio.Task[None]] = []
        dataplane = self._watched(settings.dataplane_config, parse_dataplane_config)
        config = (lambda: dataplane.value) if dataplane is not None else None
        tokens = self._watched(settings.auth_tokens, parse_tokens)
        grants = tokens.value if tokens is not None else None
        limits = (settings.address_requests_per_s, settings.address_concurrent)
        addresses = Addresses(*limits) if any(limits) else None
        access = Access(grants, manages=settings.shared_management, config=config, addresses=addresses)
        management_access = Access(grants, addresses=addresses)
        if tokens is not None:
            tokens.on_change = partial(_renew, (access, management_access))
        guarded = tokens is not None or addresses is not None or not settings.shared_management
        self._guard = access if guarded else None
        self._server = Server(settings=settings.transport, guard=self._guard)
        self._health = add_health(self._server)
        self._external = open_external(settings.runtime, "--runtime") if settings.runtime is not None else None
        self._router = Router(
            capacity_bytes=settings.capacity_bytes,
            folder=ModelFolder(settings.models) if settings.models else None,
            cache=_cache(settings, self._external),
        )
        self._refilling = Refilling(self._router)
        self._events = Events(self._router.cache)
        self._recent = Recent(self._router.copies)
        self._collections = Collections(self._router.cache)
        self._registry = _open(settings.registry, self.instance)
        self._puller = _puller(settings.storage)
        origin = WholeOrigin if self._external is not None else PulledOrigin
        self._registered = Registered(self._registry, self._router, partial(origin, self._puller))
        self._constraints = self._watched(settings.type_constraints, _read_constraints)
        self._mesh = self._joined() if settings.peer_port is not None or settings.peer_uds is not None else None
        if self._mesh is not None:
            self._registered.loads = self._mesh
        self._vmodels = VModels(self._registry, self._registered, default_owner=settings.vmodel_owner)
        self._transitions = Transitions(self._registry, self._vmodels, self._registered.loads)
        self._static = StaticModels(self._registry, self._registered, self._vmodels, str(settings.static_models or ""))
        self._static_file = self._watched(settings.static_models, parse_static_models)
        names = Names(self._router.table, self._registry, self._router.knows)
        self._service = V2Service(
            self._router,
            names,
            server_name=settings.server_name,
            response_cache_bytes=settings.response_cache_bytes,
            config=config,
            mesh=self._mesh,
            passes_through=self._external is not None,
            guard=self._guard,
        )
        self._service.register(self._server)
        if self._external is not None:
            self._passing = PassThrough(self._external, self._router, names, Waiting(), config=config, mesh=self._mesh)
            self._passing.register(self._server)
            tell_what_goes(self._router.cache, self._external)
            self._external.on_down = self._runtime_lost
            self._external.on_up = self._runtime_back
        elif self._mesh is not None:
            others = [method for method in KNOWN if not method.startswith(f"{SERVICE}/")]
            elsewhere = Elsewhere(self._router, names, Waiting(), self._mesh, paths=KNOWN, config=config)
            elsewhere.register(self._server, others)
        tell = self._tell_worker if settings.dashboard and settings.peer_uds is not None else None
        add_peer_methods(self._server, self._router, self._registered, tell)
        self._management_server = Server(
            settings=settings.transport, guard=management_access if tokens is not None else None
        )
        for server in (self._server, self._management_server):
            management.Management(self._registered, self._vmodels).register(server)
            cluster.Cluster(
                self._registry, self._router, self._registered, self._vmodels, self.record,
                self._mesh.forwarding if self._mesh is not None else None,
            ).register(server)  # fmt: skip
        add_reflection(self._server, pb.descriptor_protos(), list(_SERVICES))
        add_reflection(self._management_server, pb.descriptor_protos(), [management.SERVICE, cluster.SERVICE])
        self._rest_counted = defaultdict[str, CallCounters](CallCounters)
        self._rest = Listener(self._first_rest_request, settings.transport, self._server.working)
        observed = Observed(
            Parts(
                self.instance, self._router, self._registry, self._server, lambda: self._service.ready,
                registered=self._registered, puller=self._puller, rest=self._rest, rest_counted=self._rest_counted,
                forwarding=self._mesh.forwarding if self._mesh is not None else None, payloads=lambda: self._payloads,
            ),
            per_model=settings.metrics_per_model,
        )  # fmt: skip
        self._observed = observed
        self._metrics = Listener(observed.handle, settings.transport)
        self._tracer = self._started_tracer()
        payloads = settings.payloads
        self._payloads = PayloadLog(payloads.destination, payloads, self.instance) if payloads.destination else None
        logs.switches.on_requests = self._watch
        self._watch(logs.switches.requests)
        self._set_serving(serving=False)

    def _started_tracer(self) -> Tracer | None:
        """What traces requests; None where there is no collector to send traces to."""
        traces, name = self._settings.traces, self._settings.server_name
        if traces.endpoint is None:
            return None
        return Tracer(
            traces.endpoint, ratio=traces.ratio, service=name, version=mmcore.__version__, instance=self.instance
        )

    def _watch(self, log_requests: bool) -> None:
        """Have calls of the inference service looked at by those who want to; nobody stands in their way otherwise."""
        watchers: list[Watcher] = [] if self._payloads is None else [self._payloads]
        if log_requests:
            watchers.append(RequestLog())
        tracer = self._tracer
        if self._external is not None:
            self._passing.tracer = tracer
        if tracer is None and not watchers:
            self._server.surround(None)
            self._service.surround(None)
            return

        def trace(path: str, call: Answer) -> RequestTrace | None:
            return tracer.request(path.removeprefix("/"), call.metadata) if tracer is not None else None

        def around(path: str, handler: Any) -> Any:
            if not path.startswith(f"/{SERVICE}/") and path.removeprefix("/") not in KNOWN:
                return handler
            infers = path in (MODEL_INFER, STREAM_INFER) and self._external is None
            return watched(path, handler, self._service.apart(path) if infers else handler, trace, watchers)

        self._server.surround(around)
        self._service.surround(around)

    async def start(self) -> None:
        """Register the models of the folder, listen, load what is to be loaded; ready when it returns.

        Raises:
            Unavailable: an address cannot be listened on, or the registry be reached; the text tells which.
            MmcoreError: a static model could not be registered or loaded.
        """
        settings = self._settings
        if self._external is not None:
            await self._external.start()
            self._take_capacity(self._external)
        self._collections.start()
        await self._router.start()
        try:
            await self._registry.start()
        except Unavailable as error:
            raise Unavailable(f"{error}; see --registry {settings.registry}") from error
        if settings.dashboard:
            self._note_events()
        self._registered.start()
        self._transitions.start()
        await self._start_files()
        self.addresses["grpc"] = await self._listen(self._server, settings.grpc_port, "--grpc-port")
        self.addresses["rest"] = await self._listen(self._rest, settings.rest_port, "--rest-port")
        self.addresses["metrics"] = await self._listen(self._metrics, settings.metrics_port, "--metrics-port")
        if settings.management_port is not None:
            self.addresses["management"] = await self._listen(
                self._management_server, settings.management_port, "--management-port"
            )
        if settings.uds:
            try:
                self.addresses["uds"] = (await self._server.listen_unix(str(settings.uds))).removeprefix("unix:")
            except OSError as error:
                raise Unavailable(f"cannot listen on {settings.uds}: {error}; choose another --uds") from error
        peer = await listen_for_peers(self._server, settings)
        if peer is not None:
            self.addresses["peer"] = peer
        if self._mesh is not None:
            await self._mesh.start()
        await self._preload()
        if self._mesh is not None and not await self._mesh.filling.filled(FILL_WAIT_S):
            log.info("ready with a part of what is to be loaded ahead")
        self._set_serving(serving=True)
        self._starting = False
        if self._mesh is not None:
            await self._mesh.members.announce()

    async def _listen(self, server: Server | Listener, port: int, option: str) -> str:
        host, shared = self._settings.host, self._settings.shares_ports
        with listening(host, port, option):
            return await server.listen_tcp(host, port, reuse_port=shared, ssl=self._tls_of(server))

    def _note_events(self) -> None:
        """Note for the dashboard what happens from now on."""
        self._events.follow(self._registry.models)
        self._following.append(asyncio.get_running_loop().create_task(self._recent.run(), name="note recent use"))

    def _tls_of(self, server: Server | Listener) -> ssl.SSLContext | None:
        """The context of one port; probes and Prometheus have no certificate of their own."""
        files = self._settings.tls
        if files is None:
            return None
        if server is self._metrics:
            return server_context(replace(files, client_ca=None), HTTP_1) if self._settings.metrics_tls else None
        return server_context(files, HTTP_1 if server is self._rest else HTTP_2)

    def _watched(self, path: Path | None, parse: Callable[[str], ValueT]) -> WatchedFile[ValueT] | None:
        if path is None:
            return None
        file = WatchedFile(path, parse)
        self._files.append(file)
        return file

    async def _start_files(self) -> None:
        """Register the static models, and follow the files."""
        if self._static_file is not None:
            self._static_file.on_change = self._static.changed
            await self._static.apply(self._static_file.value)
        for file in self._files:
            self._following.append(asyncio.get_running_loop().create_task(file.watch(), name="watch a file"))

    def record(self) -> InstanceRecord:
        """What others are told of this instance."""
        cache, now_ms = self._router.cache, time.time_ns() // 1_000_000
        idle_s = cache.oldest_idle_s
        return InstanceRecord(
            address=self.addresses.get("peer", ""),
            started_ms=self._started_ms,
            version=mmcore.__version__,
            location=socket.gethostname(),
            zone=self._settings.zone,
            labels=self._settings.labels,
            capacity_bytes=cache.capacity_bytes,
            used_bytes=cache.used_bytes,
            fixed_bytes=cache.lru.pinned + cache.room.reserved.host,
            unloading_bytes=cache.room.leaving.host,
            models=len(cache.lru),
            oldest_used_ms=now_ms - int(1000 * idle_s) if idle_s is not None else 0,
            loading=cache.loading,
            loader_threads=cache.loader_threads,
            requests_per_minute=round(self._mesh.upkeep.usage.requests_per_minute) if self._mesh is not None else 0,
            in_flight=max(0, self._server.working.count),
            draining=not self._starting and not self._service.ready,
            published_ms=now_ms,
        )

    def _take_capacity(self, external: External) -> None:
        assert self._settings.runtime is not None
        capacity_bytes = self._settings.runtime.capacity_bytes or external.status.capacityInBytes
        if not capacity_bytes:
            raise InvalidSetting("--capacity: the runtime does not say what its models may take together")
        self._router.cache.resize(capacity_bytes, external.loads_at_once)

    def _runtime_lost(self) -> None:
        self._refilling.lost()
        self._set_health(serving=False)

    def _runtime_back(self) -> None:
        assert self._external is not None
        self._take_capacity(self._external)
        self._passing.forget_methods()
        self._refilling.back()
        self._set_health(serving=self._serving)

    def _joined(self) -> Mesh:
        """This instance's part of the mesh."""
        tls, ca = self._settings.tls, self._settings.peer_ca
        forwarding = Forwarding(self.instance, ssl=peer_context(ca, tls) if tls and ca else None)
        members = Members(self._registry, placement.Cluster(), forwarding, self.record)
        if self._constraints is not None:
            members.constrain(self._constraints.value)
            self._constraints.on_change = members.constrain
        forwarding.working = self._server.working
        return Mesh(self._registry, self._router, self._registered, forwarding, members)

    def ready_line(self) -> str:
        """What is printed when the instance is ready: one line of JSON."""
        return json.dumps(
            {"event": "ready", **self.addresses, "instance": self.instance, "models": self._router.count()},
            separators=(",", ":"),
        )

    async def drain(self) -> None:
        """Take nothing new, finish what is under way within the grace, and let go of everything.

        What is used here is loaded by other instances first, and answered here until it is.
        """
        self._starting = False
        self._set_serving(serving=False)
        if self._mesh is not None and self._settings.hands_over:
            await self._mesh.leave(self._settings.grace_s * HANDOVER_SHARE)
        self._health.close()
        self._service.drain()
        for task in self._following:
            task.cancel()
        grace_s = self._settings.grace_s
        await asyncio.gather(
            self._server.drain(grace_s), self._management_server.drain(grace_s), self._rest.drain(grace_s)
        )
        # Up to here it can be watched how it ends.
        self._observed.drained()
        await self._metrics.drain(LAST_ANSWERS_S)
        await self._static.close()
        await self._transitions.close()
        if self._mesh is not None:
            await self._mesh.close()
        self._puller.close()
        await self._refilling.close()
        if self._external is not None:
            self._external.give_up_loads()
        await self._router.close()
        if self._external is not None:
            await self._external.close()
        await self._registered.close()
        await self._registry.close()
        self._collections.stop()
        logs.switches.on_requests = lambda wanted: None
        for one in (self._tracer, self._payloads):
            if one is not None:
                await asyncio.to_thread(one.close)

    def _first_rest_request(self, request: Request) -> None:
        """Take over for REST when there is a client of it: what it imports is not in an instance's idle memory."""
        from mmcore.server.rest.routes import Routes

        dashboard = self._dashboard.handle if self._settings.dashboard else None
        limit = self._settings.transport.max_message_bytes
        routes = Routes(self._server.unary, limit, self._rest_counted, dashboard)
        self._rest.handle = routes.handle
        routes.handle(request)

    async def _tell_worker(self, question: bytes) -> Body:
        """What the dashboard of another worker asks."""
        return await self._dashboard.heard(question)

    @cached_property
    def _dashboard(self) -> Dashboard:
        """Made, as REST is, when somebody asks for it."""
        from mmcore.server.dashboard.dashboard import Dashboard, Shown
        from mmcore.server.dashboard.siblings import Siblings

        siblings = None
        if self._settings.peer_uds is not None and self._mesh is not None:
            forwarding = self._mesh.forwarding
            siblings = Siblings(lambda: forwarding.peers, f"unix:{self._settings.peer_uds.parent}/")
        return Dashboard(
            Shown(
                self._registry, self._router, self._registered, self._events, self._recent, self.record,
                lambda: self._service.ready, siblings,
            ),
            self._guard,
        )  # fmt: skip

    def _set_serving(self, *, serving: bool) -> None:
        self._serving = serving
        self._set_health(serving=serving and (self._external is None or self._external.up))

    def _set_health(self, *, serving: bool) -> None:
        self._service.ready = serving
        for service in ("", SERVICE):
            self._health.set(service, serving)

    async def _preload(self) -> None:
        """Load the models asked for; one that fails is logged and does not keep the others from being served."""
        for name, error in (await self._router.preload(self._settings.preload)).items():
            log.error("model %s was not preloaded: %s", name, error)


def _renew(guards: Iterable[Access], grants: Grants) -> None:
    for guard in guards:
        guard.renew(grants)


def _read_constraints(text: str) -> TypeConstraints:
    return TypeConstraints.of(json.loads(text))


def _open(url: str, instance: str) -> Registry:
    try:
        return open_registry(url, instance)
    except ValueError as error:
        raise InvalidSetting(f"--registry: {error}") from None


def _puller(settings: StorageSettings) -> Puller:
    cache = DiskCache(settings.cache.expanduser(), settings.cache_limit_bytes)
    return Puller(StorageConfig(settings.entries), cache, pvc_mounts=settings.pvc_mounts)


def _cache(settings: ServeSettings, external: External | None) -> Cache:
    if external is not None:
        # What it says itself is known when it is ready.
        return external_cache(external, settings.capacity_bytes, settings.cache)
    storage = settings.storage.cache.expanduser()
    return Cache(
        capacity_bytes=settings.capacity_bytes,
        device_bytes=settings.cache.device_bytes,
        load=policy_loader(settings.isolate, network=settings.worker_network),
        loader_threads=settings.cache.loader_threads,
        eviction=settings.cache.eviction,
        min_residency_s=settings.cache.min_residency_s,
        idle_timeout_s=settings.cache.idle_timeout_s,
        # Beside the pulled models, where there are any: an instance without makes no folder.
        sizes_file=storage / "sizes.json" if storage.is_dir() else None,
    )


def run(settings: ServeSettings) -> int:
    """Run one instance, or several workers, until told to end; the exit code: 0 drained, 1 failed or ended at once."""
    return run_workers(settings, run_one) if settings.workers > 1 else run_one(settings)


def run_one(settings: ServeSettings) -> int:
    """The same for one instance in this process."""
    keep_freed_memory()
    take_short_turns()
    logs.switches.requests = settings.log_requests
    logs.configure(settings.log_level, settings.log_format)
    log.info(
        "mmcore %s, capacity %d bytes", mmcore.__version__, settings.capacity_bytes,
        extra=logs.event("starting", version=mmcore.__version__, capacity_bytes=settings.capacity_bytes),
    )  # fmt: skip
    return run_until_told(lambda: Node(settings), settings.event_loop, settings.grace_s)
