"""Kubernetes objects as the API server tells them, plain dictionaries, and the kinds that are read and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mmcore.controller.quantities import quantity

#: An object, or a part of one.
Object = dict[str, Any]

GROUP: Final = "serving.kserve.io"
#: Who manages what is applied: the field manager, and the label ``app.kubernetes.io/managed-by``.
MANAGER: Final = "mmcore-controller"
#: Namespaces say with it that they are served.
ENABLED_LABEL: Final = "modelmesh-enabled"
#: Deployments, pods and the Service of a mesh carry it; its value is the Service's name.
SERVICE_LABEL: Final = "modelmesh-service"
FINALIZER: Final = "serving.kserve.io/mmcore"


#: Below these keys values are quantities.
_QUANTITIES: Final = frozenset({"limits", "requests", "sizeLimit", "divisor", "averageValue"})
#: What Go's types leave out.
_EMPTY: Final[tuple[object, ...]] = (None, "", False, [], {})


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object: ``api_version`` as objects state it, ``plural`` as paths have it."""

    api_version: str
    name: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The path of one object, or without ``name`` of all; without ``namespace`` those of every namespace."""
        root = "/api/" if "/" not in self.api_version else "/apis/"
        parts = [root + self.api_version]
        if namespace and self.namespaced:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


PREDICTOR: Final = Kind(f"{GROUP}/v1alpha1", "Predictor", "predictors")
INFERENCE_SERVICE: Final = Kind(f"{GROUP}/v1beta1", "InferenceService", "inferenceservices")
SERVING_RUNTIME: Final = Kind(f"{GROUP}/v1alpha1", "ServingRuntime", "servingruntimes")
CLUSTER_SERVING_RUNTIME: Final = Kind(
    f"{GROUP}/v1alpha1", "ClusterServingRuntime", "clusterservingruntimes", namespaced=False
)
NAMESPACE: Final = Kind("v1", "Namespace", "namespaces", namespaced=False)
CONFIG_MAP: Final = Kind("v1", "ConfigMap", "configmaps")
SECRET: Final = Kind("v1", "Secret", "secrets")
SERVICE: Final = Kind("v1", "Service", "services")
POD: Final = Kind("v1", "Pod", "pods")
EVENT: Final = Kind("v1", "Event", "events")
PERSISTENT_VOLUME_CLAIM: Final = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
DEPLOYMENT: Final = Kind("apps/v1", "Deployment", "deployments")
LEASE: Final = Kind("coordination.k8s.io/v1", "Lease", "leases")
NETWORK_POLICY: Final = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
#: Kinds of which servers have this version or an older one that says the same; the first that is served is used.
DISRUPTION_BUDGETS: Final = (
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("policy/v1beta1", "PodDisruptionBudget", "poddisruptionbudgets"),
)
AUTOSCALERS: Final = (
    Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"),
    Kind("autoscaling/v2beta2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"),
)
#: Only where the Prometheus operator is installed.
SERVICE_MONITORS: Final = (Kind("monitoring.coreos.com/v1", "ServiceMonitor", "servicemonitors"),)


@dataclass(frozen=True, slots=True)
class Ref:
    """Which object: its namespace is empty for kinds that have none."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


def ref(item: Object) -> Ref:
    """Which object this is."""
    metadata = item["metadata"]
    return Ref(metadata.get("namespace", ""), metadata["name"])


def at(item: Any, *path: str) -> Any:
    """What an object holds at a path of keys; None where it holds nothing there."""
    for key in path:
        if not isinstance(item, Mapping):
            return None
        item = item.get(key)
    return item


def annotations_of(item: Object) -> dict[str, str]:
    """Its annotations; none is an empty dictionary."""
    found: dict[str, str] = at(item, "metadata", "annotations") or {}
    return found


def labels_of(item: Object) -> dict[str, str]:
    """Its labels; none is an empty dictionary."""
    found: dict[str, str] = at(item, "metadata", "labels") or {}
    return found


def deleting(item: Object) -> bool:
    """Whether it is being deleted and is kept by finalizers alone."""
    return bool(at(item, "metadata", "deletionTimestamp"))


def owner_reference(item: Object, kind: Kind) -> Object:
    """The reference by which ``item`` owns others: they are deleted with it."""
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "name": item["metadata"]["name"],
        "uid": item["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": False,
    }


def covers(found: Any, wanted: Any, *, quantities: bool = False) -> bool:
    """Whether an object has everything that is wanted of it; it may have more: defaults, and what others manage.

    API servers leave out what is empty and write quantities in a form of their own: neither is a difference, or it
    would be applied again for ever. ``quantities`` says that what is compared are such.
    """
    if found is None:
        return wanted in _EMPTY
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(
            covers(found.get(key), value, quantities=quantities or key in _QUANTITIES) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) >= len(wanted) and _covers_list(found, wanted)
    return bool(found == wanted) or (quantities and _same_quantity(found, wanted))


def _same_quantity(found: Any, wanted: Any) -> bool:
    try:
        return quantity(found) == quantity(wanted)
    except ValueError:
        return False


def _covers_list(found: list[Any], wanted: list[Any]) -> bool:
    if all(isinstance(entry, Mapping) and "name" in entry for entry in (*found, *wanted)):
        by_name = {entry["name"]: entry for entry in found}
        return all(covers(by_name.get(entry["name"]), entry) for entry in wanted)
    return len(found) == len(wanted) and all(map(covers, found, wanted))
