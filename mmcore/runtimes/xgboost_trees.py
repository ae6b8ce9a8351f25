"""The trees of an XGBoost model, to be walked by :class:`mmcore._ext.trees.Forest` instead of the library.

One row through ``XGBoosterPredictFromDense`` takes some 100 µs whatever the model, of which a small model's trees take
one; and the library holds about six times the memory. Each model's answers are compared with the library's own, bit by
bit, before it is let go of. Models with more in them (categories, dropped trees, several targets) stay with it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from mmcore._ext.trees import Forest
from mmcore.runtimes.interface import Array

log = logging.getLogger(__name__)

#: What becomes of the sums, by objective; the score that they start from is stated as after it.
_TRANSFORMS: Final = {
    "reg:squarederror": "identity",
    "reg:squaredlogerror": "identity",
    "reg:pseudohubererror": "identity",
    "reg:absoluteerror": "identity",
    "reg:quantileerror": "identity",
    "binary:logitraw": "identity",
    "rank:pairwise": "identity",
    "rank:ndcg": "identity",
    "rank:map": "identity",
    "reg:logistic": "sigmoid",
    "binary:logistic": "sigmoid",
    "count:poisson": "exponential",
    "reg:gamma": "exponential",
    "reg:tweedie": "exponential",
    "multi:softprob": "softmax",
    "multi:softmax": "largest",
}
_COMPARED_ROWS: Final = 6
_SEED: Final = 5


def forest(
    learner: dict[str, Any], *, iterations: int, values: Callable[[Array], Array], margins: Callable[[Array], Array]
) -> Forest | None:
    """The model's first ``iterations`` (0: all) as a forest that answers as ``values`` and ``margins`` do, or None.

    ``learner`` is what the library writes as UBJSON; the functions are the library's own, FP32 [n, columns].
    """
    transform = _TRANSFORMS.get(learner["objective"]["name"])
    booster = learner["gradient_booster"]
    if transform is None or booster["name"] != "gbtree":
        return None
    trees = _trees(booster["model"], iterations)
    shape = learner["learner_model_param"]
    columns = max(int(shape["num_class"]), 1)
    if trees is None or int(shape["num_target"]) > 1:
        return None
    base = _base(shape["base_score"], columns, transform)
    if base is None:
        return None
    width = int(shape["num_feature"])
    rows = _rows(width, trees)
    right = values(rows), margins(rows)
    # Releases differ in whether the score is what the sums begin with or what is added at the end.
    for base_last in (True, False):
        found = Forest(width, columns, trees, base, transform, base_last)
        if all(map(_same, (found.values(rows), found.margins(rows)), right)):
            return found
    log.info("a model of objective %s is left to XGBoost: its answers are not those of its trees", transform)
    return None


def _trees(model: dict[str, Any], iterations: int) -> list[tuple[int, Any, Any, Any, Any, Any]] | None:
    """The trees as :class:`Forest` takes them; None where they have more than comparisons of numbers and one value."""
    ends = model["iteration_indptr"]
    count = int(ends[iterations]) if iterations else len(model["trees"])
    found = []
    for group, tree in zip(model["tree_info"][:count], model["trees"][:count], strict=True):
        if tree["tree_param"]["size_leaf_vector"] not in ("0", "1") or len(tree["categories_nodes"]):
            return None
        left, right, feature = (
            np.ascontiguousarray(tree[key], np.int32) for key in ("left_children", "right_children", "split_indices")
        )
        value = np.ascontiguousarray(tree["split_conditions"], np.float32)
        found.append((int(group), left, right, feature, value, np.ascontiguousarray(tree["default_left"], np.uint8)))
    return found


def _base(stated: str, columns: int, transform: str) -> Array | None:
    """What the sums begin with, FP32 [columns]: the score stated, on the side of the trees; None where it has none."""
    scores = np.array([float(score) for score in stated.strip("[]").split(",")], np.float32)
    if (transform in ("sigmoid", "exponential") and min(scores) <= 0) or (transform == "sigmoid" and max(scores) >= 1):
        return None
    # The C library's logarithm of an FP32 is the exact one rounded; numpy's is not always.
    if transform == "sigmoid":
        one = np.float32(1)
        scores = np.array([-math.log(one / score - one) for score in scores], np.float32)
    elif transform == "exponential":
        scores = np.array([math.log(score) for score in scores], np.float32)
    return np.broadcast_to(scores, columns).copy()


def _rows(width: int, trees: list[tuple[int, Any, Any, Any, Any, Any]]) -> Array:
    """Rows to compare answers of: numbers of any size, those that the trees compare with, and missing ones."""
    random = np.random.default_rng(_SEED)
    rows = random.normal(scale=10.0 ** random.integers(-2, 3, (_COMPARED_ROWS, width)))
    for _, left, _, feature, value, _ in trees[:: max(1, len(trees) // 16)]:
        inner = np.flatnonzero(left != -1)[:width]
        rows[random.integers(0, _COMPARED_ROWS, len(inner)), feature[inner]] = value[inner]
    rows[random.random(rows.shape) < 1 / _COMPARED_ROWS] = np.nan
    return rows.astype(np.float32)


def _same(found: Array, right: Array) -> bool:
    return found.shape == right.shape and found.dtype == right.dtype and found.tobytes() == right.tobytes()
