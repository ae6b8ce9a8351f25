"""What a mesh needs besides Deployments: Service, files of constraints, the secret of etcd, policies and scaling."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, Final

from mmcore.controller.deployment import (
    CONSTRAINTS_KEY,
    CONSTRAINTS_MAP,
    DATAPLANE_KEY,
    ETCD_KEY,
    common_labels,
    deployment_name,
    pod_selector,
)
from mmcore.controller.objects import (
    CONFIG_MAP,
    DEPLOYMENT,
    NETWORK_POLICY,
    SECRET,
    SERVICE,
    SERVICE_LABEL,
    Kind,
    Object,
    annotations_of,
    owner_reference,
)
from mmcore.controller.runtimes import (
    AUTOSCALER_CLASS,
    AUTOSCALER_METRIC,
    MAX_SCALE,
    MIN_SCALE,
    PEER_PORT,
    TARGET_AVERAGE,
    TARGET_UTILIZATION,
    Runtime,
)
from mmcore.controller.serving_config import ServingConfig
from mmcore.controller.type_constraints import dataplane_config, type_constraints

SERVICE_MONITOR_NAME: Final = "modelmesh-metrics-monitor"


def _meta(kind: Kind, namespace: str, name: str, owner: Object | None = None, labels: Object | None = None) -> Object:
    metadata: Object = {"name": name, "namespace": namespace, "labels": {**common_labels(), **(labels or {})}}
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata}


def service(config: ServingConfig, namespace: str) -> Object:
    """The Service that clients call."""
    ports = [("grpc", config.grpc_port)]
    if config.rest_port is not None:
        ports.append(("http", config.rest_port))
    if config.metrics:
        ports.append(("prometheus", config.metrics_port))
    labels = {SERVICE_LABEL: config.service_name}
    spec: Object = {
        "selector": labels,
        "ports": [{"name": name, "port": port, "targetPort": name, "protocol": "TCP"} for name, port in ports],
    }
    if config.headless:
        spec["clusterIP"] = "None"
    return {**_meta(SERVICE, namespace, config.service_name, labels=labels), "spec": spec}


def endpoints(config: ServingConfig, namespace: str) -> tuple[str, str]:
    """Where clients call gRPC and REST, as objects' statuses tell it; the latter is empty where it is not served."""
    host = f"{config.service_name}.{namespace}"
    http = f"{'https' if config.tls_secret else 'http'}://{host}:{config.rest_port}"
    return f"grpc://{host}:{config.grpc_port}", http if config.rest_port is not None else ""


def constraints_map(config: ServingConfig, namespace: str, runtimes: Sequence[Runtime]) -> Object:
    """The files by which instances know where types of models go, and where requests name their model."""
    files = {
        CONSTRAINTS_KEY: type_constraints(runtimes, rest=config.rest_port is not None),
        DATAPLANE_KEY: dataplane_config(),
    }
    return {**_meta(CONFIG_MAP, namespace, CONSTRAINTS_MAP), "data": files}


def etcd_secret(source: Object, namespace: str) -> Object:
    """The connection to etcd for another namespace: the same with a prefix of its own, whatever files it refers to.

    Raises:
        ValueError: it holds no connection, or one that is no JSON object.
    """
    connection = {**_connection(source), "root_prefix": etcd_prefix(source, namespace)}
    data = dict(source["data"])
    data[ETCD_KEY] = base64.b64encode(json.dumps(connection, sort_keys=True).encode()).decode()
    return {**_meta(SECRET, namespace, source["metadata"]["name"]), "type": "Opaque", "data": data}


def etcd_prefix(source: Object | None, namespace: str) -> str:
    """What keys begin with: those of another namespace than the secret's, or without ``namespace`` of its own.

    Empty where the secret holds no connection.
    """
    try:
        prefix = str(_connection(source or {}).get("root_prefix") or "").rstrip("/")
    except ValueError:
        return ""
    return f"{prefix}/mm_ns/{namespace}" if namespace else prefix


def _connection(source: Object) -> Object:
    try:
        connection = json.loads(base64.b64decode((source.get("data") or {})[ETCD_KEY]))
    except (KeyError, ValueError):
        connection = None
    if not isinstance(connection, dict):
        raise ValueError(f"the secret must hold {ETCD_KEY}, a JSON object")
    return connection


