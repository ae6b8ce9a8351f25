"""Serving runtimes: what a ``ServingRuntime`` or ``ClusterServingRuntime`` says, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mmcore.adapters import open_runtime
from mmcore.controller import adapter_limits
from mmcore.controller.objects import CLUSTER_SERVING_RUNTIME, SERVING_RUNTIME, Kind, Object, annotations_of, at
from mmcore.controller.quantities import quantity
from mmcore.controller.runtime_address import runtime_address, valid_endpoint
from mmcore.controller.serving_config import ServingConfig

#: The server type of runtimes that are instances themselves, without another server; and the name of the container
#: whose image, resources and environment an instance takes over where a runtime has one.
OWN: Final = "mmcore"
#: The variable of an instance that says what models may take.
CAPACITY: Final = "MMCORE_CAPACITY"
#: The port that instances pass requests on to each other at.
PEER_PORT: Final = 8043

AUTOSCALER_CLASS: Final = "serving.kserve.io/autoscalerClass"
AUTOSCALER_METRIC: Final = "serving.kserve.io/metrics"
TARGET_UTILIZATION: Final = "serving.kserve.io/targetUtilizationPercentage"
TARGET_AVERAGE: Final = "serving.kserve.io/targetAverageValue"
MIN_SCALE: Final = "serving.kserve.io/min-scale"
MAX_SCALE: Final = "serving.kserve.io/max-scale"

#: Volumes of instances, and names that Services find ports by.
_OWN_VOLUMES: Final = (
    *("storage-config", "etcd-config", "tc-config", "tls-certs", "domain-socket", "models-dir", "mmcore-tmp"),
)
_OWN_PORT_NAMES: Final = ("grpc", "http", "prometheus", "peer")


@dataclass(frozen=True, slots=True)
class Format:
    """A format of models that a runtime serves; models that name no runtime may come to it if ``auto_select``."""

    name: str
    version: str = ""
    auto_select: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime as it counts in one namespace.

    Attributes:
        kind: which of the two kinds it is.
        resource: the object.
        server_type: whose adapter it needs, :data:`OWN` for none; empty where it speaks the ModelRuntime SPI.
        created: when, as the API server writes it, which sorts by time.
    """

    name: str
    kind: Kind
    resource: Object
    formats: tuple[Format, ...]
    protocols: tuple[str, ...]
    multi_model: bool
    disabled: bool
    server_type: str
    created: str

    @classmethod
    def of(cls, resource: Object, kind: Kind) -> Runtime:
        """As the object says; what its schema forbids does not come here."""
        spec = resource.get("spec") or {}
        return cls(
            name=resource["metadata"]["name"],
            kind=kind,
            resource=resource,
            formats=tuple(
                Format(
                    entry["name"],
                    str(entry.get("version") or ""),
                    bool(entry.get("autoSelect")),
                    int(entry.get("priority") or 0),
                )
                for entry in spec.get("supportedModelFormats") or []
            ),
            protocols=tuple(spec.get("protocolVersions") or []),
            multi_model=bool(spec.get("multiModel")),
            disabled=bool(spec.get("disabled")),
            server_type=str(at(spec, "builtInAdapter", "serverType") or ""),
            created=str(at(resource, "metadata", "creationTimestamp") or ""),
        )

    @property
    def spec(self) -> Object:
        """The object's ``spec``."""
        spec: Object = self.resource.get("spec") or {}
        return spec

    @property
    def containers(self) -> list[Object]:
        """The containers that stand beside the instance."""
        return [one for one in self.spec.get("containers") or [] if one.get("name") != OWN]

    @property
    def own_container(self) -> Object:
        """What it says about the instance's container itself; empty where it says nothing."""
        return next((one for one in self.spec.get("containers") or [] if one.get("name") == OWN), {})

    @property
    def label(self) -> str:
        """The label of its instances alone."""
        return f"rt:{self.name}"


def effective_runtimes(namespaced: Iterable[Object], cluster: Iterable[Object]) -> list[Runtime]:
    """The runtimes of a namespace by name: its own, and those of the cluster that it has none of the same name of.

    A namespace's own runtime goes before the cluster's even when it is disabled.
    """
    found = {one["metadata"]["name"]: Runtime.of(one, CLUSTER_SERVING_RUNTIME) for one in cluster}
    found |= {one["metadata"]["name"]: Runtime.of(one, SERVING_RUNTIME) for one in namespaced}
    return [found[name] for name in sorted(found)]


