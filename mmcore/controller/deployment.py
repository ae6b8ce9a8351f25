"""A runtime's Deployment: one instance beside the runtime's containers, or alone.

All of it follows from the runtime, the configuration and the volume claims: what does not change there changes nothing
in the pods, so that an upgrade of the controller restarts none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from mmcore.config import CAPACITY_SHARE
from mmcore.controller import adapter_limits
from mmcore.controller.objects import DEPLOYMENT, MANAGER, SERVICE_LABEL, Object, at, owner_reference
from mmcore.controller.quantities import memory_bytes, total_memory_limit
from mmcore.controller.runtime_address import MODELS, runtime_address
from mmcore.controller.runtimes import CAPACITY, OWN, PEER_PORT, Runtime
from mmcore.controller.serving_config import ServingConfig
from mmcore.controller.type_constraints import instance_labels
from mmcore.controller.wanted import INFERENCE_SERVICE_OWNER, PREDICTOR_OWNER
from mmcore.transport.listening import EVERYWHERE

#: Who owns vmodels that others set without saying whose they are.
DEFAULT_OWNER: Final = PREDICTOR_OWNER
OWNERS: Final = (PREDICTOR_OWNER, INFERENCE_SERVICE_OWNER)

CONSTRAINTS_MAP: Final = "tc-config"
CONSTRAINTS_KEY: Final = "type_constraints"
DATAPLANE_KEY: Final = "dataplane_api_config"
ETCD_KEY: Final = "etcd_connection"
#: On pods: what their keys in etcd begin with, so that another beginning has them replaced.
ETCD_PREFIX: Final = "serving.kserve.io/etcd-prefix"

#: Seconds for calls in flight after SIGTERM, for the endpoint's removal before that, and for both and the rest.
_GRACE_S: Final = 85
_LEAVE_S: Final = 5
_TERMINATION_S: Final = 95

#: Longer than an instance waits for the server beside it, whose own words in the log then say what is missing.
_START_S: Final = 240

_CONSTRAINTS: Final = "/etc/mmcore/constraints"
_ETCD: Final = "/etc/mmcore/etcd"
_TLS: Final = "/etc/mmcore/tls"
_STORAGE: Final = "/storage-config"
_CLAIMS: Final = "/pvc_mounts"
#: Share of the folder of models that pulled files may take before the eldest go: above all of it pods are evicted.
_CACHE_SHARE: Final = 0.8
_ARCHITECTURES: Final = ("amd64", "arm64")

#: Fields of a pod that runtimes may state, as they are.
_TAKEN_OVER: Final = ("nodeSelector", "tolerations", "runtimeClassName", "priorityClassName", "hostIPC")

_HARDENED: Final = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True, slots=True)
class Place:
    """What a Deployment depends on besides its runtime.

    Attributes:
        namespace: where it is.
        etcd_secret: the name of the secret with the connection to etcd.
        claims: volume claims to mount, each read-only under its name.
        etcd_prefix: what the secret's keys in etcd begin with. Instances follow all else that the secret says, and take
            another prefix when they start.
    """

    namespace: str
    etcd_secret: str
    claims: tuple[str, ...] = ()
    etcd_prefix: str = ""


def deployment_name(config: ServingConfig, runtime: str) -> str:
    """The Deployment's name."""
    return f"{config.service_name}-{runtime}"


def common_labels() -> dict[str, str]:
    """The labels of all that the controller makes."""
    return {f"app.kubernetes.io/{key}": MANAGER for key in ("instance", "managed-by", "name")}


def pod_selector(config: ServingConfig, runtime: str) -> dict[str, str]:
    """The labels that a runtime's pods are found by."""
    return {SERVICE_LABEL: config.service_name, "name": deployment_name(config, runtime)}


def deployment(runtime: Runtime, config: ServingConfig, place: Place, replicas: int | None) -> Object:
    """The Deployment of a runtime that :func:`mmcore.controller.runtimes.problems` finds nothing wrong with.

    ``replicas`` is left to an autoscaler where it is None.
    """
    spec = runtime.spec
    chosen = pod_selector(config, runtime.name)
    labels = {**common_labels(), **chosen}
    template: Object = {
        "metadata": {
            "labels": {**config.pod_labels, **(spec.get("labels") or {}), **labels},
            "annotations": {
                **_scrape_annotations(config),
                **config.pod_annotations,
                **(spec.get("annotations") or {}),
                **({ETCD_PREFIX: place.etcd_prefix} if place.etcd_prefix else {}),
            },
        },
        "spec": _pod(runtime, config, place, chosen),
    }
    body: Object = {
        "selector": {"matchLabels": chosen},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "75%", "maxUnavailable": "15%"}},
        "template": template,
    }
    if replicas is not None:
        body["replicas"] = replicas
    return {
        "apiVersion": DEPLOYMENT.api_version,
        "kind": DEPLOYMENT.name,
        "metadata": {
            "name": deployment_name(config, runtime.name),
            "namespace": place.namespace,
            "labels": labels,
            "ownerReferences": [owner_reference(runtime.resource, runtime.kind)],
        },
        "spec": body,
    }


