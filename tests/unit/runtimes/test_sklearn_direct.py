"""The arithmetic done in scikit-learn's place answers as it does, bit for bit, and leaves everything else to it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

pytest.importorskip("sklearn")

from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression, Ridge, RidgeClassifier, SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from mmcore.runtimes.sklearn_direct import direct

WIDTH = 6
METHODS = ("predict", "predict_proba", "decision_function")
_RANDOM = np.random.default_rng(5)
ROWS = _RANDOM.normal(size=(200, WIDTH)).astype(np.float32)
THREE = _RANDOM.integers(0, 3, 200)
NAMES = np.array(["rain", "snow", "sun"])[THREE]
VALUES = _RANDOM.normal(size=200)


def network(kind: type, labels: Any, activation: str = "relu") -> Any:
    """A network after a few rounds: it has not converged, and need not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator = kind(hidden_layer_sizes=(5, 4), activation=activation, max_iter=3, random_state=1)
        return estimator.fit(ROWS, labels)


FITTED = [
    LogisticRegression().fit(ROWS, THREE),
    LogisticRegression().fit(ROWS, THREE > 0),
    LogisticRegression().fit(ROWS, NAMES),
    SGDClassifier(random_state=1).fit(ROWS, NAMES),
    LinearSVC().fit(ROWS, THREE),
    LinearRegression().fit(ROWS, VALUES),
    LinearRegression().fit(ROWS, np.stack([VALUES, -VALUES], axis=1)),
    Ridge().fit(ROWS, VALUES),
    Lasso(alpha=0.01).fit(ROWS, VALUES),
    DecisionTreeClassifier(random_state=1).fit(ROWS, NAMES),
    DecisionTreeRegressor(random_state=1).fit(ROWS, VALUES),
    RandomForestClassifier(7, random_state=1).fit(ROWS, NAMES),
    ExtraTreesClassifier(7, random_state=1).fit(ROWS, THREE > 0),
    RandomForestRegressor(7, random_state=1).fit(ROWS, VALUES),
    make_pipeline(StandardScaler(), LogisticRegression()).fit(ROWS, NAMES),
    make_pipeline(MinMaxScaler(), StandardScaler(with_mean=False), Ridge()).fit(ROWS, VALUES),
    make_pipeline(StandardScaler(), RandomForestClassifier(5, random_state=1)).fit(ROWS, THREE),
    network(MLPRegressor, VALUES),
    network(MLPRegressor, np.stack([VALUES, -VALUES], axis=1)),
    network(MLPClassifier, NAMES, "tanh"),
    network(MLPClassifier, NAMES == "sun", "logistic"),
]
MISSING = np.where(_RANDOM.random(ROWS.shape) < 0.1, np.nan, ROWS)
FITTED.append(RandomForestRegressor(5, random_state=1, max_leaf_nodes=9).fit(MISSING, VALUES))
PAIRS = [
    pytest.param(estimator, method, id=f"{at}-{type(estimator).__name__}-{method}")
    for at, estimator in enumerate(FITTED)
    for method in METHODS
    if hasattr(estimator, method)
]


def same(found: Any, right: Any) -> bool:
    found, right = np.asarray(found), np.asarray(right)
    return (found.dtype, found.shape, found.tobytes()) == (right.dtype, right.shape, right.tobytes())


@pytest.mark.parametrize(("estimator", "method"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_answers_are_the_estimators_own(estimator: Any, method: str, data: st.DataObject) -> None:
    call = direct(estimator, method)
    assert call is not None
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    finite = st.floats(-1e6, 1e6, width=np.dtype(dtype).itemsize * 8)
    rows = data.draw(arrays(dtype, st.tuples(st.integers(1, 5), st.just(WIDTH)), elements=finite))
    given_rows = rows.copy()
    assert same(call(rows), getattr(estimator, method)(rows))
    assert same(rows, given_rows)


@pytest.mark.parametrize("estimator", FITTED)
@pytest.mark.parametrize(
    "rows",
    [
        np.full((1, WIDTH), np.nan, np.float32),
        np.full((1, WIDTH), np.inf, np.float64),
        np.zeros((1, WIDTH + 1), np.float32),
        np.zeros((0, WIDTH), np.float32),
        np.zeros(WIDTH, np.float32),
    ],
    ids=["nan", "infinite", "wide", "empty", "flat"],
)
def test_what_is_no_finite_matrix_of_the_right_width_goes_to_the_estimator(estimator: Any, rows: Any) -> None:
    def outcome(call: Any) -> Any:
        try:
            return np.asarray(call(rows)).tolist()
        except ValueError as error:
            return str(error)

    assert outcome(direct(estimator, "predict")) == outcome(estimator.predict)


def test_other_dtypes_go_to_the_estimator() -> None:
    call = direct(FITTED[0], "predict_proba")
    rows = np.arange(WIDTH, dtype=np.int64).reshape(1, WIDTH)
    assert call is not None
    assert same(call(rows), FITTED[0].predict_proba(rows))


class Contrary(LogisticRegression):
    def predict(self, X: Any) -> Any:
        return super().predict(X)[::-1]


class Doubtful(LogisticRegression):
    def decision_function(self, X: Any) -> Any:
        return -super().decision_function(X)


def test_a_subclass_that_overrides_a_method_is_left_alone() -> None:
    assert direct(Contrary().fit(ROWS, THREE), "predict") is None
    doubtful = Doubtful().fit(ROWS, THREE)
    assert [direct(doubtful, method) for method in METHODS] == [None, None, None]


@pytest.mark.parametrize(
    "estimator",
    [
        GaussianNB().fit(ROWS, THREE),
        RidgeClassifier().fit(ROWS, THREE),
        LogisticRegression().fit(ROWS, THREE).sparsify(),
        RandomForestClassifier(3).fit(ROWS, np.stack([THREE, THREE], axis=1)),
        network(MLPClassifier, np.stack([THREE > 0, THREE > 1], axis=1)),
        make_pipeline(GaussianNB()).fit(ROWS, THREE),
        make_pipeline(MinMaxScaler(clip=True), LogisticRegression()).fit(ROWS, THREE),
        make_pipeline("passthrough", LogisticRegression()).fit(ROWS, THREE),
    ],
)
def test_estimators_whose_arithmetic_is_not_known_are_left_alone(estimator: Any) -> None:
    assert direct(estimator, "predict") is None
