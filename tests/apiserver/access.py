"""Who may do what: role-based access control, from the roles and bindings that are kept as objects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from tests.apiserver.answers import Refused
from tests.apiserver.resources import Resource, Resources
from tests.apiserver.store import Store

_RBAC: Final = "rbac.authorization.k8s.io/v1"
ADMINISTRATORS: Final = "system:masters"


@dataclass(frozen=True, slots=True)
class User:
    """Who asks."""

    name: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked for; ``name`` is empty where the call names no object."""

    verb: str
    resource: Resource
    namespace: str = ""
    name: str = ""
    subresource: str = ""


class Access:
    """Looks at each call."""

    def __init__(self, resources: Resources, store: Store) -> None:
        self._resources = resources
        self._store = store

    def check(self, user: User, call: Call) -> None:
        """Refuse what no role allows."""
        if ADMINISTRATORS in user.groups or any(_allows(rule, call) for rule in self._rules(user, call.namespace)):
            return
        where = f' in the namespace "{call.namespace}"' if call.namespace else " at the cluster scope"
        plural = f"{call.resource.plural}/{call.subresource}".rstrip("/")
        named = f' "{call.name}"' if call.name else ""
        raise Refused(
            403,
            "Forbidden",
            f'{call.resource.label}{named} is forbidden: User "{user.name}" cannot {call.verb} resource "{plural}"'
            f' in API group "{call.resource.group}"{where}',
        )

    def _rules(self, user: User, namespace: str) -> Iterator[dict[str, Any]]:
        for binding in self._all("clusterrolebindings"):
            if _binds(binding, user, ""):
                yield from self._role("", binding["roleRef"])
        if namespace:
            for binding in self._all("rolebindings", namespace):
                if _binds(binding, user, namespace):
                    yield from self._role(namespace, binding["roleRef"])

    def _all(self, plural: str, namespace: str = "") -> Iterator[dict[str, Any]]:
        for stored in self._store.all(self._resource(plural), namespace):
            yield stored.item

    def _resource(self, plural: str) -> Resource:
        found = self._resources.get(_RBAC, plural)
        assert found is not None
        return found

    def _role(self, namespace: str, reference: dict[str, Any]) -> list[dict[str, Any]]:
        in_cluster = reference["kind"] == "ClusterRole"
        plural, where = ("clusterroles", "") if in_cluster else ("roles", namespace)
        found = self._store.get(self._resource(plural), (where, reference["name"]))
        return list(found.item.get("rules") or []) if found is not None else []


def _binds(binding: dict[str, Any], user: User, namespace: str) -> bool:
    for subject in binding.get("subjects") or []:
        kind, name = subject["kind"], subject["name"]
        if kind == "User" and name == user.name:
            return True
        if kind == "Group" and name in user.groups:
            return True
        account = f"system:serviceaccount:{subject.get('namespace') or namespace}:{name}"
        if kind == "ServiceAccount" and account == user.name:
            return True
    return False


def _allows(rule: dict[str, Any], call: Call) -> bool:
    resource = f"{call.resource.plural}/{call.subresource}".rstrip("/")
    named = rule.get("resourceNames")
    return (
        _has(rule.get("verbs"), call.verb)
        and _has(rule.get("apiGroups"), call.resource.group)
        and _has(rule.get("resources"), resource)
        and (not named or call.name in named)
    )


def _has(listed: list[str] | None, wanted: str) -> bool:
    return listed is not None and (wanted in listed or "*" in listed)
