"""A cluster for tests: an API server, the controller, and a kubelet that runs instances as processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from mmcore.controller.api import Api, ApiError
from mmcore.controller.app import Controller
from mmcore.controller.known import Installation
from mmcore.controller.objects import (
    CLUSTER_SERVING_RUNTIME,
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
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
)
from tests.api_servers import ApiServer, secret
from tests.etcds import free_port
from tests.kubelet import Kubelet

WITHIN_S = 40.0
KINDS = {
    kind.name: kind
    for kind in (PREDICTOR, INFERENCE_SERVICE, SERVING_RUNTIME, CLUSTER_SERVING_RUNTIME, CONFIG_MAP, SECRET, NAMESPACE)
}

#: One instance a runtime, none before the first model; on ports that nothing else has.
CONFIG: dict[str, Any] = {"podsPerRuntime": 1, "scaleToZero": {"enabled": True, "gracePeriodSeconds": 1}}


class Cluster:
    """What a test does with a cluster.

    Attributes:
        namespace: the controller's own.
        api: the API server, as its administrator.
        claims: the folder of the volume claim ``models``, below which models lie.
    """

    def __init__(self, server: ApiServer, folder: Path, namespace: str) -> None:
        self.namespace = namespace
        self.api = Api(server.kubeconfig)
        self.server = server
        self.folder = folder
        self.claims = folder / "claims"
        self.models = self.claims / "models"
        self.models.mkdir(parents=True)
        (folder / "pods").mkdir()
        self.kubelet = Kubelet(Api(server.kubeconfig), folder / "pods", self.claims, namespace)
        self.grpc_port, rest, metrics = free_port(), free_port(), free_port()
        self.config = {
            **CONFIG,
            "inferenceServicePort": self.grpc_port,
            "restProxy": {"port": rest},
            "metrics": {"port": metrics},
        }

    async def close(self) -> None:
        await self.api.close()
        await self.kubelet.close()

    async def apply(self, item: Object | str) -> Object:
        """Apply an object; its namespace is the controller's where it states none."""
        made: Object = yaml.safe_load(item) if isinstance(item, str) else item
        kind = KINDS[made["kind"]]
        if kind.namespaced:
            made["metadata"].setdefault("namespace", self.namespace)
        return await self.api.apply(kind, made)

    async def configure(self, **changes: Any) -> None:
        """Write the user's configuration."""
        self.config |= changes
        await self.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "model-serving-config"},
                "data": {"config.yaml": yaml.safe_dump(self.config)},
            }
        )

    async def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        """An object, None where there is none."""
        try:
            return await self.api.get(kind, Ref(namespace or self.namespace, name))
        except ApiError as error:
            if error.missing:
                return None
            raise

    async def until(
        self, kind: Kind, name: str, fits: Callable[[Object], object], namespace: str = "", within_s: float = WITHIN_S
    ) -> Object:
        """Wait until an object is so; what it was instead is in the failure."""
        found: Object | None = None
        try:
            async with asyncio.timeout(within_s):
                while True:
                    found = await self.get(kind, name, namespace)
                    if found is not None and fits(found):
                        return found
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(
                f"{kind.name} {name} is {yaml.safe_dump((found or {}).get('status') or found)}"
            ) from None

    async def until_gone(self, kind: Kind, name: str, namespace: str = "") -> None:
        """Wait until an object is not there any more."""
        async with asyncio.timeout(WITHIN_S):
            while await self.get(kind, name, namespace) is not None:
                await asyncio.sleep(0.05)

    async def delete(self, kind: Kind, name: str, namespace: str = "") -> None:
        await self.api.delete(kind, Ref(namespace or self.namespace, name))

    async def replicas(self, runtime: str) -> int:
        """How many pods a runtime is to have."""
        found = await self.get(DEPLOYMENT, f"modelmesh-serving-{runtime}")
        assert found is not None
        return int(found["spec"]["replicas"])

    async def events(self, name: str) -> list[tuple[str, str]]:
        """Reasons and messages of the Events on an object."""
        items, _ = await self.api.list(EVENT, self.namespace, fieldSelector=f"involvedObject.name={name}")
        return [(item["reason"], item["message"]) for item in items]

    async def instance(self, namespace: str = "") -> str:
        """The address of a ready instance."""
        items, _ = await self.api.list(POD, namespace or self.namespace)
        ready = [item for item in items if at(item, "status", "podIP")]
        return f"{ready[0]['status']['podIP']}:{self.grpc_port}"


def predictor(name: str, path: str, *, model_type: str = "python", **spec: Any) -> Object:
    """A Predictor of a model in the claim ``models``."""
    storage = {"path": path, "parameters": {"type": "pvc", "name": "models"}}
    return {
        "apiVersion": PREDICTOR.api_version,
        "kind": "Predictor",
        "metadata": {"name": name},
        "spec": {"modelType": {"name": model_type}, "storage": storage, **spec},
    }


def runtime(name: str = "own", *formats: str, kind: str = "ServingRuntime", **spec: Any) -> Object:
    """A runtime that is instances alone."""
    listed = [{"name": one, "autoSelect": True} for one in formats or ("python",)]
    return {
        "apiVersion": SERVING_RUNTIME.api_version,
        "kind": kind,
        "metadata": {"name": name},
        "spec": {
            "multiModel": True,
            "supportedModelFormats": listed,
            "protocolVersions": ["grpc-v2"],
            "builtInAdapter": {"serverType": "mmcore"},
            "containers": [{"name": "mmcore", "resources": {"limits": {"memory": "1Gi"}}}],
            **spec,
        },
    }


@asynccontextmanager
async def running(server: ApiServer, folder: Path, *, cluster_scope: bool = False) -> AsyncIterator[Cluster]:
    """A cluster in a namespace of its own."""
    namespace = f"serving-{os.urandom(4).hex()}"
    cluster = Cluster(server, folder, namespace)
    await cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    connection = {"endpoints": server.etcd.url, "root_prefix": namespace}
    await cluster.apply(secret(namespace, "model-serving-etcd", etcd_connection=connection))
    await cluster.apply(secret(namespace, "storage-config", models={"type": "pvc", "name": "models"}))
    await cluster.configure()
    server.grant(namespace, cluster_scope=cluster_scope)
    controller = Controller(Api(server.controller_kubeconfig), Installation(namespace, cluster=cluster_scope))
    tasks = [asyncio.ensure_future(work) for work in (cluster.kubelet.run(), controller.run())]
    try:
        started = asyncio.ensure_future(controller.ready.wait())
        await asyncio.wait([started, *tasks], timeout=WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            assert not task.done() or task.result() is None, task
        assert started.done(), "the controller does not know all objects"
        yield cluster
        for task in tasks:
            assert not task.done() or task.result() is None, task
    finally:
        for task in reversed(tasks):
            task.cancel()
            await asyncio.wait([task])
        await cluster.close()
