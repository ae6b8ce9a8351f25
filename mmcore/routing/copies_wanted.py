"""How many copies the owner of a registered model asks for: ``"copies"`` in the JSON of its key.

``{"copies": {"min": 2, "max": 4}}`` bounds what follows from its use, ``{"copies": {"everywhere": true}}`` asks for one
at each instance that may host it. All else of the key is the storage's (``mmcore/storage/places.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from mmcore.errors import InvalidRequest
from mmcore.model import ModelInfo

_FIELD: Final = "copies"
_KINDS: Final[dict[str, type]] = {"min": int, "max": int, "everywhere": bool}


@dataclass(frozen=True, slots=True)
class CopiesWanted:
    """The fewest and the most copies, 0 for no bound, and whether there is to be one at each instance."""

    min_copies: int = 0
    max_copies: int = 0
    everywhere: bool = False

    @property
    def at_once(self) -> int:
        """How many are loaded when the model is registered, used or not."""
        return max(self.min_copies, int(self.everywhere))


def copies_wanted(key: str) -> CopiesWanted:
    """What a model's key asks for; nothing where it is no JSON object, which whoever loads the model will tell.

    Raises:
        InvalidRequest: its ``copies`` are not as they should be; the text tells what of them.
    """
    stated: Any = _object(key).get(_FIELD)
    if stated is None:
        return CopiesWanted()
    if not isinstance(stated, dict):
        raise InvalidRequest("'copies' of the model's key must be an object")
    for name, value in stated.items():
        if name not in _KINDS:
            raise InvalidRequest(f"'copies' of the model's key has an unknown field '{name}'")
        if type(value) is not _KINDS[name] or stated[name] < 0:
            raise InvalidRequest(f"'{name}' of the model's copies must be a {_told(_KINDS[name])}, got {value!r}")
    wanted = CopiesWanted(stated.get("min", 0), stated.get("max", 0), stated.get("everywhere", False))
    if wanted.max_copies and wanted.min_copies > wanted.max_copies:
        raise InvalidRequest(f"a model cannot have {wanted.min_copies} copies at least, {wanted.max_copies} at most")
    return wanted


def same_model(one: ModelInfo, other: ModelInfo) -> bool:
    """Whether both are of the same model, however many copies of it they ask for."""
    if one == other:
        return True
    return (one.type, one.path, _without_copies(one.key)) == (other.type, other.path, _without_copies(other.key))


def _without_copies(key: str) -> object:
    """What a key says of everything else; the key itself where it is no JSON object, and nothing where it is empty."""
    if not key:
        return {}
    content = _object(key)
    return {name: value for name, value in content.items() if name != _FIELD} if content else key


def _object(key: str) -> dict[str, Any]:
    try:
        content = json.loads(key or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _told(kind: type) -> str:
    return "number that is not negative" if kind is int else "truth value"
