"""Who manages which fields, and how an applied object is merged: Kubernetes' structured merge.

A field is a tuple of the steps to it, each as ``managedFields`` writes it (FieldsV1): ``f:name``, ``k:{"name":"a"}``
for an entry of a list with keys, ``v:"a"`` for one of a set. Lists without keys and what a schema calls atomic are one
field; https://kubernetes.io/docs/reference/using-api/server-side-apply/#merge-strategy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

from tests.apiserver.resources import Schema, child, items

Path = tuple[str, ...]
#: Every field of an object with its value; the entries of lists are there themselves too.
Leaves = dict[Path, Any]

#: What nobody manages: the server's own.
_UNMANAGED: Final = (
    "name", "namespace", "creationTimestamp", "selfLink", "uid", "generation", "managedFields", "resourceVersion",
    "deletionTimestamp", "deletionGracePeriodSeconds",
)  # fmt: skip
_ENTRY: Final = object()


class Undeclared(ValueError):
    """A field that the schema does not know."""


def leaves(item: dict[str, Any], schema: Schema, *, strict: bool = False) -> Leaves:
    """The managed fields of an object; raises :class:`Undeclared` where ``strict``."""
    managed = {key: value for key, value in item.items() if key not in ("apiVersion", "kind")}
    metadata = {key: value for key, value in (item.get("metadata") or {}).items() if key not in _UNMANAGED}
    managed["metadata"] = metadata
    if not metadata:
        del managed["metadata"]
    found: Leaves = {}
    if managed:
        _walk((), managed, schema, found, strict)
    return found


def _walk(path: Path, value: Any, schema: Schema, found: Leaves, strict: bool) -> None:
    if isinstance(value, dict) and value and schema.get("x-kubernetes-map-type") != "atomic":
        for key, one in value.items():
            below = child(schema, key)
            if below is None:
                if strict:
                    where = "".join(f".{step[2:]}" for step in path)
                    raise Undeclared(f"{where}.{key}: field not declared in schema")
                below = {}
            _walk((*path, f"f:{key}"), one, below, found, strict)
        return
    if isinstance(value, list) and value:
        kind = schema.get("x-kubernetes-list-type", "atomic")
        if kind == "map":
            for one in value:
                step = (*path, _key(one, schema))
                found[step] = _ENTRY
                _walk_entry(step, one, items(schema), found, strict)
            return
        if kind == "set":
            found |= {(*path, "v:" + json.dumps(one)): _ENTRY for one in value}
            return
    found[path] = value


def _walk_entry(path: Path, value: Any, schema: Schema, found: Leaves, strict: bool) -> None:
    if schema.get("x-kubernetes-map-type") == "atomic":
        found[path] = value
    elif value:
        _walk(path, value, schema, found, strict)


def _key(entry: Any, schema: Schema) -> str:
    below = items(schema)
    keys = {}
    for name in sorted(schema["x-kubernetes-list-map-keys"]):
        value = entry.get(name)
        if value is None:
            value = (child(below, name) or {}).get("default")
        if value is not None:
            keys[name] = value
    return "k:" + json.dumps(keys, separators=(",", ":"))


def merged(live: Any, applied: Any, schema: Schema) -> Any:
    """``live`` with everything that ``applied`` states."""
    if isinstance(live, dict) and isinstance(applied, dict) and schema.get("x-kubernetes-map-type") != "atomic":
        result = dict(live)
        for key, value in applied.items():
            result[key] = merged(live.get(key), value, child(schema, key) or {})
        return result
    if isinstance(live, list) and isinstance(applied, list):
        kind = schema.get("x-kubernetes-list-type", "atomic")
        if kind == "set":
            return [*live, *(one for one in applied if one not in live)]
        if kind == "map":
            by_key = {_key(one, schema): one for one in live}
            for one in applied:
                key = _key(one, schema)
                by_key[key] = merged(by_key.get(key), one, items(schema))
            return list(by_key.values())
    return applied


def without(item: dict[str, Any], schema: Schema, gone: Iterable[Path], kept: Iterable[Path]) -> dict[str, Any]:
    """An object without the fields ``gone`` and all below them, but for what lies above or below ``kept`` ones."""
    held = set(_prefixes(kept))
    result: Any = item
    for path in sorted(set(_prefixes(gone)) - held, key=len):
        result = _removed(result, schema, path)
    found: dict[str, Any] = result
    return found


def _prefixes(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        for length in range(1, len(path) + 1):
            yield path[:length]


def _removed(value: Any, schema: Schema, path: Path) -> Any:
    step, rest = path[0], path[1:]
    if step.startswith("f:"):
        key = step[2:]
        if not isinstance(value, dict) or key not in value:
            return value
        if not rest:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: _removed(value[key], child(schema, key) or {}, rest)}
    if not isinstance(value, list):
        return value
    if step.startswith("v:"):
        return [one for one in value if "v:" + json.dumps(one) != step]
    kept = []
    for one in value:
        if _key(one, schema) != step:
            kept.append(one)
        elif rest:
            kept.append(_removed(one, items(schema), rest))
    return kept


def changed(before: Leaves, after: Leaves) -> tuple[set[Path], set[Path]]:
    """The fields that are new or have another value, and those that are gone."""
    missing = object()
    fresh = {path for path, value in after.items() if before.get(path, missing) != value}
    return fresh, before.keys() - after.keys()


def tree(paths: Iterable[Path]) -> dict[str, Any]:
    """Fields as ``fieldsV1`` has them."""
    root: dict[str, Any] = {}
    for path in sorted(paths):
        node = root
        for step in path:
            node = node.setdefault(step, {})
        if path[-1].startswith("k:"):
            node["."] = {}
    return root
