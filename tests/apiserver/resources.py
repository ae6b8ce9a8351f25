"""The kinds that are served, with their schemas: Kubernetes' own from its OpenAPI, others by their definitions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import kubernetes_validate

Schema = dict[str, Any]

_RELEASE: Final = "v1.33.0-local"
_METADATA: Final = "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_PRESERVES: Final = "x-kubernetes-preserve-unknown-fields"

#: Kind, group, version, plural, whether in namespaces, whether its status is a subresource, the name of its schema.
_OWN: Final = (
    ("Namespace", "", "v1", "namespaces", False, True, "core.v1.Namespace"),
    ("ConfigMap", "", "v1", "configmaps", True, False, "core.v1.ConfigMap"),
    ("Secret", "", "v1", "secrets", True, False, "core.v1.Secret"),
    ("Service", "", "v1", "services", True, True, "core.v1.Service"),
    ("Pod", "", "v1", "pods", True, True, "core.v1.Pod"),
    ("Event", "", "v1", "events", True, False, "core.v1.Event"),
    ("PersistentVolumeClaim", "", "v1", "persistentvolumeclaims", True, True, "core.v1.PersistentVolumeClaim"),
    ("Deployment", "apps", "v1", "deployments", True, True, "apps.v1.Deployment"),
    ("Lease", "coordination.k8s.io", "v1", "leases", True, False, "coordination.v1.Lease"),
    ("NetworkPolicy", "networking.k8s.io", "v1", "networkpolicies", True, False, "networking.v1.NetworkPolicy"),
    ("PodDisruptionBudget", "policy", "v1", "poddisruptionbudgets", True, True, "policy.v1.PodDisruptionBudget"),
    (
        "HorizontalPodAutoscaler",
        "autoscaling",
        "v2",
        "horizontalpodautoscalers",
        True,
        True,
        "autoscaling.v2.HorizontalPodAutoscaler",
    ),
    ("Role", "rbac.authorization.k8s.io", "v1", "roles", True, False, "rbac.v1.Role"),
    ("RoleBinding", "rbac.authorization.k8s.io", "v1", "rolebindings", True, False, "rbac.v1.RoleBinding"),
    ("ClusterRole", "rbac.authorization.k8s.io", "v1", "clusterroles", False, False, "rbac.v1.ClusterRole"),
    (
        "ClusterRoleBinding",
        "rbac.authorization.k8s.io",
        "v1",
        "clusterrolebindings",
        False,
        False,
        "rbac.v1.ClusterRoleBinding",
    ),
)
#: Kinds whose generation counts changes of what is wanted; of others' definitions all do.
_COUNTED: Final = ("Deployment", "NetworkPolicy", "PodDisruptionBudget")

#: Defaults that the real server's code adds, by schema: those that objects of ours run into.
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "core.v1.ContainerPort": {"protocol": "TCP"},
    "core.v1.ServicePort": {"protocol": "TCP"},
    "networking.v1.NetworkPolicyPort": {"protocol": "TCP"},
    "core.v1.ServiceSpec": {"type": "ClusterIP", "sessionAffinity": "None"},
    "core.v1.ObjectFieldSelector": {"apiVersion": "v1"},
    "core.v1.HTTPGetAction": {"scheme": "HTTP"},
    "core.v1.Probe": {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3},
    "core.v1.SecretVolumeSource": {"defaultMode": 420},
    "core.v1.ConfigMapVolumeSource": {"defaultMode": 420},
    "core.v1.Container": {"terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"},
    "core.v1.PodSpec": {"restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler"},
    "apps.v1.DeploymentSpec": {"replicas": 1, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600},
    "autoscaling.v2.HorizontalPodAutoscalerSpec": {"minReplicas": 1},
    "core.v1.Secret": {"type": "Opaque"},
}


@dataclass(frozen=True)
class Resource:
    """One kind in one version; ``own`` for those that are no custom resources."""

    kind: str
    group: str
    version: str
    plural: str
    namespaced: bool
    has_status: bool
    schema: Schema
    own: bool
    counted: bool

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def label(self) -> str:
        """As messages name it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


class Resources:
    """The kinds by API version and plural."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Resource] = {}
        for kind, group, version, plural, namespaced, has_status, schema in _OWN:
            whole = _whole(definitions()[f"io.k8s.api.{schema}"])
            self.add(Resource(kind, group, version, plural, namespaced, has_status, whole, True, kind in _COUNTED))
        loose = _whole({"type": "object", _PRESERVES: True})
        group = "apiextensions.k8s.io"
        self.add(
            Resource(
                "CustomResourceDefinition", group, "v1", "customresourcedefinitions", False, False, loose, True, False
            )
        )

    def add(self, resource: Resource) -> None:
        """Serve a kind."""
        self._found[resource.api_version, resource.plural] = resource

    def define(self, definition: Schema) -> None:
        """Serve what a CustomResourceDefinition defines."""
        spec = definition["spec"]
        for version in spec["versions"]:
            self.add(
                Resource(
                    kind=spec["names"]["kind"],
                    group=spec["group"],
                    version=version["name"],
                    plural=spec["names"]["plural"],
                    namespaced=spec["scope"] == "Namespaced",
                    has_status="status" in (version.get("subresources") or {}),
                    schema=_whole(version["schema"]["openAPIV3Schema"]),
                    own=False,
                    counted=True,
                )
            )

    def get(self, api_version: str, plural: str) -> Resource | None:
        return self._found.get((api_version, plural))

    def of(self, api_version: str) -> list[Resource]:
        """Those of one API version."""
        return [found for (version, _), found in self._found.items() if version == api_version]


def _whole(schema: Schema) -> Schema:
    """A kind's schema with that of the metadata that all objects have."""
    common = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"$ref": _METADATA}}
    return {**schema, "properties": {**(schema.get("properties") or {}), **common}}


@cache
def definitions() -> dict[str, Schema]:
    """The schemas of Kubernetes' own kinds, by name."""
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / _RELEASE
    found: dict[str, Schema] = json.loads((folder / "_definitions.json").read_text())["$defs"]
    for name, defaults in _DEFAULTS.items():
        properties = found[f"io.k8s.api.{name}"]["properties"]
        for key, value in defaults.items():
            properties[key] = {**properties[key], "default": value}
    for schema in found.values():
        if (
            "object" in (schema.get("type") or ())
            and not schema.get("properties")
            and not schema.get("additionalProperties")
        ):
            # Of such as FieldsV1 anything may be in it.
            schema[_PRESERVES] = True
    return found


def named(schema: Schema) -> str:
    """The name of the definition that a schema refers to; empty where it is one itself."""
    return str(schema.get("$ref", "")).rpartition("/")[2]


def resolved(schema: Schema) -> Schema:
    """The schema itself, in place of a reference to it."""
    name = named(schema)
    return definitions()[name] if name else schema


def preserves(schema: Schema) -> bool:
    """Whether unknown fields stay."""
    return bool(schema.get(_PRESERVES))


def child(schema: Schema, key: str) -> Schema | None:
    """The schema of one key of an object; None for one that it does not know, ``{}`` where anything goes."""
    properties = schema.get("properties") or {}
    if key in properties:
        return resolved(properties[key])
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        return resolved(more)
    if preserves(schema) or more is True or "type" not in schema:
        return {}
    return None


def items(schema: Schema) -> Schema:
    """The schema of a list's entries."""
    return resolved(schema.get("items") or {})
