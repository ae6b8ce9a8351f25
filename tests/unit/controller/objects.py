"""Objects that the controller's unit tests start from."""

from __future__ import annotations

from typing import Any

from mmcore.controller.objects import SERVING_RUNTIME, Kind, Object
from mmcore.controller.runtimes import Runtime


def serving_runtime(name: str = "triton-2.x", **spec: Any) -> Object:
    """A runtime of another server, with the SPI adapter for it."""
    stated: Object = {
        "multiModel": True,
        "supportedModelFormats": [{"name": "onnx", "version": "1", "autoSelect": True}],
        "protocolVersions": ["grpc-v2"],
        "builtInAdapter": {"serverType": "triton", "runtimeManagementPort": 8001, "memBufferBytes": 134217728},
        "containers": [
            {"name": "triton", "image": "registry:5000/triton@sha256:0", "resources": {"limits": {"memory": "1Gi"}}}
        ],
        **spec,
    }
    metadata = {"name": name, "namespace": "models", "uid": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {
        "apiVersion": SERVING_RUNTIME.api_version,
        "kind": "ServingRuntime",
        "metadata": {**metadata, "annotations": {}},
        "spec": {key: value for key, value in stated.items() if value is not None},
    }


def runtime(name: str = "triton-2.x", *, kind: Kind = SERVING_RUNTIME, created: str = "", **spec: Any) -> Runtime:
    """The same as it counts."""
    item = serving_runtime(name, **spec)
    if created:
        item["metadata"]["creationTimestamp"] = created
    return Runtime.of(item, kind)


def own_runtime(name: str = "mmcore", *formats: str, **spec: Any) -> Runtime:
    """A runtime that is instances alone."""
    return runtime(
        name,
        supportedModelFormats=[{"name": one, "autoSelect": True} for one in formats or ("sklearn",)],
        builtInAdapter={"serverType": "mmcore"},
        containers=[{"name": "mmcore", "resources": {"limits": {"memory": "2Gi"}, "requests": {"cpu": "1"}}}],
        **spec,
    )
