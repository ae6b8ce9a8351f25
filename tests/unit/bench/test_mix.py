"""A mix hands each call the request and the answer of the model whose turn it is."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from bench.load.mix import Mix, zipf_order


def test_exchanges_follow_the_order_again_and_again(tmp_path: Path) -> None:
    mix = Mix([(b"ask a", b"a", 0, "f"), (b"ask b", b"b", 0, "f")], np.array([1, 1, 0], np.int32))
    mix.write(tmp_path / "mix")
    taken = list(islice(Mix.read(tmp_path / "mix").exchanges(), 4))
    assert taken == [(b"ask b", b"b"), (b"ask b", b"b"), (b"ask a", b"a"), (b"ask b", b"b")]


@pytest.mark.parametrize(("code", "dtype"), [("f", np.float32), ("d", np.float64)])
def test_the_last_values_of_an_answer_may_be_rounded_otherwise(code: str, dtype: type) -> None:
    mix = Mix([(b"", b"head" + dtype(1).tobytes(), 1, code)], np.zeros(1, np.int32))
    _, expected = next(mix.exchanges())
    assert b"head" + dtype(1.000001).tobytes() == expected
    assert b"head" + dtype(1.1).tobytes() != expected


def test_popularity_falls_with_rank_and_is_dealt_to_models_at_random() -> None:
    order = zipf_order(1000, 100_000, seed=3)
    counts = np.sort(np.bincount(order, minlength=1000))[::-1]
    # The first of 1,000 has 1 / H(1000) = 13 % of all, ten times as many as the tenth.
    assert 0.12 < counts[0] / order.size < 0.15
    assert 7 < counts[0] / counts[9] < 13
    assert int(np.bincount(order, minlength=1000).argmax()) != 0
