"""The codec's fuzz target on a fixed, seeded set of broken messages; a fuzzer goes further, see codec.py."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmcore._ext.v2codec import encode_infer_request, encode_infer_response
from tests import wire
from tests.fuzz.codec import fuzz_one

WORDS = np.array([b"some", b"", b"words"], object)
SEEDS = [
    encode_infer_request(
        "simple",
        [("INPUT0", "INT32", np.arange(16, dtype=np.int32).reshape(1, 16)), ("b", "BYTES", WORDS)],
        model_version="1",
        request_id="id",
        outputs=["o", "p"],
        raw=raw,
        parameters={"count": -1, "text": "ü"},
        input_parameters={"INPUT0": {"ratio": 0.5}},
    )
    for raw in (True, False)
] + [
    bytes(encode_infer_response("m", "2", "id", [("o", kind, array), ("w", "BYTES", WORDS)], raw=raw))  # type: ignore[arg-type]  # small, so bytes
    for raw in (True, False)
    for kind, array in (("FP32", np.ones(3, np.float32)), ("UINT64", np.array([2**64 - 1], np.uint64)))
]


def test_every_truncation_and_every_flipped_bit_is_read_or_refused() -> None:
    for seed in SEEDS[:2]:
        for size in range(len(seed)):
            fuzz_one(seed[:size])
            for bit in range(8):
                fuzz_one(seed[:size] + bytes([seed[size] ^ 1 << bit]) + seed[size + 1 :])


def test_random_changes_are_read_or_refused() -> None:
    chance = random.Random(7)
    for _ in range(20_000):
        body = chance.choice(SEEDS)
        if chance.random() < 0.2:  # two messages merged
            body += chance.choice(SEEDS)
        changes = [
            (chance.random(), chance.choice(("set", "flip", "delete", "insert", "cut")), chance.randrange(256))
            for _ in range(chance.randrange(1, 5))
        ]
        fuzz_one(wire.mutated(body, changes))


def test_random_bytes_are_read_or_refused() -> None:
    chance = random.Random(8)
    for _ in range(20_000):
        fuzz_one(chance.randbytes(chance.randrange(40)))


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(wire.requests | wire.responses, wire.mutations, st.booleans())
def test_odd_and_broken_messages_are_read_or_refused(body: bytes, changes: list[wire.Mutation], broken: bool) -> None:
    fuzz_one(wire.mutated(body, changes) if broken else body)
