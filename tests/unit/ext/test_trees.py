"""The trees' walk: which way a row goes, what sums and transforms are, and that no array leads out of bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmcore._ext.trees import Forest, MeanForest

NAN = float("nan")


def tree(column: int = 0, default_left: int = 1, low: float = -1.0, high: float = 2.0) -> tuple[Any, ...]:
    """Feature 1 below 0.5: ``low``, else ``high``."""
    return (
        column,
        np.array([1, -1, -1], np.int32),
        np.array([2, -1, -1], np.int32),
        np.array([1, 0, 0], np.int32),
        np.array([0.5, low, high], np.float32),
        np.array([default_left, 0, 0], np.uint8),
    )


def test_a_row_goes_left_below_the_condition_and_where_it_is_told_when_missing() -> None:
    rows = np.array([[0, 0.4], [0, 0.5], [0, 0.6], [0, NAN], [0, np.inf], [0, -np.inf]], np.float32)
    for default_left, missing in ((1, -1.0), (0, 2.0)):
        found = Forest(2, 1, [tree(default_left=default_left)], [10.0], "identity").margins(rows)
        assert found.ravel().tolist() == [9.0, 12.0, 12.0, 10.0 + missing, 12.0, 9.0]


def test_each_tree_adds_to_its_column() -> None:
    forest = Forest(2, 3, [tree(0), tree(2), tree(2, high=5.0)], [0.0, 1.0, 2.0], "identity")
    assert forest.margins(np.ones((1, 2), np.float32)).tolist() == [[2.0, 1.0, 9.0]]


def test_sums_begin_with_the_base_or_end_with_it() -> None:
    # 1e8 + 1 is 1e8 in FP32: the order shows.
    trees = [tree(high=1.0), tree(high=1e8), tree(high=-1e8)]
    row = np.ones((1, 2), np.float32)
    assert Forest(2, 1, trees, [1.0], "identity").margins(row).tolist() == [[0.0]]
    assert Forest(2, 1, trees, [1.0], "identity", base_last=True).margins(row).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ("identity", [[0.0, 1.0]]),
        ("sigmoid", [[0.5, 1 / (1 + np.exp(-1.0))]]),
        ("exponential", [[1.0, np.e]]),
        ("softmax", [[1 / (1 + np.e), np.e / (1 + np.e)]]),
        ("largest", [[1.0]]),
    ],
)
def test_transforms(transform: str, expected: list[list[float]]) -> None:
    forest = Forest(2, 2, [], [0.0, 1.0], transform)
    np.testing.assert_allclose(forest.values(np.zeros((1, 2), np.float32)), expected, rtol=1e-6)


def test_extreme_margins_stay_numbers() -> None:
    forest = Forest(2, 2, [], [-1e30, 1e30], "sigmoid")
    assert forest.values(np.zeros((1, 2))).tolist() == [[pytest.approx(0.0, abs=1e-37), 1.0]]
    assert Forest(2, 2, [], [-1e30, 1e30], "softmax").values(np.zeros((1, 2))).tolist() == [[0.0, 1.0]]


def test_rows_of_other_dtypes_and_layouts_and_none_at_all() -> None:
    forest = Forest(2, 1, [tree()], [0.0], "identity")
    rows = np.arange(8, dtype=np.int64).reshape(2, 4)[:, ::2]
    assert forest.margins(rows).tolist() == [[2.0], [2.0]]
    assert forest.values(np.zeros((0, 2), np.float32)).shape == (0, 1)


def test_rows_of_another_width_are_refused() -> None:
    forest = Forest(2, 1, [tree()], [0.0], "identity")
    with pytest.raises(ValueError, match="rows have 3 features, the model takes 2"):
        forest.margins(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize(
    ("place", "node", "value", "reason"),
    [
        (1, 0, 3, "child that is not behind it"),
        (2, 0, -5, "child that is not behind it"),
        (1, 0, 0, "child that is not behind it"),
        (3, 0, 2, "looks at feature 2 of 2"),
        (3, 0, -1, "looks at feature -1 of 2"),
    ],
)
def test_nodes_that_lead_out_of_bounds_are_refused(place: int, node: int, value: int, reason: str) -> None:
    bad = tree()
    bad[place][node] = value
    with pytest.raises(ValueError, match=reason):
        Forest(2, 1, [bad], [0.0], "identity")


def test_columns_and_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match="adds to column 1 of 1"):
        Forest(2, 1, [tree(1)], [0.0], "identity")
    with pytest.raises(ValueError, match="2 base values for 1 columns"):
        Forest(2, 1, [tree()], [0.0, 0.0], "identity")
    with pytest.raises(ValueError, match="differ in length"):
        Forest(2, 1, [(*tree()[:5], np.zeros(2, np.uint8))], [0.0], "identity")


#: As scikit-learn lays nodes out, with one field more.
NODE = np.dtype(
    [("left_child", "i8"), ("right_child", "i8"), ("feature", "i8"), ("threshold", "f8"), ("impurity", "f8")]
)


def grown(low: float = -1.0, high: float = 2.0, **changed: Any) -> tuple[Any, Any]:
    """Feature 1 up to 0.5: ``low`` and its double, beyond ``high`` and its double."""
    nodes = np.array([(1, 2, 1, 0.5, 0), (-1, -1, -2, -2, 0), (-1, -1, -2, -2, 0)], NODE)
    for name, value in changed.items():
        nodes[0][name] = value
    return nodes, np.array([[0.0, 0.0], [low, 2 * low], [high, 2 * high]])


def test_a_forest_answers_the_mean_of_its_trees_leaves() -> None:
    rows = np.array([[0, 0.5], [0, 0.6]], np.float32)
    forest = MeanForest(2, 2, [grown(), grown(low=4.0), grown(high=5.0)])
    assert forest.means(rows).tolist() == [[2 / 3, 4 / 3], [3.0, 6.0]]
    many = MeanForest(2, 2, [grown()] * 600)
    assert many.means(rows).tolist() == [[-1.0, -2.0], [2.0, 4.0]]


def test_a_forest_answers_some_columns_of_its_leaves_and_no_rows_at_all() -> None:
    nodes, leaves = grown()
    forest = MeanForest(2, 1, [(nodes, leaves[:, :1])])
    assert forest.means(np.ones((2, 2))).tolist() == [[2.0], [2.0]]
    assert forest.means(np.ones((0, 2))).shape == (0, 1)


@pytest.mark.parametrize("changed", [{"left_child": 0}, {"left_child": 3}, {"right_child": -1}, {"feature": 2}])
def test_nodes_that_lead_out_of_a_tree_or_back_are_refused(changed: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="node 0 of tree 1"):
        MeanForest(2, 2, [grown(), grown(**changed)])


def test_trees_of_other_arrays_are_refused() -> None:
    nodes, leaves = grown()
    with pytest.raises(ValueError, match="left_child"):
        MeanForest(2, 2, [(np.zeros(3), leaves)])
    with pytest.raises(ValueError, match="the leaves of tree 0"):
        MeanForest(2, 2, [(nodes, leaves[:2])])
    with pytest.raises(ValueError, match="the leaves of tree 0"):
        MeanForest(2, 2, [(nodes, leaves.astype(np.float32))])
    with pytest.raises(ValueError, match="the nodes of tree 0"):
        MeanForest(2, 2, [(nodes[::2], leaves[:2])])
    with pytest.raises(ValueError, match="without trees"):
        MeanForest(2, 2, [])
    with pytest.raises(ValueError, match="rows have 3 features, the forest takes 2"):
        MeanForest(2, 2, [grown()]).means(np.zeros((1, 3)))