def _scrape_annotations(config: ServingConfig) -> dict[str, str]:
    if not config.metrics:
        return {}
    scheme = "https" if config.metrics_tls else "http"
    values = {"path": "/metrics", "port": str(config.metrics_port), "scheme": scheme, "scrape": "true"}
    return {f"prometheus.io/{key}": value for key, value in values.items()}


def _pod(runtime: Runtime, config: ServingConfig, place: Place, chosen: dict[str, str]) -> Object:
    spec = runtime.spec
    # The user's first, so that the instance's start is not held up by the pull of their images.
    beside = [_beside(one, runtime, config, place) for one in runtime.containers]
    containers = [*beside, _instance(runtime, config, place)]
    spread = {"whenUnsatisfiable": "ScheduleAnyway", "maxSkew": 1, "labelSelector": {"matchLabels": chosen}}
    pod: Object = {
        "containers": containers,
        "volumes": [*(spec.get("volumes") or []), *_volumes(runtime, config, place)],
        "terminationGracePeriodSeconds": _TERMINATION_S,
        "securityContext": {"fsGroup": 2000, **(spec.get("securityContext") or {})},
        "affinity": with_architectures(spec.get("affinity") or {}),
        "topologySpreadConstraints": [
            {"topologyKey": key, **spread} for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
        ],
    }
    pod |= {key: spec[key] for key in _TAKEN_OVER if spec.get(key)}
    if spec.get("initContainers"):
        pod["initContainers"] = [_before(one, place) for one in spec["initContainers"]]
    if config.service_account:
        pod["serviceAccountName"] = config.service_account
    secrets = [*config.pull_secrets, *(one["name"] for one in spec.get("imagePullSecrets") or [])]
    if secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in dict.fromkeys(secrets)]
    return pod


def _before(container: Object, place: Place) -> Object:
    """A container that ends before the others start; it may put files among the models."""
    mounts = [
        {"name": "models-dir", "mountPath": MODELS},
        *_claim_mounts(place),
        *(container.get("volumeMounts") or []),
    ]
    return {"securityContext": {"capabilities": {"drop": ["ALL"]}}, **container, "volumeMounts": mounts}


