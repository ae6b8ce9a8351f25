"""Where requests carry the name of their model, by method: the file of ``--dataplane-config``.

The file is ModelMesh's: ``{"rpcConfigs": {"package.Service/Method": {"idExtractionPath": [1], "vModelId": true}},
"allowOtherRpcs": false}``. A path is the numbers of the fields that lead to the name. Without a file every method is
allowed, and the name is where the v2 protocol has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from mmcore.errors import Unimplemented
from mmcore.routing import Kind

#: How deep a path may lead; the limit of ``ext/pbwire.pyx``.
_LONGEST_PATH: Final = 8
_LARGEST_FIELD: Final = 2**29 - 1


@dataclass(frozen=True, slots=True)
class RpcConfig:
    """One method: where its requests hold the name (nowhere stated: an empty path), and what kind of name that is."""

    path: tuple[int, ...] = ()
    kind: Kind = Kind.ANY


@dataclass(frozen=True, slots=True)
class DataplaneConfig:
    """The methods that are configured, as ``package.Service/Method``, and whether others are served."""

    rpcs: Mapping[str, RpcConfig] = field(default_factory=dict)
    allows_others: bool = True

    def of(self, method: str) -> RpcConfig:
        """What is said of a method.

        Raises:
            Unimplemented: it is not listed, and others are not allowed.
        """
        found = self.rpcs.get(method)
        if found is not None:
            return found
        if not self.allows_others:
            raise Unimplemented(f"Method not found or not permitted: {method}")
        return RpcConfig()


def parse_dataplane_config(text: str) -> DataplaneConfig:
    """Read the file's JSON.

    Raises:
        ValueError: it is not JSON, or has an unknown field or a value of the wrong kind; the text names it.
    """
    content = _fields(json.loads(text), "the file", {"rpcConfigs": dict, "allowOtherRpcs": bool})
    rpcs = {}
    for method, entry in content.get("rpcConfigs", {}).items():
        what = f"rpcConfigs[{method!r}]"
        if method.count("/") != 1 or method.startswith("/") or method.endswith("/"):
            raise ValueError(f"{what}: a method is written package.Service/Method")
        one = _fields(entry, what, {"idExtractionPath": list, "vModelId": bool})
        path = tuple(one.get("idExtractionPath", ()))
        if len(path) > _LONGEST_PATH or not all(map(_is_field_number, path)):
            raise ValueError(
                f"{what}.idExtractionPath: not a list of up to {_LONGEST_PATH} field numbers: {list(path)}"
            )
        rpcs[method] = RpcConfig(path, Kind.VMODEL if one.get("vModelId", False) else Kind.MODEL)
    return DataplaneConfig(rpcs, content.get("allowOtherRpcs", False))


def _is_field_number(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_FIELD


def _fields(value: object, what: str, known: Mapping[str, type]) -> dict[str, Any]:
    """``value`` checked to be an object with the known fields alone."""
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected an object, got {type(value).__name__}")
    for name, content in value.items():
        if name not in known:
            raise ValueError(f"{what}: unknown field {name!r}; known are {', '.join(known)}")
        if type(content) is not known[name]:
            raise ValueError(f"{what}.{name}: expected {known[name].__name__}, got {type(content).__name__}")
    return value
