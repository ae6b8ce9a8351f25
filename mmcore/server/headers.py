"""What a request's metadata says of the models it is for, as clients of ModelMesh write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from mmcore.errors import InvalidRequest
from mmcore.routing import Kind

Metadata = Sequence[tuple[str, str | bytes]]

MODEL: Final = "mm-model-id"
VMODEL: Final = "mm-vmodel-id"
#: Of the system before ModelMesh; its clients are still about.
LEGACY_MODEL: Final = "tas-model-id"
_ID_HEADERS: Final = (MODEL, VMODEL, LEGACY_MODEL)
BALANCED: Final = "mm-balanced"
REQUIRED: Final = "mm-required"


class Asked(NamedTuple):
    """The models that a request names in its metadata, in the order of the headers; mostly one."""

    ids: tuple[str, ...]
    kind: Kind
    #: Whether it is an error that one of several is not there.
    all_required: bool


def asked(metadata: Metadata) -> Asked:
    """The models that the headers name.

    Raises:
        InvalidRequest: none, an empty id, one that is no UTF-8, both models and vmodels, or an unknown ``mm-required``.
    """
    models = _ids(metadata, MODEL) or _ids(metadata, LEGACY_MODEL)
    vmodels = _ids(metadata, VMODEL)
    if models and vmodels:
        raise InvalidRequest("must include only one of model id and vmodel id")
    ids = models or vmodels
    if not ids:
        raise InvalidRequest("the request names no model: must include mm-model-id header, or a name in its message")
    if not all(ids):
        raise InvalidRequest(f"provided {'model' if models else 'vmodel'}-id header must be non-empty")
    required = [value for name, value in metadata if name == REQUIRED]
    if required and required[-1] not in ("all", "any"):
        raise InvalidRequest(f"{REQUIRED} is 'all' or 'any', got {required[-1]!r}")
    return Asked(ids, Kind.MODEL if models else Kind.VMODEL, bool(required) and required[-1] == "all")


def the_one_asked(metadata: Metadata) -> tuple[str, Kind]:
    """The model that the headers name where a request can be for one alone, and how it is named.

    Raises:
        InvalidRequest: as :func:`asked` does, or they name several.
    """
    models = asked(metadata)
    if len(models.ids) > 1:
        raise InvalidRequest("only an inference of the built-in formats can be for several models")
    return models.ids[0], models.kind


def names_models(metadata: Metadata) -> bool:
    """Whether any header names a model or vmodel."""
    return any(name.removesuffix("-bin") in _ID_HEADERS for name, _ in metadata)


def balanced(metadata: Metadata) -> bool:
    """Whether the sender spreads its requests over the instances itself, so that a copy here should answer."""
    return any(name == BALANCED and value == "true" for name, value in metadata)


def _ids(metadata: Metadata, header: str) -> tuple[str, ...]:
    """All values of a header, or where it is absent of its binary form."""
    plain = tuple(value for name, value in metadata if name == header and isinstance(value, str))
    if plain:
        return plain
    try:
        return tuple(value.decode() for name, value in metadata if name == f"{header}-bin" and isinstance(value, bytes))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{header}-bin is not UTF-8: {error}") from None
