"""A cluster for tests: an API server, the controller, and a kubelet that runs instances as processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmcore._ext.v2codec import decode_infer_response, encode_infer_request
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
    PERSISTENT_VOLUME_CLAIM,
    POD,
    PREDICTOR,
    SECRET,
    SERVING_RUNTIME,
    Kind,
    Object,
    Ref,
    at,
)
from mmcore.transport import Channel
from tests.api_servers import ApiServer, secret
from tests.etcds import free_port
from tests.kubelet import Kubelet

WITHIN_S = 40.0
KINDS = {
    kind.name: kind
    for kind in (
        PREDICTOR,
        INFERENCE_SERVICE,
        SERVING_RUNTIME,
        CLUSTER_SERVING_RUNTIME,
        CONFIG_MAP,
        SECRET,
        NAMESPACE,
        PERSISTENT_VOLUME_CLAIM,
    )
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
        self.grpc_port, self.rest_port, metrics = free_port(), free_port(), free_port()
        self.controller: Controller | None = None
        self._cluster_scope = False
        self._working: asyncio.Task[None] | None = None
        self.config = {
            **CONFIG,
            "inferenceServicePort": self.grpc_port,
            "restProxy": {"port": self.rest_port},
            "metrics": {"port": metrics},
        }

    async def close(self) -> None:
        await self.api.close()
        await self.kubelet.close()

    async def prepare(self, *, cluster_scope: bool) -> None:
        """Make what a controller finds: its namespace, its secrets, its configuration and its rights."""
        namespace, server = self.namespace, self.server
        self._cluster_scope = cluster_scope
        await self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        connection = {"endpoints": server.etcd.url, "root_prefix": namespace}
        await self.apply(secret(namespace, "model-serving-etcd", etcd_connection=connection))
        await self.apply(secret(namespace, "storage-config", models={"type": "pvc", "name": "models"}))
        await self.configure()
        server.grant(namespace, cluster_scope=cluster_scope)

    async def start_controller(self) -> None:
        """Start one, and wait until it knows all objects."""
        installation = Installation(self.namespace, cluster=self._cluster_scope)
        self.controller = Controller(Api(self.server.controller_kubeconfig), installation)
        self._working = asyncio.ensure_future(self.controller.run())
        started = asyncio.ensure_future(self.controller.ready.wait())
        await asyncio.wait([started, self._working], timeout=WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
        self.check_controller()
        assert started.done(), "the controller does not know all objects"

    async def stop_controller(self) -> None:
        """End it; nothing where there is none."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait([self._working])
            self._working = None

    def check_controller(self) -> None:
        """Fail with what it failed with."""
        assert self._working is None or not self._working.done(), self._working.result()

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
        """The host of a ready instance."""
        items, _ = await self.api.list(POD, namespace or self.namespace)
        ready: list[str] = [item["status"]["podIP"] for item in items if at(item, "status", "podIP")]
        return ready[0]

    async def ask(self, model: str, value: Any, *, name: str = "X", datatype: str = "FP32", namespace: str = "") -> Any:
        """A model's first output for one input, over gRPC; RpcError where it is refused."""
        channel = Channel(f"{await self.instance(namespace)}:{self.grpc_port}")
        try:
            request = encode_infer_request(model, [(name, datatype, value)])
            body = await channel.unary("/inference.GRPCInferenceService/ModelInfer", request, timeout_s=10)
        finally:
            await channel.close()
        return decode_infer_response(body).outputs[0].array()


def inference_service(name: str, block: Object, **annotations: str) -> Object:
    """An InferenceService that asks for this controller unless an annotation says otherwise."""
    stated = {"deploymentMode": "ModelMesh", **annotations}
    marks = {f"serving.kserve.io/{key}": value for key, value in stated.items()}
    return {
        "apiVersion": INFERENCE_SERVICE.api_version,
        "kind": INFERENCE_SERVICE.name,
        "metadata": {"name": name, "annotations": marks},
        "spec": {"predictor": block},
    }


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
    await cluster.prepare(cluster_scope=cluster_scope)
    kubelet = asyncio.ensure_future(cluster.kubelet.run())
    try:
        await cluster.start_controller()
        yield cluster
        cluster.check_controller()
        assert not kubelet.done(), kubelet.result()
    finally:
        await cluster.stop_controller()
        kubelet.cancel()
        await asyncio.wait([kubelet])
        await cluster.close()


def state(name: str, target: str = "") -> Callable[[Object], bool]:
    """Whether a Predictor's active model, and its target, are in these states."""

    def fits(item: Object) -> bool:
        status = item.get("status") or {}
        return status["activeModelState"] == name and (status.get("targetModelState") or "") == target

    return fits


def failed(reason: str) -> Callable[[Object], bool]:
    """Whether the last failure of a Predictor has this reason."""
    return lambda item: at(item, "status", "lastFailureInfo", "reason") == reason


async def infer(cluster: Cluster, model: str, value: float, namespace: str = "") -> float:
    """What a model of one number answers, over gRPC."""
    [answer] = await cluster.ask(model, np.array([value], dtype=np.float32), namespace=namespace)
    return float(answer)
