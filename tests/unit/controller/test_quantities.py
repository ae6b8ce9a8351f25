"""Quantities as Kubernetes writes them."""

from __future__ import annotations

from decimal import Decimal

import pytest

from mmcore.controller.quantities import memory_bytes, quantity, total_memory_limit


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", "1"),
        (2, "2"),
        ("500m", "0.5"),
        ("1.5Gi", str(1.5 * 2**30)),
        ("2e3", "2000"),
        ("3k", "3000"),
        ("-1", "-1"),
        (".5", "0.5"),
        ("1E", "1e18"),
    ],
)
def test_a_quantity(text: object, number: str) -> None:
    assert quantity(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "Gi", "1 Gi", "1GB", "1g", "1.2.3", None])
def test_no_quantity(text: object) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        quantity(text)


def test_memory_is_whole_bytes() -> None:
    assert memory_bytes("1.5") == 2


def test_a_container_without_a_limit_has_none() -> None:
    limited: dict[str, object] = {"resources": {"limits": {"memory": "1Gi"}}}
    assert total_memory_limit([limited, limited]) == 2 * 2**30
    assert total_memory_limit([limited, {}]) == 0
