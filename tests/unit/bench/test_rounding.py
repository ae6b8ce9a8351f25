"""Answers of networks: rounding is let pass, anything else is not."""

from __future__ import annotations

import struct

import pytest

from bench.load.rounding import RoundedAnswer


def answer(*values: float, head: bytes = b"head") -> bytes:
    return head + struct.pack(f"<{len(values)}f", *values)


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (answer(0.25, 0.75), True),
        (answer(0.25, 0.7500001), True),
        (answer(0.25, 0.7501), False),
        (answer(0.25, float("nan")), False),
        (answer(0.25, 0.75, head=b"heat"), False),
        (answer(0.25, 0.75, 0.0), False),
        (answer(0.25), False),
        (b"", False),
        (None, False),
    ],
)
def test_only_rounding_is_let_pass(found: bytes | None, right: bool) -> None:
    expected = RoundedAnswer(answer(0.25, 0.75), 2)
    for _ in range(2):  # the second time what was accepted is remembered
        assert (found != expected) is not right
        assert (expected == found) is right