def storage_entries(secret: Object | None) -> tuple[list[Object], list[str]]:
    """The entries of the secret of stores, and the keys of those that are no JSON object, which harm no other."""
    entries, broken = [], []
    for key, value in sorted(((secret or {}).get("data") or {}).items()):
        try:
            entry = json.loads(base64.b64decode(value))
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            broken.append(key)
    return entries, broken


def network_policy(config: ServingConfig, namespace: str) -> Object:
    """Who may reach the pods: anyone what the Service offers, each other alone where they pass requests on."""
    mesh = {"matchLabels": {SERVICE_LABEL: config.service_name}}
    offered = [config.grpc_port, config.metrics_port]
    if config.rest_port is not None:
        offered.append(config.rest_port)
    spec = {
        "podSelector": mesh,
        "policyTypes": ["Ingress"],
        "ingress": [
            {"ports": [{"port": port, "protocol": "TCP"} for port in sorted(offered)]},
            {"from": [{"podSelector": mesh}], "ports": [{"port": PEER_PORT, "protocol": "TCP"}]},
        ],
    }
    return {**_meta(NETWORK_POLICY, namespace, config.service_name), "spec": spec}


def disruption_budget(runtime: Runtime, config: ServingConfig, namespace: str, kind: Kind) -> Object:
    """How many of a runtime's pods may be taken away at once: one."""
    owner = owner_reference(runtime.resource, runtime.kind)
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": pod_selector(config, runtime.name)}}
    return {**_meta(kind, namespace, deployment_name(config, runtime.name), owner), "spec": spec}


def service_monitor(config: ServingConfig, namespace: str, found: Object, kind: Kind) -> Object:
    """What the Prometheus operator scrapes; it goes with the Service ``found``."""
    endpoint: Object = {"interval": "30s", "port": "prometheus", "scheme": "http"}
    if config.metrics_tls:
        # The certificate is for the Service's name, and pods are scraped by their addresses.
        endpoint |= {"scheme": "https", "tlsConfig": {"insecureSkipVerify": True}}
    spec = {
        "endpoints": [endpoint],
        "namespaceSelector": {"matchNames": [namespace]},
        "selector": {"matchLabels": {SERVICE_LABEL: config.service_name}},
    }
    owner = owner_reference(found, SERVICE)
    return {**_meta(kind, namespace, SERVICE_MONITOR_NAME, owner), "spec": spec}


def scale_bounds(runtime: Runtime) -> tuple[int, int] | None:
    """The least and the most replicas of a runtime that is scaled by others; None where its replicas are stated."""
    stated = annotations_of(runtime.resource)
    if stated.get(AUTOSCALER_CLASS, "none") == "none":
        return None
    least = int(stated.get(MIN_SCALE, 1))
    return least, max(least, int(stated.get(MAX_SCALE, 1)))


def autoscaler(runtime: Runtime, config: ServingConfig, namespace: str, kind: Kind) -> Object | None:
    """The HorizontalPodAutoscaler of a runtime whose class is ``hpa``; None for others."""
    stated = annotations_of(runtime.resource)
    bounds = scale_bounds(runtime)
    if bounds is None or stated[AUTOSCALER_CLASS] != "hpa":
        return None
    name = deployment_name(config, runtime.name)
    metric = stated.get(AUTOSCALER_METRIC, "cpu")
    measured: dict[str, Any]
    if metric in ("cpu", "memory"):
        target = {"type": "Utilization", "averageUtilization": int(stated.get(TARGET_UTILIZATION, 80))}
        measured = {"type": "Resource", "resource": {"name": metric, "target": target}}
    else:
        target = {"type": "AverageValue", "averageValue": stated[TARGET_AVERAGE]}
        measured = {"type": "Pods", "pods": {"metric": {"name": metric}, "target": target}}
    spec = {
        "scaleTargetRef": {"apiVersion": DEPLOYMENT.api_version, "kind": DEPLOYMENT.name, "name": name},
        "minReplicas": bounds[0],
        "maxReplicas": bounds[1],
        "metrics": [measured],
    }
    labels = {"serving.kserve.io/inferenceservice": runtime.name, "component": "predictor"}
    return {**_meta(kind, namespace, name, owner_reference(runtime.resource, runtime.kind), labels), "spec": spec}
