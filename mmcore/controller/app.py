"""The controller as a process: what it follows, what it works on, and for how long."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Collection, Coroutine, Mapping
from functools import partial
from typing import Any, Final

from mmcore.controller.api import Api
from mmcore.controller.events import Events
from mmcore.controller.informer import Informer
from mmcore.controller.known import Installation, Known
from mmcore.controller.leader import Leader
from mmcore.controller.mesh import Mesh, NoInstance
from mmcore.controller.mesh_tls import tls_of
from mmcore.controller.model_reconciler import SOURCES, ModelReconciler
from mmcore.controller.namespace_reconciler import NamespaceReconciler
from mmcore.controller.objects import (
    CLUSTER_SERVING_RUNTIME,
    CONFIG_MAP,
    INFERENCE_SERVICE,
    NAMESPACE,
    POD,
    PREDICTOR,
    SECRET,
    SERVING_RUNTIME,
    Kind,
    Object,
    Ref,
    at,
    ref,
)
from mmcore.controller.pods import is_ready
from mmcore.controller.serving_config import CONFIG_KEY, CONFIG_MAP_NAME, DEFAULTS_KEY, ConfigError, ServingConfig
from mmcore.controller.work_queue import WorkQueue
from mmcore.errors import RpcError
from mmcore.metrics import Exposition

log = logging.getLogger(__name__)

LEASE_NAME: Final = "modelmesh-controller-leader-lock"
_WORKERS: Final = 16
#: How often everything is looked at without a reason; it costs no request where nothing differs.
_RESYNC_S: Final = 600.0

#: A kind's name, and which object.
_Key = tuple[str, Ref]


class Controller:
    """One candidate that works while it leads; ``ready`` is set when all objects are known."""

    def __init__(self, api: Api, installation: Installation, *, elect: bool = True) -> None:
        self.ready = asyncio.Event()
        self._api = api
        self._installation = installation
        self._elect = elect
        self._standing_by = False
        self.queue: WorkQueue[_Key] = WorkQueue(self._work)
        self._events = Events(api, installation.namespace)
        self._known = Known(api, installation, self._changed)
        self._meshes: dict[str, Mesh] = {}
        self._models = ModelReconciler(api, self._known, self._mesh, self._events)
        self._namespaces = NamespaceReconciler(api, self._known, self._events, self._look_at_models)
        self._sources = {source.kind.name: source for source in SOURCES}
        #: What starts tasks that end with the lead, and the one that follows the secrets of stores.
        self._start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]] | None = None
        self._following_stores: asyncio.Task[None] | None = None

    @property
    def requests(self) -> Mapping[tuple[str, str], int]:
        """Requests to the API server so far, by method and plural of the kind; watches are not counted."""
        return self._api.requests

    def metrics(self) -> bytes:
        """What it counts, as Prometheus reads it."""
        told, prefix = Exposition(), "mmcore_controller_"
        working = int(self.ready.is_set())
        told.value(f"{prefix}working", "gauge", "Whether this process leads and knows all objects.", working)
        requests = [
            ({"method": method, "resource": plural}, count) for (method, plural), count in self.requests.items()
        ]
        told.values(f"{prefix}requests_total", "counter", "Requests to the API server but for watches.", requests)
        told.value(f"{prefix}queue", "gauge", "Objects that wait for a turn.", len(self.queue))
        told.value(f"{prefix}turns_total", "counter", "Objects looked at.", self.queue.turns)
        told.value(f"{prefix}failed_turns_total", "counter", "Looks that failed.", self.queue.failed_turns)
        objects = [({"resource": one.kind.plural}, len(one.items)) for one in self._known.models]
        told.values(f"{prefix}objects", "gauge", "Objects that models are described by.", objects)
        return told.text()

    def is_ready(self) -> bool:
        """Whether it works, or would if the one that leads went away."""
        return self._standing_by or self.ready.is_set()

    async def run(self) -> None:
        """Lead and work until cancelled.

        Raises:
            ApiError: no API server is configured, or it refuses us.
            LeaseLost: another leads.
        """
        await self._api.connect()
        try:
            if not self._elect:
                await self._lead()
                return
            identity = f"{socket.gethostname()}_{os.urandom(4).hex()}"
            leader = Leader(self._api, Ref(self._installation.namespace, LEASE_NAME), identity)
            self._standing_by = True
            await leader.acquire()
            self._standing_by = False
            log.info("leading as %s", identity)
            await _first_of(leader.hold(), self._lead())
        finally:
            await self._events.close()
            for mesh in self._meshes.values():
                await mesh.close()
            await self._api.close()

    async def _lead(self) -> None:
        informers = await self._known.informers()
        async with asyncio.TaskGroup() as group:
            stores = self._known.storage_secrets
            tasks = {
                informer: group.create_task(informer.run(), name=f"follow {informer.kind.plural}")
                for informer in informers
            }
            for informer in informers:
                await informer.synced.wait()
            self._following_stores = tasks[stores]
            self._start = group.create_task
            self._read_config()
            self._look_at_all()
            group.create_task(self.queue.run(_WORKERS), name="work")
            group.create_task(self._resync(), name="look at all")
            log.info("following %d kinds of objects", len(informers))
            self.ready.set()

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(_RESYNC_S)
            self._look_at_all()

    async def _work(self, key: _Key) -> float | None:
        kind, where = key
        if kind == NAMESPACE.name:
            return await self._namespaces.reconcile(where.name, self._mesh(where.name))
        if kind == SERVING_RUNTIME.name:
            await self._namespaces.validate(SERVING_RUNTIME, self._known.runtimes, where)
            return None
        if kind == CLUSTER_SERVING_RUNTIME.name:
            await self._namespaces.validate(CLUSTER_SERVING_RUNTIME, self._known.cluster_runtimes, where)
            return None
        if kind == Mesh.__name__:
            await self._let_orphans_go(where.name)
            return None
        return await self._models.reconcile(self._sources[kind], where)

    def _mesh(self, namespace: str) -> Mesh:
        mesh = self._meshes.get(namespace)
        if mesh is None:
            credentials = partial(tls_of, self._api, lambda: self._known.config, namespace)
            mesh = Mesh(namespace, lambda names: self._moved(namespace, names), credentials)
            self._meshes[namespace] = mesh
        return mesh

    # What leads to work.

    def _changed(self, kind: Kind, before: Object | None, after: Object | None) -> None:
        if not self.ready.is_set():
            return
        item = after if after is not None else before
        assert item is not None
        where = ref(item)
        react = self._reactions.get(kind.name)
        if react is not None:
            react(self, before, after, where)
        elif where.namespace:
            self.queue.add((NAMESPACE.name, Ref("", where.namespace)))

    def _model_changed(self, kind: Kind, before: Object | None, after: Object | None, where: Ref) -> None:
        self.queue.add((kind.name, where))
        if (
            before is None
            or after is None
            or before["metadata"].get("generation") != after["metadata"].get("generation")
        ):
            self.queue.add((NAMESPACE.name, Ref("", where.namespace)))
            # One that could not have this name may have it now.
            other = INFERENCE_SERVICE if kind is PREDICTOR else PREDICTOR
            if after is None:
                self.queue.add((other.name, where))

    def _runtime_changed(self, kind: Kind, before: Object | None, after: Object | None, where: Ref) -> None:
        self.queue.add((kind.name, where))
        if before is not None and after is not None and _same_spec(before, after):
            return
        for namespace in [where.namespace] if where.namespace else self._known.enabled_namespaces():
            self._look_at(namespace)

    def _namespace_changed(self, before: Object | None, after: Object | None, where: Ref) -> None:
        if before is None or after is None or before.get("metadata") != after.get("metadata"):
            self._look_at(where.name)

    def _pod_changed(self, before: Object | None, after: Object | None, where: Ref) -> None:
        self.queue.add((NAMESPACE.name, Ref("", where.namespace)))
        was, now = before is not None and is_ready(before), after is not None and is_ready(after)
        if was != now or not now:
            self._look_at_models(where.namespace)

    def _secret_changed(self, before: Object | None, after: Object | None, where: Ref) -> None:
        if where.name == self._installation.etcd_secret and where.namespace == self._installation.namespace:
            for namespace in self._known.enabled_namespaces():
                self.queue.add((NAMESPACE.name, Ref("", namespace)))
            return
        self.queue.add((NAMESPACE.name, Ref("", where.namespace)))
        if where.name == self._known.storage_secret:
            self._models.retry_soon(where.namespace)
            self._look_at_models(where.namespace)

    def _config_changed(self, before: Object | None, after: Object | None, where: Ref) -> None:
        if not where.name.startswith(CONFIG_MAP_NAME):
            self.queue.add((NAMESPACE.name, Ref("", where.namespace)))
        elif self._read_config():
            self._look_at_all()

    _reactions: Final[dict[str, Callable[[Controller, Object | None, Object | None, Ref], None]]] = {
        PREDICTOR.name: lambda self, *change: self._model_changed(PREDICTOR, *change),
        INFERENCE_SERVICE.name: lambda self, *change: self._model_changed(INFERENCE_SERVICE, *change),
        SERVING_RUNTIME.name: lambda self, *change: self._runtime_changed(SERVING_RUNTIME, *change),
        CLUSTER_SERVING_RUNTIME.name: lambda self, *change: self._runtime_changed(CLUSTER_SERVING_RUNTIME, *change),
        NAMESPACE.name: lambda self, *change: self._namespace_changed(*change),
        POD.name: lambda self, *change: self._pod_changed(*change),
        SECRET.name: lambda self, *change: self._secret_changed(*change),
        CONFIG_MAP.name: lambda self, *change: self._config_changed(*change),
    }

    def _moved(self, namespace: str, names: Collection[str] | None) -> None:
        """Instances told of changed vmodels, or for the first time of all: None."""
        if names is None:
            self._look_at_models(namespace)
            self.queue.add((Mesh.__name__, Ref("", namespace)))
            return
        for name in names:
            where = Ref(namespace, name)
            informers = [one for one in self._known.models if where in one.items]
            for informer in informers:
                self.queue.add((informer.kind.name, where))
            if not informers:
                self.queue.add((Mesh.__name__, Ref("", namespace)))

    def _look_at_all(self) -> None:
        for kind, informer in (
            (SERVING_RUNTIME, self._known.runtimes),
            (CLUSTER_SERVING_RUNTIME, self._known.cluster_runtimes),
        ):
            for where in informer.items:
                self.queue.add((kind.name, where))
        namespaces = {where.name for where in self._known.namespaces.items} or {self._installation.namespace}
        for namespace in namespaces:
            self._look_at(namespace)

    def _look_at(self, namespace: str) -> None:
        self.queue.add((NAMESPACE.name, Ref("", namespace)))
        self._look_at_models(namespace)

    def _look_at_models(self, namespace: str) -> None:
        for informer in self._known.models:
            for item in informer.of(namespace):
                self.queue.add_later((informer.kind.name, ref(item)))

    def _read_config(self) -> bool:
        """Take the configuration over; one that cannot be used leaves the last one in force."""
        known, namespace = self._known, self._installation.namespace
        user = known.user_config.get(namespace, CONFIG_MAP_NAME)
        defaults = known.default_config.get(namespace, f"{CONFIG_MAP_NAME}-defaults")
        try:
            texts = []
            if defaults is not None:
                texts.append(at(defaults, "data", DEFAULTS_KEY) or "")
            if user is not None:
                text = at(user, "data", CONFIG_KEY)
                if text is None:
                    raise ConfigError(f"the ConfigMap {CONFIG_MAP_NAME} has no key {CONFIG_KEY}")
                texts.append(text)
            config = ServingConfig.read(*texts)
        except ConfigError as error:
            log.error("the configuration is not used: %s", error)
            if user is not None:
                self._events.warn(user, "InvalidConfiguration", str(error))
            return False
        if user is not None:
            for notice in config.notices:
                self._events.warn(user, "WithoutEffect", notice)
        changed, known.config = config != known.config, config
        if changed:
            known.forget_selections()
        if config.storage_secret != known.storage_secret and self._start is not None:
            if self._following_stores is not None:
                self._following_stores.cancel()
            self._following_stores = self._start(known.follow_stores(config.storage_secret).run())
        return changed

    async def _let_orphans_go(self, namespace: str) -> None:
        """Delete vmodels whose objects are gone: nobody could be told when they were deleted."""
        mesh = self._mesh(namespace)
        if not mesh.listed or not self._known.enabled(namespace):
            return
        informers = {source.owner: self._known_of(source.kind) for source in SOURCES}
        for name, status in list(mesh.vmodels.items()):
            informer = informers.get(status.owner)
            if informer is not None and Ref(namespace, name) not in informer.items:
                log.info("deleting the vmodel %s of %s, whose object is gone", name, namespace)
                try:
                    await mesh.delete_vmodel(name, status.owner)
                except (NoInstance, RpcError) as error:
                    log.warning("the vmodel %s of %s was not deleted: %s", name, namespace, error)

    def _known_of(self, kind: Kind) -> Informer:
        return self._known.predictors if kind is PREDICTOR else self._known.inference_services


def _same_spec(before: Object, after: Object) -> bool:
    generations = [one["metadata"].get("generation") for one in (before, after)]
    stated = [one["metadata"].get("annotations") for one in (before, after)]
    return bool(generations[0] == generations[1] and stated[0] == stated[1])


async def _first_of(*works: object) -> None:
    """Run works together until the first ends, and end the others."""
    tasks = [asyncio.ensure_future(work) for work in works]  # type: ignore[call-overload]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
