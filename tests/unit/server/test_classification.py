from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmcore.errors import InvalidRequest
from mmcore.server.classification import classify


def texts(array: np.ndarray[Any, Any], count: int, labels: tuple[str, ...] = ()) -> Any:
    return classify("scores", "FP32", array, count, labels).tolist()


def test_the_largest_come_first_with_index_and_label() -> None:
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], dtype=np.float32)
    assert texts(scores, 2, ("cat", "dog", "owl")) == [
        [b"0.700000:1:dog", b"0.200000:2:owl"],
        [b"0.500000:0:cat", b"0.250000:1:dog"],
    ]


def test_labels_may_be_missing_for_some_or_all() -> None:
    assert texts(np.array([[1.0, 2.0, 3.0]], np.float32), 3, ("a", "")) == [
        [b"3.000000:2", b"2.000000:1", b"1.000000:0:a"]
    ]


def test_more_than_there_are_classes_gives_all() -> None:
    assert classify("o", "FP32", np.zeros((4, 3), np.float32), 9, ()).shape == (4, 3)


def test_a_vector_is_one_row() -> None:
    assert texts(np.array([3, 9, 4], np.int64), 1) == [b"9:1"]


def test_further_dimensions_are_classes_too() -> None:
    assert texts(np.arange(8, dtype=np.uint8).reshape(2, 2, 2), 1) == [[b"3:3"], [b"7:3"]]


def test_equal_values_keep_their_order_and_nan_comes_last() -> None:
    assert texts(np.array([[1, 1, 1]], np.float32), 3) == [[b"1.000000:0", b"1.000000:1", b"1.000000:2"]]
    assert texts(np.array([[np.nan, 1, 2]], np.float32), 3)[0][2] == b"nan:0"


def test_an_empty_batch_and_no_classes_are_answered_empty() -> None:
    assert classify("o", "FP32", np.zeros((0, 3), np.float32), 2, ()).shape == (0, 0)
    assert classify("o", "FP32", np.zeros((2, 0), np.float32), 2, ()).shape == (2, 0)


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'names' of datatype BYTES"):
        classify("names", "BYTES", np.array([[b"a"]], dtype=object), 1, ())
    with pytest.raises(InvalidRequest, match="at least 1, got 0"):
        classify("o", "FP32", np.zeros((1, 1), np.float32), 0, ())
