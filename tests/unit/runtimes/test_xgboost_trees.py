"""Trees walked here answer as XGBoost does, bit for bit; models with more in them stay with the library."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

xgboost = pytest.importorskip("xgboost")

from mmcore.runtimes import ubjson  # noqa: E402
from mmcore.runtimes.xgboost import _Booster  # noqa: E402

WIDTH = 5
_RANDOM = np.random.default_rng(3)
ROWS = _RANDOM.normal(size=(300, WIDTH)).astype(np.float32)
ROWS[_RANDOM.random(ROWS.shape) < 0.1] = np.nan
VALUES = _RANDOM.normal(size=300).astype(np.float32)
CLASSES = _RANDOM.integers(0, 3, 300)

OBJECTIVES: dict[str, tuple[Any, dict[str, Any]]] = {
    "reg:squarederror": (VALUES, {}),
    "reg:squarederror scored": (VALUES, {"base_score": 0.7}),
    "reg:absoluteerror": (VALUES, {}),
    "reg:pseudohubererror": (VALUES, {}),
    "reg:quantileerror": (VALUES, {"quantile_alpha": 0.3}),
    "reg:gamma": (abs(VALUES) + 0.1, {}),
    "reg:tweedie": (abs(VALUES), {}),
    "count:poisson": (CLASSES, {"base_score": 0.37}),
    "binary:logistic": (VALUES > 0, {}),
    "binary:logistic scored": (VALUES > 0, {"base_score": 0.123}),
    "reg:logistic": (VALUES > 0, {}),
    "binary:logitraw": (VALUES > 0, {}),
    "multi:softprob": (CLASSES, {"num_class": 3}),
    "multi:softmax": (CLASSES, {"num_class": 3}),
    "multi:softprob forest": (CLASSES, {"num_class": 3, "num_parallel_tree": 3, "subsample": 0.5}),
}


def trained(labels: Any, options: dict[str, Any], rounds: int = 6) -> Any:
    options = {"nthread": 1, "seed": 1} | options
    return xgboost.train(options, xgboost.DMatrix(ROWS, labels), rounds)


BOOSTERS = {
    name: trained(labels, {"objective": name.split()[0], **options}) for name, (labels, options) in OBJECTIVES.items()
}


def walked(booster: Any) -> bool:
    """Whether the library was let go of."""
    return not hasattr(_Booster(booster), "_handle")


@pytest.mark.parametrize("name", BOOSTERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_answers_are_the_librarys_own(name: str, data: st.DataObject) -> None:
    ours, library = _Booster(BOOSTERS[name]), _Booster(BOOSTERS[name], direct=False)
    assert not hasattr(ours, "_handle")
    dtype = data.draw(st.sampled_from([np.float32, np.float64, np.int32, np.int64, np.uint8, np.float16]))
    floating = np.issubdtype(dtype, np.floating)
    bound = 1e4 if floating else 100
    elements = (
        st.floats(-bound, bound, width=np.dtype(dtype).itemsize * 8) | st.sampled_from([np.nan, np.inf, -np.inf])
        if floating
        else st.integers(0, 100)
    )
    rows = data.draw(arrays(dtype, st.tuples(st.integers(1, 4), st.just(WIDTH)), elements=elements))
    assert ours.values(rows).tobytes() == library.values(rows).tobytes()
    assert ours.margins(rows).tobytes() == library.margins(rows).tobytes()


def test_file_is_read_as_it_is_where_this_release_has_written_it() -> None:
    written = bytes(BOOSTERS["reg:squarederror"].save_raw("ubj"))
    end = written[written.rindex(b"version") :]
    other = BOOSTERS["binary:logistic"]
    library = _Booster(other, direct=False)
    # Told by giving it the file of another model.
    assert _Booster(other, file=written).objective == "reg:squarederror"
    for file in (
        written[: -len(end)] + end.replace(b"\x03", b"\x01", 1),
        b"{L\0\0\0\0\0\0\0\x07learnerZ" + b"U\x01" + end,
        b"{L" + b"\xff" * 8 + end,
        b"{i" + b"\0" * 8 + end,
        b"{" * 5000 + end,
        bytes(other.save_raw("json")),
    ):
        ours = _Booster(other, file=file)
        assert ours.objective == "binary:logistic"
        assert ours.values(ROWS).tobytes() == library.values(ROWS).tobytes()


def test_values_that_a_tree_compares_with_go_the_librarys_way() -> None:
    booster = BOOSTERS["reg:squarederror"]
    trees = ubjson.read(bytes(booster.save_raw("ubj")))["learner"]["gradient_booster"]["model"]["trees"]
    conditions = np.concatenate([tree["split_conditions"][tree["left_children"] != -1] for tree in trees])
    assert len(conditions) > 20
    rows = np.array([[value] * WIDTH for value in conditions], np.float32)
    assert np.array_equal(_Booster(booster).values(rows), _Booster(booster, direct=False).values(rows))


def test_a_model_stopped_early_answers_from_its_best_iteration() -> None:
    matrix = xgboost.DMatrix(ROWS, VALUES)
    other = xgboost.DMatrix(ROWS[:50], VALUES[:50][::-1])
    booster = xgboost.train(
        {"nthread": 1}, matrix, 40, evals=[(other, "other")], early_stopping_rounds=3, verbose_eval=False
    )
    assert booster.best_iteration + 1 < booster.num_boosted_rounds()
    ours, library = _Booster(booster), _Booster(booster, direct=False)
    assert walked(booster)
    assert np.array_equal(ours.values(ROWS), library.values(ROWS))
    every_round = (0, booster.num_boosted_rounds())
    assert not np.array_equal(ours.values(ROWS)[:, 0], booster.predict(matrix, iteration_range=every_round))


@pytest.mark.parametrize(
    "booster",
    [
        trained(VALUES > 0, {"objective": "binary:hinge"}),
        trained(VALUES, {"booster": "dart", "rate_drop": 0.5}),
        trained(VALUES, {"booster": "gblinear"}),
        trained(np.stack([VALUES, -VALUES], axis=1), {"multi_strategy": "one_output_per_tree"}),
        trained(np.stack([VALUES, -VALUES], axis=1), {"multi_strategy": "multi_output_tree"}),
    ],
    ids=["hinge", "dart", "linear", "two targets", "vector leaves"],
)
def test_models_with_more_in_them_stay_with_the_library(booster: Any) -> None:
    assert not walked(booster)
    rows = ROWS[:3]
    expected = booster.predict(xgboost.DMatrix(rows)).reshape(3, -1)
    np.testing.assert_allclose(_Booster(booster).values(rows), expected, rtol=1e-6)


def test_categories_stay_with_the_library() -> None:
    columns = np.stack([CLASSES, ROWS[:, 0]], axis=1)
    matrix = xgboost.DMatrix(columns, VALUES, feature_types=["c", "float"], enable_categorical=True)
    assert not walked(xgboost.train({"nthread": 1, "max_cat_to_onehot": 1}, matrix, 3))


def test_a_model_stays_with_the_library_where_its_trees_answer_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        __import__("mmcore.runtimes.xgboost_trees", fromlist=[""])._TRANSFORMS, "binary:hinge", "sigmoid"
    )
    assert not walked(trained(VALUES > 0, {"objective": "binary:hinge"}))


def test_ubjson_reads_what_the_library_writes() -> None:
    booster = BOOSTERS["multi:softprob"]

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, np.ndarray):
            return value.tolist()
        return [plain(one) for one in value] if isinstance(value, list) else value

    def close(found: Any, right: Any) -> bool:
        if isinstance(right, dict):
            return found.keys() == right.keys() and all(close(found[key], right[key]) for key in right)
        if isinstance(right, list):
            return len(found) == len(right) and all(map(close, found, right))
        return bool(found == right or np.float32(found) == np.float32(right))

    assert close(plain(ubjson.read(bytes(booster.save_raw("ubj")))), json.loads(booster.save_raw("json")))


def test_ubjson_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'H' is no kind of value"):
        ubjson.read(b"{L" + (1).to_bytes(8, "big") + b"aH")