def with_architectures(affinity: Object) -> Object:
    """An affinity that asks for a machine our image runs on as well, in every alternative that it has."""
    rule = {"key": "kubernetes.io/arch", "operator": "In", "values": list(_ARCHITECTURES)}
    required = at(affinity, "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution") or {}
    terms = [
        {**term, "matchExpressions": [*(term.get("matchExpressions") or []), rule]}
        for term in required.get("nodeSelectorTerms") or [{}]
    ]
    node = {**(affinity.get("nodeAffinity") or {})}
    node["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms}
    return {**affinity, "nodeAffinity": node}


def _beside(container: Object, runtime: Runtime, config: ServingConfig, place: Place) -> Object:
    mounts = [
        {"name": "models-dir", "mountPath": MODELS},
        *_claim_mounts(place),
        *_socket_mounts(runtime),
        *(container.get("volumeMounts") or []),
    ]
    # It is told to end when the instance has ended its calls, which it answers.
    scheme = {"scheme": "HTTPS"} if config.metrics_tls else {}
    stop = {"preStop": {"httpGet": {"path": "/drained", "port": config.metrics_port, **scheme}}}
    return {
        "securityContext": {"capabilities": {"drop": ["ALL"]}},
        **container,
        "lifecycle": {**stop, **(container.get("lifecycle") or {})},
        "volumeMounts": mounts,
    }


def _instance(runtime: Runtime, config: ServingConfig, place: Place) -> Object:
    stated = runtime.own_container
    ports = [("grpc", config.grpc_port), ("peer", PEER_PORT), ("prometheus", config.metrics_port)]
    if config.rest_port is not None:
        ports.append(("http", config.rest_port))
    resources = _instance_resources(runtime, config)

    def probe(path: str, **timing: int) -> Object:
        # The kubelet takes any certificate and has none, which this port asks nobody for.
        scheme = {"scheme": "HTTPS"} if config.metrics_tls else {}
        return {"httpGet": {"path": path, "port": "prometheus", **scheme}, "timeoutSeconds": 5, **timing}

    return {
        "name": OWN,
        "image": stated.get("image") or config.image,
        **({"imagePullPolicy": stated["imagePullPolicy"]} if stated.get("imagePullPolicy") else {}),
        "args": ["serve"],
        "env": environment(runtime, config, place, resources),
        "ports": [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports],
        "resources": resources,
        "securityContext": _HARDENED,
        "startupProbe": probe("/live", periodSeconds=1, failureThreshold=_START_S),
        "readinessProbe": probe("/ready", periodSeconds=5),
        "livenessProbe": probe("/live", periodSeconds=30, failureThreshold=2),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_LEAVE_S)]}}},
        "volumeMounts": [
            {"name": "models-dir", "mountPath": MODELS},
            {"name": "mmcore-tmp", "mountPath": "/tmp"},  # noqa: S108  # of the container
            {"name": "storage-config", "mountPath": _STORAGE, "readOnly": True},
            {"name": "tc-config", "mountPath": _CONSTRAINTS, "readOnly": True},
            {"name": "etcd-config", "mountPath": _ETCD, "readOnly": True},
            *([{"name": "tls-certs", "mountPath": _TLS, "readOnly": True}] if config.tls_secret else []),
            *_claim_mounts(place),
            *_socket_mounts(runtime),
            *(stated.get("volumeMounts") or []),
        ],
    }


def environment(runtime: Runtime, config: ServingConfig, place: Place, resources: Object) -> list[Object]:
    """The instance's variables: what the configuration and the runtime add, then the controller's, which go before."""
    labels = instance_labels(runtime, rest=config.rest_port is not None)
    own: dict[str, str | None] = {
        "MMCORE_HOST": EVERYWHERE,
        "MMCORE_GRPC_PORT": str(config.grpc_port),
        "MMCORE_REST_PORT": str(config.rest_port) if config.rest_port is not None else "0",
        "MMCORE_METRICS_PORT": str(config.metrics_port),
        "MMCORE_PEER_PORT": str(PEER_PORT),
        # Alone, as an address of IPv6 stands in brackets before a port.
        "MMCORE_ADVERTISE": "$(POD_IP)",
        "MMCORE_REGISTRY": f"etcd:{_ETCD}/{ETCD_KEY}",
        "MMCORE_LABEL": " ".join(labels),
        "MMCORE_TYPE_CONSTRAINTS": f"{_CONSTRAINTS}/{CONSTRAINTS_KEY}",
        "MMCORE_DATAPLANE_CONFIG": f"{_CONSTRAINTS}/{DATAPLANE_KEY}",
        "MMCORE_STORAGE_CONFIG": _STORAGE,
        "MMCORE_PVC_MOUNTS": _CLAIMS,
        "MMCORE_MODEL_CACHE": f"{MODELS}/.mmcore",
        "MMCORE_MODEL_CACHE_LIMIT": str(int(limit * _CACHE_SHARE))
        if (limit := models_limit(runtime, config))
        else None,
        "MMCORE_VMODEL_OWNER": DEFAULT_OWNER,
        "MMCORE_MAX_MESSAGE": str(config.max_message_bytes),
        "MMCORE_GRACE": f"{_GRACE_S}s",
        "MMCORE_LOG_REQUESTS": "true" if config.access_log else None,
        CAPACITY: str(size) if (size := capacity_bytes(runtime, resources)) else None,
        "MMCORE_RUNTIME": runtime_address(runtime),
        **adapter_limits.variables(runtime),
        **_tls_environment(config),
    }
    stated: dict[str, Object] = {"POD_IP": {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}}
    stated |= {name: {"value": value} for name, value in config.environment}
    for entry in (*(at(runtime.spec, "builtInAdapter", "env") or []), *(runtime.own_container.get("env") or [])):
        if entry["name"] not in adapter_limits.VARIABLES:
            stated[entry["name"]] = {key: value for key, value in entry.items() if key != "name"}
    stated |= {name: {"value": value} for name, value in own.items() if value is not None}
    return [{"name": name, **value} for name, value in stated.items()]


