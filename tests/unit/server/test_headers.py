"""The models that a request's metadata names."""

from __future__ import annotations

import pytest

from mmcore.errors import InvalidRequest
from mmcore.routing import Kind
from mmcore.server.headers import Asked, asked, balanced, names_models


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ([("mm-model-id", "m")], Asked(("m",), Kind.MODEL, False)),
        ([("mm-vmodel-id", "v")], Asked(("v",), Kind.VMODEL, False)),
        ([("tas-model-id", "m")], Asked(("m",), Kind.MODEL, False)),
        ([("mm-model-id-bin", "ä".encode())], Asked(("ä",), Kind.MODEL, False)),
        ([("mm-vmodel-id-bin", "ä".encode())], Asked(("ä",), Kind.VMODEL, False)),
        ([("mm-model-id-bin", b"b"), ("mm-model-id", "a")], Asked(("a",), Kind.MODEL, False)),
        ([("mm-model-id", "a"), ("x", "y"), ("mm-model-id", "b")], Asked(("a", "b"), Kind.MODEL, False)),
        ([("mm-model-id", "a"), ("mm-required", "all")], Asked(("a",), Kind.MODEL, True)),
        ([("mm-model-id", "a"), ("mm-required", "any")], Asked(("a",), Kind.MODEL, False)),
    ],
)
def test_ids_are_taken_in_their_order(metadata: list[tuple[str, str | bytes]], expected: Asked) -> None:
    assert asked(metadata) == expected
    assert names_models(metadata)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ([], "must include mm-model-id header"),
        ([("mm-balanced", "true")], "must include mm-model-id header"),
        ([("mm-model-id", "m"), ("mm-vmodel-id", "v")], "must include only one of model id and vmodel id"),
        ([("mm-model-id-bin", b"m"), ("mm-vmodel-id", "v")], "must include only one of model id and vmodel id"),
        ([("mm-model-id", "")], "provided model-id header must be non-empty"),
        ([("mm-vmodel-id", "")], "provided vmodel-id header must be non-empty"),
        ([("mm-model-id", "a"), ("mm-model-id", "")], "provided model-id header must be non-empty"),
        ([("mm-model-id-bin", b"\xff")], "mm-model-id-bin is not UTF-8"),
        ([("mm-model-id", "a"), ("mm-required", "some")], "mm-required is 'all' or 'any', got 'some'"),
    ],
)
def test_what_cannot_be_meant_is_refused(metadata: list[tuple[str, str | bytes]], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        asked(metadata)


def test_who_spreads_its_requests_says_so() -> None:
    assert balanced([("mm-balanced", "true")])
    assert not balanced([("mm-balanced", "false"), ("mm-model-id", "m")])
