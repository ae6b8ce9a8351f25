"""Making, changing and deleting objects by the server's rules."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

from tests.apiserver.admission import admit
from tests.apiserver.answers import Refused, conflict, invalid, not_found
from tests.apiserver.fields import Path, Undeclared, changed, leaves, merged, tree, without
from tests.apiserver.resources import Resource, Resources
from tests.apiserver.store import Key, Manager, Object, Store, Stored

_ADDRESSES: Final = ipaddress.ip_network("10.0.0.0/16")
#: Metadata that only the server writes.
_SERVERS: Final = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation")


class Objects:
    """The objects of all kinds. ``cel_rules`` False is a server that is too old for rules in CEL."""

    def __init__(self, resources: Resources, store: Store, *, cel_rules: bool) -> None:
        self._resources = resources
        self._store = store
        self._cel_rules = cel_rules
        self._addresses = _ADDRESSES.hosts()

    def read(self, resource: Resource, key: Key) -> Stored:
        found = self._store.get(resource, key)
        if found is None:
            raise not_found(resource.label, key[1])
        return found

    def create(self, resource: Resource, namespace: str, item: Object, manager: str) -> Stored:
        metadata = item.get("metadata")
        if not isinstance(metadata, dict):
            raise Refused(400, "BadRequest", "metadata is missing")
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + os.urandom(3).hex()[:5]
        name = metadata.get("name")
        if not name:
            raise invalid(resource.label, "", "metadata.name: Required value: name or generateName is required")
        key = (namespace if resource.namespaced else "", name)
        if self._store.get(resource, key) is not None:
            raise Refused(409, "AlreadyExists", f'{resource.label} "{name}" already exists')
        made = self._made(resource, key, item)
        fields = leaves(made, resource.schema)
        by = Manager(manager, "Update", resource.api_version)
        return self._keep(resource, key, made, {by: (frozenset(fields), _now())})

    def replace(self, resource: Resource, key: Key, item: Object, manager: str, subresource: str) -> Stored:
        self._check_body(resource, key, item)
        version = (item.get("metadata") or {}).get("resourceVersion")
        if not version and not resource.own:
            self.read(resource, key)
            raise invalid(resource.label, key[1], "metadata.resourceVersion: Invalid value: 0x0: must be specified")
        return self._update(resource, key, lambda live: item, manager, subresource)

    def patch(self, resource: Resource, key: Key, change: Object, manager: str, subresource: str) -> Stored:
        """Merge a change into an object (RFC 7386)."""
        return self._update(resource, key, lambda live: merge_patch(live, change), manager, subresource)

    def apply(
        self, resource: Resource, key: Key, item: Object, manager: str, subresource: str, *, force: bool
    ) -> Stored:
        """Server-side apply: the fields stated are the manager's, those it stated before and does not now go."""
        self._check_body(resource, key, item)
        if (item.get("metadata") or {}).get("managedFields"):
            raise Refused(400, "BadRequest", "metadata.managedFields must be nil")
        try:
            stated = frozenset(leaves(item, resource.schema, strict=True))
        except Undeclared as error:
            raise Refused(500, "", f"failed to create typed patch object: {error}") from None
        by = Manager(manager, "Apply", resource.api_version, subresource)
        found = self._store.get(resource, key)
        if found is None:
            made = self._made(resource, key, item)
            rest = leaves(made, resource.schema).keys() & stated
            return self._keep(resource, key, made, {by: (frozenset(rest), _now())})
        self._check_version(resource, key, found, item)
        others = {one: fields for one, (fields, _) in found.owners.items() if one != by}
        before = found.owners.get(by, (frozenset(), ""))[0]
        kept = frozenset().union(stated, *others.values())
        result = merged(found.item, item, resource.schema)
        result = without(result, resource.schema, before - stated, kept)
        result["metadata"]["resourceVersion"] = found.item["metadata"]["resourceVersion"]
        after = self._changed(resource, key, found, result, subresource)
        old, new = leaves(found.item, resource.schema), leaves(after, resource.schema)
        fresh, gone = changed(old, new)
        clashes = {one: fields & fresh for one, fields in others.items() if fields & fresh}
        if clashes and not force:
            raise _clash(clashes)
        owners = _less(found.owners, fresh, gone)
        owners[by] = (frozenset(stated & new.keys()), found.owners.get(by, ("", ""))[1])
        return self._settle(resource, key, found, after, owners, by)

    def delete(self, resource: Resource, key: Key, options: Object) -> Stored | None:
        """The object that finalizers keep; None for one that is gone."""
        found = self.read(resource, key)
        metadata = found.item["metadata"]
        for name, value in (options.get("preconditions") or {}).items():
            if metadata.get(name) != value:
                raise conflict(resource.label, key[1], f"Precondition failed: {name} {value} is {metadata.get(name)}")
        finalizers = list(metadata.get("finalizers") or [])
        if options.get("propagationPolicy") == "Foreground" and "foregroundDeletion" not in finalizers:
            finalizers.append("foregroundDeletion")
        kept_by_namespace = resource.kind == "Namespace" and not resource.group
        if not finalizers and not kept_by_namespace:
            self._drop(resource, key, found)
            return None
        if metadata.get("deletionTimestamp"):
            return found
        changes = {"deletionTimestamp": _now(), "deletionGracePeriodSeconds": 0, "finalizers": finalizers}
        if kept_by_namespace:
            del changes["deletionGracePeriodSeconds"]
        if not finalizers:
            del changes["finalizers"]
        if metadata.get("generation"):
            changes["generation"] = metadata["generation"] + 1
        item = {**found.item, "metadata": {**metadata, **changes}}
        if kept_by_namespace:
            item["status"] = {**(item.get("status") or {}), "phase": "Terminating"}
        return self._keep(resource, key, item, found.owners)

    def finalize(self, resource: Resource, key: Key, item: Object) -> Stored:
        """Take over who still has something to do in a namespace that ends; nobody: it is gone."""
        self._check_body(resource, key, item)
        found = self.read(resource, key)
        after = {**found.item, "spec": item.get("spec") or {}}
        if after["metadata"].get("deletionTimestamp") and not after["spec"].get("finalizers"):
            return self._drop(resource, key, Stored.of(after, found.owners))
        return self._keep(resource, key, after, found.owners)

    # What all changes have in common.

    def _made(self, resource: Resource, key: Key, item: Object) -> Object:
        namespace, name = key
        if namespace:
            self._check_namespace(namespace)
        metadata = {
            name: value
            for name, value in item["metadata"].items()
            if name not in (*_SERVERS, "resourceVersion", "managedFields")
        }
        stated = metadata.get("namespace")
        if stated and stated != namespace:
            raise Refused(400, "BadRequest", "the namespace of the object does not match the namespace on the request")
        metadata |= {"name": name, "uid": str(uuid4()), "creationTimestamp": _now()}
        if namespace:
            metadata["namespace"] = namespace
        if resource.counted:
            metadata["generation"] = 1
        made = {**item, "apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata}
        if resource.has_status:
            made.pop("status", None)
        made = admit(resource, made, cel_rules=self._cel_rules)
        return self._completed(resource, made)

    def _completed(self, resource: Resource, item: Object) -> Object:
        """What the server adds by code and not by schema."""
        if resource.kind == "Service" and not resource.group:
            spec = item.setdefault("spec", {})
            for port in spec.get("ports") or []:
                port.setdefault("targetPort", port["port"])
            if not spec.get("clusterIP"):
                spec["clusterIP"] = str(next(self._addresses))
        elif resource.kind == "Namespace" and not resource.group:
            item["spec"] = {"finalizers": ["kubernetes"]}
            item["status"] = {"phase": "Active"}
            item["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = item["metadata"]["name"]
        elif resource.kind == "Pod" and not resource.group:
            item.setdefault("status", {}).setdefault("phase", "Pending")
        return item

    def _check_namespace(self, namespace: str) -> None:
        resource = self._resources.get("v1", "namespaces")
        assert resource is not None
        found = self._store.get(resource, ("", namespace))
        if found is None:
            raise not_found("namespaces", namespace)
        if found.item["metadata"].get("deletionTimestamp"):
            message = f"unable to create new content in namespace {namespace} because it is being terminated"
            raise Refused(403, "Forbidden", message)

    @staticmethod
    def _check_body(resource: Resource, key: Key, item: Object) -> None:
        metadata = item.get("metadata") or {}
        if (item.get("apiVersion"), item.get("kind")) != (resource.api_version, resource.kind):
            raise Refused(400, "BadRequest", f"the body is no {resource.kind} of {resource.api_version}")
        if metadata.get("name", key[1]) != key[1] or metadata.get("namespace", key[0]) != key[0]:
            raise Refused(400, "BadRequest", "the name of the object does not match the name on the URL")

    @staticmethod
    def _check_version(resource: Resource, key: Key, found: Stored, item: Object) -> None:
        metadata, live = item.get("metadata") or {}, found.item["metadata"]
        for name in ("resourceVersion", "uid"):
            if metadata.get(name) and metadata[name] != live[name]:
                why = "the object has been modified; please apply your changes to the latest version and try again"
                raise conflict(resource.label, key[1], why)

    def _update(
        self, resource: Resource, key: Key, change: Callable[[Object], Object], manager: str, subresource: str
    ) -> Stored:
        found = self.read(resource, key)
        result = change(found.item)
        self._check_version(resource, key, found, result)
        after = self._changed(resource, key, found, result, subresource)
        by = Manager(manager, "Update", resource.api_version, subresource)
        fresh, gone = changed(leaves(found.item, resource.schema), leaves(after, resource.schema))
        owners = _less(found.owners, fresh, gone)
        if fresh:
            owned, time = owners.get(by, (frozenset(), ""))
            owners[by] = (owned | fresh, time)
        return self._settle(resource, key, found, after, owners, by)

    def _changed(self, resource: Resource, key: Key, found: Stored, result: Object, subresource: str) -> Object:
        """The live object with those changes of ``result`` that this resource or subresource takes."""
        live = found.item
        stated = {
            name: value
            for name, value in (result.get("metadata") or {}).items()
            if name not in (*_SERVERS, "managedFields")
        }
        server = {name: live["metadata"][name] for name in _SERVERS if name in live["metadata"]}
        metadata = {**stated, **server, "name": key[1]}
        if key[0]:
            metadata["namespace"] = key[0]
        metadata["resourceVersion"] = live["metadata"]["resourceVersion"]
        if subresource == "status":
            item = {**live, "status": result.get("status")}
            if item["status"] is None:
                del item["status"]
            metadata = {name: value for name, value in live["metadata"].items() if name != "managedFields"}
        else:
            item = dict(result)
            if resource.has_status:
                item.pop("status", None)
                if "status" in live:
                    item["status"] = live["status"]
        item |= {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata}
        after = admit(resource, item, cel_rules=self._cel_rules)
        after = self._kept_by_code(resource, key, live, self._completed_again(resource, live, after))
        if resource.counted and subresource != "status" and _wanted(live) != _wanted(after):
            after["metadata"]["generation"] = live["metadata"].get("generation", 0) + 1
        old = live["metadata"].get("finalizers") or []
        if live["metadata"].get("deletionTimestamp") and set(after["metadata"].get("finalizers") or []) - set(old):
            why = "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted"
            raise invalid(resource.label, key[1], why)
        return after

    def _completed_again(self, resource: Resource, live: Object, after: Object) -> Object:
        if resource.kind == "Service" and not resource.group:
            # An address that is not stated stays.
            after.setdefault("spec", {}).setdefault("clusterIP", live["spec"]["clusterIP"])
        if resource.kind == "Namespace" and not resource.group:
            return {**after, "spec": live["spec"]}
        return self._completed(resource, after)

    @staticmethod
    def _kept_by_code(resource: Resource, key: Key, live: Object, after: Object) -> Object:
        """Refuse changes of what cannot be changed."""
        fixed = {"Service": "clusterIP", "Deployment": "selector"}.get(resource.kind)
        if fixed and resource.own and after["spec"].get(fixed) != live["spec"].get(fixed):
            raise invalid(resource.label, key[1], f"spec.{fixed}: Invalid value: field is immutable")
        return after

    def _settle(
        self,
        resource: Resource,
        key: Key,
        found: Stored,
        after: Object,
        owners: dict[Manager, tuple[frozenset[Path], str]],
        by: Manager,
    ) -> Stored:
        """Keep a changed object; one that is not changed stays at its version."""
        plain = {name: value for name, value in found.item["metadata"].items() if name != "managedFields"}
        same = {**found.item, "metadata": plain} == after
        owners = {one: stated for one, stated in owners.items() if stated[0]}
        if same and {one: fields for one, (fields, _) in owners.items()} == {
            one: fields for one, (fields, _) in found.owners.items()
        }:
            return found
        if by in owners:
            owners[by] = (owners[by][0], _now())
        if after["metadata"].get("deletionTimestamp") and not after["metadata"].get("finalizers"):
            is_namespace = resource.kind == "Namespace" and not resource.group
            if not is_namespace:
                return self._drop(resource, key, Stored.of(after, owners))
        return self._keep(resource, key, after, owners)

    def _keep(
        self, resource: Resource, key: Key, item: Object, owners: dict[Manager, tuple[frozenset[Path], str]]
    ) -> Stored:
        stored = self._versioned(resource, item, owners)
        self._store.put(resource, key, stored)
        return stored

    def _drop(self, resource: Resource, key: Key, last: Stored) -> Stored:
        stored = self._versioned(resource, last.item, last.owners)
        self._store.drop(resource, key, stored)
        return stored

    def _versioned(
        self, resource: Resource, item: Object, owners: dict[Manager, tuple[frozenset[Path], str]]
    ) -> Stored:
        metadata = {**item["metadata"], "resourceVersion": str(self._store.next_version())}
        metadata["managedFields"] = [_entry(by, fields, time) for by, (fields, time) in owners.items()]
        return Stored.of({**item, "metadata": metadata}, owners)


def merge_patch(live: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return change
    result = dict(live) if isinstance(live, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def _less(
    owners: dict[Manager, tuple[frozenset[Path], str]], fresh: set[Path], gone: set[Path]
) -> dict[Manager, tuple[frozenset[Path], str]]:
    """The owners without fields that somebody else has changed, or that are gone."""
    lost = fresh | gone
    return {by: (fields - lost, time) for by, (fields, time) in owners.items()}


def _clash(clashes: dict[Manager, frozenset[Path]]) -> Refused:
    told = [
        f'conflict with "{by.name}": ' + ", ".join(".".join(step.partition(":")[2] for step in path) for path in fields)
        for by, fields in clashes.items()
    ]
    number = sum(map(len, clashes.values()))
    return Refused(409, "Conflict", f"Apply failed with {number} conflict{'s' * (number > 1)}: {'; '.join(told)}")


def _entry(by: Manager, fields: frozenset[Path], time: str) -> Object:
    entry: Object = {
        "manager": by.name,
        "operation": by.operation,
        "apiVersion": by.api_version,
        "time": time or _now(),
        "fieldsType": "FieldsV1",
        "fieldsV1": tree(fields),
    }
    return {**entry, "subresource": by.subresource} if by.subresource else entry


def _wanted(item: Object) -> Object:
    return {key: value for key, value in item.items() if key not in ("metadata", "status")}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
