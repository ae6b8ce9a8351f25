"""Which instances may host a type of model, and which should: by labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

#: The entry for types that have none of their own.
DEFAULT: Final = "_default"


@dataclass(frozen=True, slots=True)
class Constraint:
    """All of ``required`` must be on an instance; one of ``preferred`` makes it a preferred one."""

    required: frozenset[str] = frozenset()
    preferred: frozenset[str] = frozenset()


_NONE: Final = Constraint()


class TypeConstraints:
    """The constraints by type of model, as ModelMesh's type-constraints file has them."""

    __slots__ = ("_by_type",)

    def __init__(self, by_type: Mapping[str, Constraint] | None = None) -> None:
        self._by_type: Final = dict(by_type or {})

    @classmethod
    def of(cls, document: object) -> TypeConstraints:
        """From ``{"<type>": {"required": [labels], "preferred": [labels]}, "_default": …}``; ValueError otherwise."""
        if not isinstance(document, Mapping):
            raise ValueError("type constraints must be an object of types")
        return cls({str(name): _constraint(str(name), entry) for name, entry in document.items()})

    def key(self, model_type: str) -> str:
        """The entry that a type goes by: types of one entry share their instances."""
        return model_type if model_type in self._by_type else DEFAULT

    def get(self, key: str) -> Constraint:
        """The constraint of an entry; nothing where there is none."""
        return self._by_type.get(key, _NONE)

    def allows(self, key: str, labels: frozenset[str]) -> bool:
        """Whether an instance with these labels may host types of this entry."""
        return self.get(key).required <= labels

    def prefers(self, key: str, labels: frozenset[str]) -> bool:
        """Whether it should. A type that states no preference leaves alone what others need or prefer and it does not.

        That keeps rare instances (with a GPU, say) free for the models they are there for.
        """
        own = self.get(key)
        if own.preferred:
            return not own.preferred.isdisjoint(labels)
        return all(
            (other.required | other.preferred).isdisjoint(labels - own.required)
            for name, other in self._by_type.items()
            if name != key
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TypeConstraints) and self._by_type == other._by_type

    __hash__ = None  # type: ignore[assignment]


def _constraint(name: str, entry: Any) -> Constraint:
    if not isinstance(entry, Mapping):
        raise ValueError(f"type constraint of {name!r} must be an object")
    labels = {}
    for key in ("required", "preferred"):
        value = entry.get(key, [])
        if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
            raise ValueError(f"{key!r} of type constraint {name!r} must be a list of labels")
        labels[key] = frozenset(value)
    return Constraint(labels["required"], labels["preferred"])
