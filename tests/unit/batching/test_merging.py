"""Requests run as one, their answers taken apart, and what becomes of faults in that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmcore._ext.batches import can_merge, merge, part, rows_together
from mmcore.batching.merging import CHECKED_EVERY, Merging, merging_of
from mmcore.errors import InvalidRequest
from mmcore.model import ModelSettings, TensorSpec
from tests.unit.models_in_memory import FakeModel

Arrays = dict[str, NDArray[Any]]


def x(*values: float) -> Arrays:
    return {"X": np.array(values, np.float32)}


class Infer:
    """Doubles its input and keeps what it was asked."""

    def __init__(self, answer: Callable[[NDArray[Any]], NDArray[Any]] = lambda array: array * 2) -> None:
        self.asked: list[list[float]] = []
        self.answer = answer

    def __call__(self, inputs: Mapping[str, NDArray[Any]], names: Sequence[str]) -> list[tuple[str, str, Any]]:
        self.asked.append(inputs["X"].tolist())
        return [("Y", "FP32", self.answer(inputs["X"]))]


def merging(*, trusted: bool = True) -> Merging:
    return Merging("m", most_rows=100, trusted=trusted)


def run(one: Merging, infer: Infer, *members: Arrays, check: bool = False) -> list[Any]:
    results = one.run(infer, list(members), [len(member["X"]) for member in members], (), check=check)
    return [result.error or result.outputs[0][2].tolist() for result in results]  # type: ignore[index]  # no error


@given(st.lists(st.integers(1, 5), min_size=1, max_size=10), st.sampled_from(["float32", "int64", "object"]))
def test_what_is_merged_and_taken_apart_is_what_it_was(counts: list[int], dtype: str) -> None:
    members = [
        {"A": np.arange(count * 3).reshape(count, 3).astype(dtype) + at, "B": np.full((count,), at)}
        for at, count in enumerate(counts)
    ]
    assert all(rows_together(member) == count for member, count in zip(members, counts, strict=True))
    assert all(can_merge(members[0], member) for member in members)
    together = merge(members)
    assert together["A"].shape == (sum(counts), 3)
    parts = part([("A", "X", together["A"]), ("B", "X", together["B"])], counts)
    assert parts is not None
    for member, outputs in zip(members, parts, strict=True):
        for (name, _, array), (key, given_array) in zip(outputs, member.items(), strict=True):
            assert name == key
            assert array.dtype == given_array.dtype
            np.testing.assert_array_equal(array, given_array)


@pytest.mark.parametrize(
    "other",
    [
        {"A": np.zeros((2, 4), np.float32)},
        {"A": np.zeros((2, 3), np.float64)},
        {"A": np.zeros((2, 3, 1), np.float32)},
        {"B": np.zeros((2, 3), np.float32)},
        {"A": np.zeros((2, 3), np.float32), "B": np.zeros(2)},
        {},
    ],
)
def test_requests_of_another_kind_are_not_merged(other: Arrays) -> None:
    assert not can_merge({"A": np.zeros((1, 3), np.float32)}, other)


@pytest.mark.parametrize(
    "inputs",
    [{}, {"A": np.zeros((0, 3))}, {"A": np.array(1.0)}, {"A": np.zeros((2, 3)), "B": np.zeros((3, 3))}],
    ids=["none", "no rows", "a scalar", "different rows"],
)
def test_requests_without_rows_in_common_are_not_merged(inputs: Arrays) -> None:
    assert rows_together(inputs) == -1


def test_an_output_that_has_not_a_row_for_each_is_not_taken_apart() -> None:
    for array in (np.zeros(4), np.zeros((2, 3)), np.array(1.0), [1, 2, 3]):
        assert part([("Y", "FP32", array)], [1, 2]) is None  # type: ignore[list-item]  # a list is no array


def test_merged_requests_run_once() -> None:
    infer = Infer()
    assert run(merging(), infer, x(1, 2), x(3), x(4, 5)) == [[2, 4], [6], [8, 10]]
    assert infer.asked == [[1, 2, 3, 4, 5]]


def test_one_bad_request_does_not_fail_the_others() -> None:
    def picky(array: NDArray[Any]) -> NDArray[Any]:
        if (array < 0).any():
            raise InvalidRequest("negative")
        return array * 2

    one = merging()
    for _ in range(10):
        first, second, third = run(one, Infer(picky), x(1), x(-2), x(3))
        assert (first, third) == ([2], [6])
        assert isinstance(second, InvalidRequest)
    assert one.active


def test_an_answer_of_the_wrong_length_is_asked_for_again_one_by_one() -> None:
    infer = Infer(lambda array: array[:1] * 2)
    one = merging()
    for _ in range(3):
        assert one.active
        assert run(one, infer, x(1), x(2)) == [[2], [4]]
    # It fails whenever requests are merged, so they are not any more.
    assert not one.active


def test_a_model_whose_rows_depend_on_one_another_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    infer = Infer(lambda array: array - array.mean())
    one = merging(trusted=False)
    assert one.check_due(x(1), x(3))
    assert run(one, infer, x(1), x(3), check=True) == [[0], [0]]
    assert not one.active
    assert "answers a request otherwise when it is merged" in caplog.text


def test_the_first_batches_and_then_some_are_compared() -> None:
    one = merging(trusted=False)
    due = [one.check_due(x(1), x(2)) for _ in range(3 * CHECKED_EVERY)]
    assert due[:5] == [True] * 5
    assert sum(due[5:]) == 2
    equal = merging(trusted=False)
    assert [equal.check_due(x(1), x(1)) for _ in range(10)] == [True] + [False] * 9
    assert not merging(trusted=True).check_due(x(1), x(2))


def test_a_compared_batch_bears_differences_of_rounding_and_nan() -> None:
    calls = iter([1.0, 1.0 + 1e-6])
    infer = Infer(lambda array: np.where(array > 4, np.nan, array * next(calls)))
    one = merging(trusted=False)
    assert run(one, infer, x(1), x(2, 3), check=True)[1] == [2, 3]
    assert one.active


def test_merged_by_default_are_built_in_formats_with_free_rows() -> None:
    model, plain = FakeModel(), ModelSettings()
    for model_format in ("sklearn", "xgboost", "lightgbm", "onnx"):
        assert merging_of("m", model_format, model, plain) is not None
    assert merging_of("m", "python", model, plain) is None
    assert merging_of("m", "onnx", model, ModelSettings(merges=False)) is None
    stated = merging_of("m", "python", model, ModelSettings(max_batch_size=8, merges=True))
    assert stated is not None
    assert stated.most_rows == 8
    for shape in ((), (4,), (1, -1)):
        model.outputs = (TensorSpec("Y", "FP32", shape),)
        assert merging_of("m", "onnx", model, plain) is None