def _tls_environment(config: ServingConfig) -> dict[str, str | None]:
    """One secret for all: whom its certificates have signed, or who shows one of them, is an instance or a client."""
    if not config.tls_secret:
        return {}
    return {
        "MMCORE_TLS_CERT": f"{_TLS}/tls.crt",
        "MMCORE_TLS_KEY": f"{_TLS}/tls.key",
        "MMCORE_TLS_CLIENT_CA": _TLS if config.tls_client_auth == "require" else None,
        "MMCORE_PEER_CA": _TLS,
        "MMCORE_METRICS_TLS": "true" if config.metrics_tls else None,
    }


def _instance_resources(runtime: Runtime, config: ServingConfig) -> Object:
    stated: Object = runtime.own_container.get("resources") or {}
    return stated or config.resources


def capacity_bytes(runtime: Runtime, resources: Object) -> int | None:
    """What loaded models may take together, from the memory limit of the container that holds them.

    Of another server that is its limit (or what it requests) without ``memBufferBytes``, as its adapter reckoned; of an
    instance itself the share that it takes by default. None where no limit is stated.
    """
    buffer = adapter_limits.memory_buffer(runtime)
    if not runtime.containers:
        limit = at(resources, "limits", "memory")
        if limit is None:
            return None
        size = memory_bytes(limit)
        return max(size - buffer, 1) if buffer else int(size * CAPACITY_SHARE)
    served = [one for one in runtime.containers if one["name"] == runtime.server_type] or runtime.containers
    limits = [at(one, "resources", "limits", "memory") or at(one, "resources", "requests", "memory") for one in served]
    if None in limits:
        return None
    return max(sum(map(memory_bytes, limits)) - buffer, 1)


def models_limit(runtime: Runtime, config: ServingConfig) -> int:
    """How large the folder of models may be, in bytes: one and a half of what the containers may hold; 0: no limit."""
    held = runtime.containers or [{"resources": _instance_resources(runtime, config)}]
    return total_memory_limit(held) * 3 // 2


def _sockets(runtime: Runtime) -> list[str]:
    found = {
        str(PurePosixPath(value.partition(":")[2].removeprefix("//")).parent)
        for key in ("grpcEndpoint", "grpcDataEndpoint")
        if (value := str(runtime.spec.get(key) or "")).startswith("unix:")
    }
    return sorted(found)


def _socket_mounts(runtime: Runtime) -> list[Object]:
    return [{"name": "domain-socket", "mountPath": path} for path in _sockets(runtime)]


def _claim_mounts(place: Place) -> list[Object]:
    return [{"name": _claim_volume(one), "mountPath": f"{_CLAIMS}/{one}", "readOnly": True} for one in place.claims]


def _claim_volume(claim: str) -> str:
    return "pvc-" + re.sub("[^a-z0-9-]", "-", claim)[:59]


def _volumes(runtime: Runtime, config: ServingConfig, place: Place) -> list[Object]:
    limit = models_limit(runtime, config)
    volumes: list[dict[str, Any]] = [
        {"name": "models-dir", "emptyDir": {"sizeLimit": f"{-(-limit // 2**20)}Mi"} if limit else {}},
        {"name": "mmcore-tmp", "emptyDir": {}},
        # A namespace whose models are in claims or at open addresses needs no secret.
        {"name": "storage-config", "secret": {"secretName": config.storage_secret, "optional": True}},
        {"name": "tc-config", "configMap": {"name": CONSTRAINTS_MAP}},
        {"name": "etcd-config", "secret": {"secretName": place.etcd_secret}},
    ]
    if config.tls_secret:
        # Not optional: without it nothing is served, rather than in plain text.
        volumes.append({"name": "tls-certs", "secret": {"secretName": config.tls_secret, "defaultMode": 0o440}})
    if _sockets(runtime):
        volumes.append({"name": "domain-socket", "emptyDir": {}})
    for claim in place.claims:
        source = {"claimName": claim, "readOnly": True}
        volumes.append({"name": _claim_volume(claim), "persistentVolumeClaim": source})
    return volumes


def claims_of(entries: Iterable[Object], wanted: Iterable[str], existing: Sequence[str] | None) -> tuple[str, ...]:
    """The claims to mount: those of the storage entries, and of those that models name the ones that exist.

    ``existing`` is None where claims that no entry states are not mounted.
    """
    listed = {str(entry["name"]) for entry in entries if entry.get("type") == "pvc" and entry.get("name")}
    if existing is not None:
        listed |= set(wanted) & set(existing)
    return tuple(sorted(listed))
