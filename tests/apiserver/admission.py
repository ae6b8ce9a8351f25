"""What becomes of an object before it is kept: unknown fields go, defaults come, schemas and rules are checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from typing import Any, Final

import cel
import jsonschema

from tests.apiserver.answers import invalid
from tests.apiserver.resources import Resource, Schema, child, definitions, items, named, resolved

_QUANTITY: Final = "io.k8s.apimachinery.pkg.api.resource.Quantity"
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_RULES: Final = "x-kubernetes-validations"
_BINARY: Final = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
_DECIMAL: Final = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}


def admit(resource: Resource, item: dict[str, Any], *, cel_rules: bool) -> dict[str, Any]:
    """The object as it is kept; refused is one that breaks its schema."""
    found: dict[str, Any] = _normal(item, resource.schema, own=resource.own)
    name = found["metadata"].get("name", "")
    if not resource.group.startswith("rbac.") and not (len(name) <= 253 and _NAME.fullmatch(name)):
        raise invalid(resource.label, name, f"metadata.name: Invalid value: {name!r}: a lowercase RFC 1123 subdomain")
    errors = [_told(error) for error in _validator(resource).iter_errors(found)]
    if not errors and cel_rules:
        errors = list(_broken_rules(found, resource.schema, ""))
    if errors:
        raise invalid(resource.label, name, "; ".join(errors))
    return found


def _told(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


def _normal(value: Any, schema: Schema, *, own: bool, name: str = "") -> Any:
    """A value without what its schema does not know, with its defaults, and written as the server would."""
    if own and name == _QUANTITY:
        return quantity(value)
    if isinstance(value, dict):
        return _normal_object(value, schema, own=own)
    if isinstance(value, list):
        below = schema.get("items") or {}
        return [_normal(one, resolved(below), own=own, name=named(below)) for one in value]
    return value


def _normal_object(value: dict[str, Any], schema: Schema, *, own: bool) -> dict[str, Any]:
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    found = {}
    for key, one in value.items():
        below = child(schema, key)
        if below is None:
            continue
        stated = properties.get(key) or schema.get("additionalProperties")
        if one is None and not below.get("nullable"):
            continue
        if own and key in properties and key not in required and one in ("", []):
            # Go's types leave out what is empty.
            continue
        reference = named(stated) if isinstance(stated, dict) else ""
        found[key] = _normal(one, below, own=own, name=reference)
    for key, stated in properties.items():
        default = stated.get("default")
        if key not in found and default is not None:
            found[key] = _normal(default, resolved(stated), own=own)
    return found


def quantity(value: Any) -> str:
    """A quantity in the one form that servers write: the largest unit that leaves it whole."""
    text = str(value)
    number, unit = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)", text).groups()  # type: ignore[union-attr]
    if unit in _BINARY:
        amount = int(Decimal(number) * _BINARY[unit])
        for suffix, factor in reversed(_BINARY.items()):
            if amount and amount % factor == 0:
                return f"{amount // factor}{suffix}"
        return str(amount)
    exact = Decimal(number) * (Decimal("0.001") if unit == "m" else Decimal(10) ** _DECIMAL[unit])
    if exact == 0:
        return "0"
    if exact != exact.to_integral_value():
        return f"{int(exact * 1000)}m"
    whole = int(exact)
    for suffix, power in reversed(_DECIMAL.items()):
        if whole % 10**power == 0:
            return f"{whole // 10**power}{suffix}"
    return str(whole)


_validators: dict[tuple[str, str], Any] = {}


def _validator(resource: Resource) -> Any:
    key = (resource.api_version, resource.plural)
    if key not in _validators:
        schema = resource.schema
        if not resource.own:
            # Metadata are checked above; a reference costs more than all the rest.
            schema = {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}
        _validators[key] = jsonschema.Draft202012Validator({**schema, "$defs": definitions()})
    return _validators[key]


def _broken_rules(value: Any, schema: Schema, path: str) -> Iterator[str]:
    for rule in schema.get(_RULES) or []:
        if not _program(rule["rule"]).execute({"self": value}):
            yield f"{path or '<root>'}: Invalid value: {rule.get('message') or 'failed rule: ' + rule['rule']}"
    if isinstance(value, dict):
        for key, one in value.items():
            below = child(schema, key)
            if below and key != "metadata":
                yield from _broken_rules(one, below, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _broken_rules(one, items(schema), f"{path}[{number}]")


@cache
def _program(rule: str) -> cel.Program:
    return cel.compile(rule)
