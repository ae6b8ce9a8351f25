"""The arithmetic of scikit-learn's most common estimators, without the checks that it makes in every call.

A linear model answers one row in about two microseconds of arithmetic behind a hundred of validation, which repeats
what the request's signature has checked already. So the arithmetic is done here, operation for operation as
scikit-learn does it, for methods that are scikit-learn's own (a subclass that overrides one is left alone), and for
finite arrays of the dtypes named; everything else goes to the estimator, whose errors are then its own.

The first model of each make is asked both ways, and a make whose answers differ in a single bit is not done here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from scipy.special import expit
from sklearn.ensemble._forest import ForestClassifier, ForestRegressor
from sklearn.linear_model import ElasticNet, LinearRegression, LogisticRegression, Ridge
from sklearn.linear_model._base import LinearClassifierMixin, LinearModel
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.neural_network._base import ACTIVATIONS
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.tree import BaseDecisionTree, DecisionTreeClassifier

from mmcore._ext.trees import MeanForest
from mmcore.runtimes.interface import Array

log = logging.getLogger(__name__)

#: Makes that have been compared with their estimator's answers, and whether they were equal.
_EQUAL: Final[dict[tuple[str, ...], bool]] = {}
_COMPARED_ROWS: Final = 5
#: Methods that are ``X @ coef_.T + intercept_`` in other words; the regressors' names differ between releases.
_DECISION: Final = "_decision_function"
_LINEAR_DECISIONS: Final = (getattr(LinearModel, _DECISION), getattr(ElasticNet, _DECISION))
_LINEAR_PREDICTS: Final = (LinearModel.predict, LinearRegression.predict, Ridge.predict)


class _Step(NamedTuple):
    """What one estimator does to an array: its make, the dtypes it may be given, and the arithmetic."""

    make: str
    dtypes: str
    call: Callable[[Array], Array]


def direct(estimator: Any, method: str) -> Callable[[Array], Any] | None:
    """A function that answers as ``estimator.method`` does, bit for bit; None where that is not known to be quicker."""
    original = getattr(estimator, method)
    steps = _steps(estimator, method)
    if steps is None or not hasattr(estimator, "n_features_in_"):
        return None
    width = int(estimator.n_features_in_)
    dtypes = tuple(np.dtype(code) for code in "fd" if all(code in step.dtypes for step in steps))

    def call(features: Array) -> Any:
        if features.ndim != 2 or features.shape[1] != width or features.dtype not in dtypes:
            return original(features)
        if not len(features) or not np.isfinite(features).all():
            return original(features)
        value = features
        for step in steps:
            value = step.call(value)
        return value

    make = (method, *(step.make for step in steps))
    if make not in _EQUAL:
        _EQUAL[make] = all(_same(call, original, _rows(width, dtype)) for dtype in dtypes)
        if not _EQUAL[make]:
            log.info("%s of %s is left to scikit-learn: its arithmetic is not the one known here", method, make[1:])
    return call if _EQUAL[make] else None


def _rows(width: int, dtype: np.dtype[Any]) -> Array:
    return np.random.default_rng(7).normal(size=(_COMPARED_ROWS, width)).astype(dtype)


def _same(call: Callable[[Array], Any], original: Callable[[Array], Any], rows: Array) -> bool:
    found, right = np.asarray(call(rows)), np.asarray(original(rows))
    return found.dtype == right.dtype and found.shape == right.shape and found.tobytes() == right.tobytes()


def _steps(estimator: Any, method: str) -> Sequence[_Step] | None:
    if type(estimator) is Pipeline:
        found: list[_Step] = []
        for _, one in estimator.steps[:-1]:
            step = _step(one, "transform")
            if step is None:
                return None
            found.append(step)
        last = _step(estimator.steps[-1][1], method)
        return [*found, last] if last is not None else None
    step = _step(estimator, method)
    return [step] if step is not None else None


def _step(estimator: Any, method: str) -> _Step | None:
    own = getattr(type(estimator), method, None)
    if isinstance(getattr(estimator, "coef_", None), np.ndarray):
        return _linear(estimator, own)
    if own in (StandardScaler.transform, MinMaxScaler.transform):
        return _scaler(estimator)
    if own in (MLPClassifier.predict, MLPClassifier.predict_proba, MLPRegressor.predict):
        return _network(estimator, own)
    return _trees(estimator, own) if getattr(estimator, "n_outputs_", 0) == 1 else None


# Linear models (sklearn.linear_model._base).


def _linear(estimator: Any, own: object) -> _Step | None:
    scores_are_own = getattr(type(estimator), "decision_function", None) is LinearClassifierMixin.decision_function
    if own is LinearClassifierMixin.decision_function:
        return _Step("linear", "fd", _scores(estimator))
    if own is LinearClassifierMixin.predict and scores_are_own:
        return _linear_classes(estimator)
    if own is LogisticRegression.predict_proba and scores_are_own:
        return _logistic_probabilities(estimator)
    if own in _LINEAR_PREDICTS and getattr(type(estimator), _DECISION) in _LINEAR_DECISIONS:
        return _Step("linear regression", "fd", _linear_values(estimator))
    return None


def _scores(estimator: Any) -> Callable[[Array], Array]:
    weights = estimator.coef_.T if estimator.coef_.ndim == 2 else estimator.coef_
    intercept = estimator.intercept_

    def scores(features: Array) -> Array:
        found: Array = features @ weights + intercept
        return found.reshape(-1) if found.ndim > 1 and found.shape[1] == 1 else found

    return scores


def _linear_classes(estimator: Any) -> _Step:
    scores, classes = _scores(estimator), estimator.classes_

    def binary(features: Array) -> Array:
        found: Array = classes.take((scores(features) > 0).astype(np.int64), axis=0)
        return found

    def multiclass(features: Array) -> Array:
        found: Array = classes.take(scores(features).argmax(axis=1), axis=0)
        return found

    one_column = estimator.coef_.ndim == 1 or estimator.coef_.shape[0] == 1
    return _Step("binary", "fd", binary) if one_column else _Step("multiclass", "fd", multiclass)


def _logistic_probabilities(estimator: Any) -> _Step | None:
    scores = _scores(estimator)
    # Before 1.8 classes could be told one from the rest; such probabilities are no softmax.
    softmax = getattr(estimator, "multi_class", "deprecated") != "ovr" and estimator.solver != "liblinear"

    def binary(features: Array) -> Array:
        likely = expit(scores(features))
        return np.stack([1 - likely, likely], axis=1)

    def multiclass(features: Array) -> Array:
        found = scores(features)
        found -= found.max(axis=1).reshape(-1, 1)
        np.exp(found, out=found)
        found /= found.sum(axis=1).reshape(-1, 1)
        return found

    if len(estimator.classes_) <= 2:
        return _Step("binary logistic", "fd", binary)
    return _Step("multinomial logistic", "fd", multiclass) if softmax else None


def _linear_values(estimator: Any) -> Callable[[Array], Array]:
    weights = estimator.coef_.T if estimator.coef_.ndim == 2 else estimator.coef_
    intercept = estimator.intercept_

    def values(features: Array) -> Array:
        found: Array = features @ weights + intercept
        return found

    return values


# Scalers (sklearn.preprocessing._data); they work in the dtype of what they are given.


def _scaler(estimator: Any) -> _Step | None:
    if type(estimator) is StandardScaler:
        mean = estimator.mean_ if estimator.with_mean else None
        scale = estimator.scale_ if estimator.with_std else None

        def standardised(features: Array) -> Array:
            found = features.copy()
            if mean is not None:
                found -= mean.astype(found.dtype)
            if scale is not None:
                found /= scale.astype(found.dtype)
            return found

        return _Step("standard scaler", "fd", standardised)
    if type(estimator) is MinMaxScaler and not estimator.clip:
        factor, offset = estimator.scale_, estimator.min_

        def ranged(features: Array) -> Array:
            found = features.copy()
            found *= factor
            found += offset
            return found

        return _Step("range scaler", "fd", ranged)
    return None


# Networks (sklearn.neural_network._multilayer_perceptron).


def _network(estimator: Any, own: object) -> _Step | None:
    forward = _forward(estimator)
    one_column = estimator.n_outputs_ == 1
    if own is MLPRegressor.predict:
        if one_column:
            return _Step("network", "fd", lambda features: forward(features).ravel())
        return _Step("wide network", "fd", forward)
    classes = estimator.classes_
    if not isinstance(classes, np.ndarray) or len(classes) != (2 if one_column else estimator.n_outputs_):
        return None
    if estimator.out_activation_ != ("logistic" if one_column else "softmax"):
        return None  # several labels at once
    if own is MLPClassifier.predict_proba:
        return _Step("network shares", "fd", (lambda rows: _both(forward(rows).ravel())) if one_column else forward)
    if one_column:
        return _Step("network binary", "fd", lambda rows: classes[(forward(rows).ravel() > 0.5).astype(np.int64)])
    return _Step("network classes", "fd", lambda rows: classes.take(forward(rows).argmax(axis=1), mode="clip"))


def _both(likely: Array) -> Array:
    found: Array = np.vstack([1 - likely, likely]).T
    return found


def _forward(estimator: Any) -> Callable[[Array], Array]:
    layers = list(zip(estimator.coefs_, estimator.intercepts_, strict=True))
    activate, finish = ACTIVATIONS[estimator.activation], ACTIVATIONS[estimator.out_activation_]

    def forward(features: Array) -> Array:
        found = features
        for weights, intercept in layers[:-1]:
            found = found @ weights
            found += intercept
            activate(found)
        weights, intercept = layers[-1]
        answer: Array = found @ weights
        answer += intercept
        finish(answer)
        return answer

    return forward


# Trees and forests (sklearn.tree._classes, sklearn.ensemble._forest), which take float32 alone.


def _trees(estimator: Any, own: object) -> _Step | None:
    if own is BaseDecisionTree.predict or own is DecisionTreeClassifier.predict_proba:
        shares = _tree_shares(estimator)
        if own is DecisionTreeClassifier.predict_proba:
            return _Step("tree", "f", shares)
        if isinstance(estimator, DecisionTreeClassifier):
            return _Step("tree classes", "f", _classes_of(estimator, shares))
        return _Step("tree values", "f", lambda features: shares(features)[:, 0])
    if own in (ForestClassifier.predict, ForestClassifier.predict_proba):
        if not all(type(tree).predict_proba is DecisionTreeClassifier.predict_proba for tree in estimator.estimators_):
            return None
        shares = _mean_of(estimator, int(estimator.n_classes_))
        if own is ForestClassifier.predict_proba:
            return _Step("forest", "f", shares)
        return _Step("forest classes", "f", _classes_of(estimator, shares))
    if own is ForestRegressor.predict:
        if not all(type(tree).predict is BaseDecisionTree.predict for tree in estimator.estimators_):
            return None
        values = _mean_of(estimator, 1)
        return _Step("forest values", "f", lambda features: values(features)[:, 0])
    return None


def _tree_shares(estimator: Any) -> Callable[[Array], Array]:
    """Of a classifier the share of each class in a row's leaf, [rows, classes]; of a regressor its value, [rows, 1]."""
    predict, classes = estimator.tree_.predict, int(getattr(estimator, "n_classes_", 1))

    def shares(features: Array) -> Array:
        found: Array = predict(np.ascontiguousarray(features))[:, :classes]
        return found

    return shares


def _mean_of(forest: Any, columns: int) -> Callable[[Array], Array]:
    """The mean of the trees' shares, by a walk down the trees where they lie if they are laid out as is known here."""
    try:
        states = [tree.tree_.__getstate__() for tree in forest.estimators_]
        grown = [(state["nodes"], state["values"][:, 0, :columns]) for state in states]
        return MeanForest(int(forest.n_features_in_), columns, grown).means
    except (AttributeError, KeyError, ValueError) as error:
        log.info("the trees of a forest are asked one by one: %s", error)
    trees = [_tree_shares(tree) for tree in forest.estimators_]

    def mean(features: Array) -> Array:
        found = np.zeros((len(features), columns))
        for tree in trees:
            found += tree(features)
        found /= len(trees)
        return found

    return mean


def _classes_of(estimator: Any, shares: Callable[[Array], Array]) -> Callable[[Array], Array]:
    classes = estimator.classes_

    def likeliest(features: Array) -> Array:
        found: Array = classes.take(shares(features).argmax(axis=1), axis=0)
        return found

    return likeliest