def problems(runtime: Runtime, config: ServingConfig) -> list[str]:
    """What forbids to run a runtime, each as a sentence that says what to change."""
    found = [
        *_server_problems(runtime, config),
        *adapter_limits.problems(runtime),
        *_name_problems(runtime),
        *_autoscaler_problems(runtime),
    ]
    taken = {config.grpc_port, config.metrics_port, PEER_PORT, *filter(None, [config.rest_port])}
    for container in runtime.containers:
        for port in container.get("ports") or []:
            if port.get("containerPort") in taken:
                found.append(f"container '{container['name']}': port {port['containerPort']} is the instance's own")
            if port.get("name") in _OWN_PORT_NAMES:
                found.append(f"container '{container['name']}': the port name '{port['name']}' is the instance's own")
        for part in ("limits", "requests"):
            for name, value in (at(container, "resources", part) or {}).items():
                try:
                    quantity(value)
                except ValueError as error:
                    found.append(f"container '{container['name']}': resources.{part}.{name}: {error}")
    return found


def _server_problems(runtime: Runtime, config: ServingConfig) -> list[str]:
    names = [container["name"] for container in runtime.containers]
    server = runtime.server_type
    if server == OWN:
        return [f"serverType {OWN} needs no other container, and this has {', '.join(names)}"] if names else []
    if not names:
        return [f"it has no container; for the formats that instances serve themselves say serverType: {OWN}"]
    found = []
    if server:
        if server not in config.server_types:
            known = ", ".join(config.server_types)
            found.append(f"builtInAdapter.serverType '{server}' is not one of builtInServerTypes: {known}")
        elif not _has_adapter(runtime):
            found.append(f"instances have no adapter for builtInAdapter.serverType '{server}'")
        if server not in names:
            found.append(f"builtInAdapter.serverType is '{server}', and no container has that name")
        elif not _states_memory(runtime):
            found.append(
                f"container '{server}' states no memory: from its resources.limits.memory follows what models may take"
            )
    elif not runtime.spec.get("grpcEndpoint"):
        found.append("grpcEndpoint is missing: without builtInAdapter the server must speak the ModelRuntime SPI")
    for field in ("grpcEndpoint", "grpcDataEndpoint"):
        endpoint = runtime.spec.get(field)
        if endpoint and not valid_endpoint(endpoint):
            found.append(f"{field} must be port:NUMBER or unix:PATH, not '{endpoint}'")
    return found


def _states_memory(runtime: Runtime) -> bool:
    """Whether it is known what the models of a server may take, which no server with an adapter tells."""
    if any(entry.get("name") == CAPACITY for entry in at(runtime.spec, "builtInAdapter", "env") or []):
        return True
    server = next(one for one in runtime.containers if one["name"] == runtime.server_type)
    return any(at(server, "resources", part, "memory") for part in ("limits", "requests"))


def _has_adapter(runtime: Runtime) -> bool:
    try:
        open_runtime(runtime_address(runtime) or "")
    except ValueError:
        return False
    return True


def _name_problems(runtime: Runtime) -> list[str]:
    spec = runtime.spec
    names = [one["name"] for one in (*(spec.get("initContainers") or []), *(spec.get("containers") or []))]
    found = [f"two containers are named '{name}'" for name in sorted({one for one in names if names.count(one) > 1})]
    for volume in runtime.spec.get("volumes") or []:
        if volume["name"] in _OWN_VOLUMES:
            found.append(f"the volume name '{volume['name']}' is the instance's own")
    return found


def _autoscaler_problems(runtime: Runtime) -> list[str]:
    stated = annotations_of(runtime.resource)
    scaler = stated.get(AUTOSCALER_CLASS, "none")
    if scaler == "none":
        return []
    if scaler not in ("hpa", "external"):
        return [f"annotation {AUTOSCALER_CLASS} must be hpa, external or none, not '{scaler}'"]
    found = []
    if runtime.spec.get("replicas") is not None:
        found.append(f"replicas must not be set with {AUTOSCALER_CLASS}: {scaler}; use {MIN_SCALE} and {MAX_SCALE}")
    bounds = []
    for name in (MIN_SCALE, MAX_SCALE):
        text = stated.get(name, "1" if name == MIN_SCALE else stated.get(MIN_SCALE, "1"))
        if text.isdigit() and int(text) >= 1:
            bounds.append(int(text))
        else:
            found.append(f"annotation {name} must be a whole number from 1, not '{text}'")
    if len(bounds) == 2 and bounds[0] > bounds[1]:
        found.append(f"annotation {MIN_SCALE} is above {MAX_SCALE}: {bounds[0]} and {bounds[1]}")
    target = stated.get(TARGET_UTILIZATION, "80")
    if not (target.isdigit() and 1 <= int(target) <= 100):
        found.append(f"annotation {TARGET_UTILIZATION} must be a whole number from 1 to 100, not '{target}'")
    metric = stated.get(AUTOSCALER_METRIC, "cpu")
    if metric not in ("cpu", "memory"):
        if not metric.startswith("mmcore_"):
            found.append(f"annotation {AUTOSCALER_METRIC} must be cpu, memory or a metric mmcore_…, not '{metric}'")
        try:
            quantity(stated.get(TARGET_AVERAGE, ""))
        except ValueError:
            found.append(f"annotation {TARGET_AVERAGE} must say what of {metric} one pod may have")
    return found
