"""scikit-learn: what is answered equals the estimator's own methods, in the form MLServer's clients know."""

from __future__ import annotations

import logging
import pickle
import threading
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import skops.io
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from mmcore.errors import InferenceFailed, InvalidRequest, LoadFailed
from mmcore.model import ModelSettings, ModelSource, TensorSpec
from mmcore.runtimes import LoadedModel, load_model

pytestmark = pytest.mark.slow

random = np.random.default_rng(11)
ROWS = random.normal(size=(60, 4))
LABELS = np.arange(60) % 3
ASKED = random.normal(size=(7, 4)).astype(np.float32)


def load(folder: Path, estimator: Any, settings: ModelSettings = ModelSettings()) -> LoadedModel:
    joblib.dump(estimator, folder / "model.joblib")
    return load_model(ModelSource("m", "1", "sklearn", folder / "model.joblib", settings))


def test_a_classifier_answers_its_label_by_default_and_the_rest_when_asked(tmp_path: Path) -> None:
    estimator = LogisticRegression().fit(ROWS, LABELS)
    model = load(tmp_path, estimator)
    assert (model.platform, model.any_input_name, model.default_outputs) == ("sklearn", True, ("predict",))
    assert model.inputs == (TensorSpec("predict", "FP32", (-1, 4)),)
    assert model.outputs == (
        TensorSpec("predict", "INT64", (-1, 1)),
        TensorSpec("predict_proba", "FP64", (-1, 3)),
        TensorSpec("decision_function", "FP64", (-1, 3)),
    )
    ((name, datatype, labels),) = model.infer({"predict": ASKED}, ())
    assert (name, datatype, labels.shape) == ("predict", "INT64", (7, 1))
    np.testing.assert_array_equal(labels[:, 0], estimator.predict(ASKED))
    scores, probabilities = model.infer({"predict": ASKED}, ("decision_function", "predict_proba"))
    np.testing.assert_array_equal(scores[2], estimator.decision_function(ASKED))
    np.testing.assert_array_equal(probabilities[2], estimator.predict_proba(ASKED))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, np.bool_])
def test_every_numeric_datatype_is_taken(tmp_path: Path, dtype: type) -> None:
    estimator = LogisticRegression().fit(ROWS, LABELS)
    model = load(tmp_path, estimator)
    rows = (ASKED * 3).astype(dtype)
    rows.setflags(write=False)  # as a request's bytes are
    np.testing.assert_array_equal(model.infer({"predict": rows}, ())[0][2][:, 0], estimator.predict(rows))
    assert {"FP64", "INT64", "BOOL"} <= set(model.accepts["predict"])
    assert "BYTES" not in model.accepts["predict"]


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoadedModel]:
    """An estimator over all kinds of numbers, and its model."""
    estimator = make_pipeline(StandardScaler(), RandomForestClassifier(5, random_state=0)).fit(ROWS, LABELS)
    return estimator, load(tmp_path_factory.mktemp("forest"), estimator)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([*"bBhHiIlLefd?"]).flatmap(
        lambda kind: hnp.arrays(
            kind,
            st.tuples(st.integers(1, 5), st.just(4)),
            elements=st.floats(-1e4, 1e4, width=16) if kind in "efd" else None,
        )
    )
)
def test_any_rows_of_any_datatype_are_answered_as_by_the_estimator(
    forest: tuple[Any, LoadedModel], rows: NDArray[Any]
) -> None:
    estimator, model = forest
    labels, probabilities = model.infer({"predict": rows}, ("predict", "predict_proba"))
    np.testing.assert_array_equal(labels[2][:, 0], estimator.predict(rows))
    np.testing.assert_array_equal(probabilities[2], estimator.predict_proba(rows))


def test_a_regressor_answers_what_numpy_gives(tmp_path: Path) -> None:
    estimator = make_pipeline(StandardScaler(), LinearRegression()).fit(ROWS, LABELS * 1.5)
    ((_, datatype, values),) = load(tmp_path, estimator).infer({"predict": ASKED}, ())
    assert (datatype, values.shape) == ("FP64", (7, 1))
    np.testing.assert_array_equal(values[:, 0], estimator.predict(ASKED))


def test_text_labels_are_bytes(tmp_path: Path) -> None:
    names = np.array(["grün", "rot", "blau"])
    model = load(tmp_path, SVC().fit(ROWS, names[LABELS]))
    ((_, datatype, labels),) = model.infer({"predict": ASKED}, ())
    assert (datatype, labels.dtype) == ("BYTES", np.dtype(object))
    assert set(labels.ravel()) <= {name.encode() for name in names}
    assert model.outputs[0] == TensorSpec("predict", "BYTES", (-1, 1))


def test_a_transformer_answers_transform(tmp_path: Path) -> None:
    model = load(tmp_path, StandardScaler().fit(ROWS))
    assert model.default_outputs == ("transform",)
    np.testing.assert_allclose(model.infer({"predict": ROWS}, ())[0][2].mean(axis=0), 0, atol=1e-12)


def test_a_sparse_answer_is_made_dense(tmp_path: Path) -> None:
    encoder = OneHotEncoder(handle_unknown="ignore").fit([[0.0], [1.0], [2.0]])
    ((_, datatype, encoded),) = load(tmp_path, encoder).infer({"predict": np.array([[2.0], [0.0]])}, ())
    assert (datatype, encoded.tolist()) == ("FP64", [[0, 0, 1], [1, 0, 0]])


def test_several_targets_keep_their_columns(tmp_path: Path) -> None:
    targets = np.stack([LABELS, LABELS % 2], axis=1)
    estimator = RandomForestClassifier(3, random_state=0).fit(ROWS, targets)
    model = load(tmp_path, estimator)
    np.testing.assert_array_equal(model.infer({"predict": ASKED}, ())[0][2], estimator.predict(ASKED))
    regressor = RandomForestRegressor(3, random_state=0).fit(ROWS, targets)
    assert load(tmp_path, regressor).outputs == (TensorSpec("predict", "FP64", (-1, 2)),)


def test_a_text_pipeline_takes_bytes(tmp_path: Path) -> None:
    estimator = make_pipeline(TfidfVectorizer(), MultinomialNB()).fit(["good film", "bad film"], ["yes", "no"])
    model = load(tmp_path, estimator)
    assert "BYTES" in model.accepts["predict"]
    documents = np.array([[b"a good one"], [b"bad bad"]], dtype=object)
    assert model.infer({"predict": documents}, ())[0][2].tolist() == [[b"yes"], [b"no"]]
    with pytest.raises(InvalidRequest, match="an element is not UTF-8"):
        model.infer({"predict": np.array([[b"\xff"]], dtype=object)}, ())


def test_the_settings_choose_the_default_method_and_name_the_tensors(tmp_path: Path) -> None:
    estimator = LogisticRegression().fit(ROWS, LABELS)
    settings = ModelSettings(
        inputs=(TensorSpec("input__0", "FP32", (-1, 4)),),
        outputs=(TensorSpec("output__0", "FP32", (-1, 3)),),
        parameters={"predict_fn": "predict_proba"},
    )
    model = load(tmp_path, estimator, settings)
    assert model.inputs == settings.inputs
    assert model.default_outputs == ("output__0",)
    ((name, datatype, values),) = model.infer({"input__0": ASKED}, ())
    assert (name, datatype, values.dtype) == ("output__0", "FP32", np.float32)
    np.testing.assert_allclose(values, estimator.predict_proba(ASKED), rtol=1e-6)


def test_many_jobs_become_one_since_requests_are_what_runs_in_parallel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forest = make_pipeline(StandardScaler(), RandomForestClassifier(3, n_jobs=2, random_state=0)).fit(ROWS, LABELS)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a thread was started")

    model = load(tmp_path, forest)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    np.testing.assert_array_equal(
        model.infer({"predict": ASKED}, ())[0][2][:, 0],
        forest.set_params(randomforestclassifier__n_jobs=1).predict(ASKED),
    )
    with pytest.raises(LoadFailed, match="the parameter n_jobs is 'many'"):
        load(tmp_path, forest, ModelSettings(parameters={"n_jobs": "many"}))


def test_plain_pickles_and_skops_files_are_read(tmp_path: Path) -> None:
    estimator = KMeans(2, n_init=1, random_state=0).fit(ROWS)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(estimator))
    skops.io.dump(estimator, tmp_path / "model.skops")
    for name in ("model.pkl", "model.skops"):
        model = load_model(ModelSource("m", "1", "sklearn", tmp_path / name))
        np.testing.assert_array_equal(model.infer({"predict": ROWS}, ("predict",))[0][2][:, 0], estimator.predict(ROWS))


class Doubling(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    def fit(self, rows: Any) -> Doubling:
        self.n_features_in_ = 1
        return self

    def predict(self, rows: Any) -> Any:
        return rows * 2


def test_a_skops_file_with_foreign_code_is_refused(tmp_path: Path) -> None:
    skops.io.dump(Doubling().fit(None), tmp_path / "model.skops")
    with pytest.raises(LoadFailed, match=r"types that skops does not trust: .*Doubling"):
        load_model(ModelSource("m", "1", "sklearn", tmp_path / "model.skops"))


def test_an_estimator_of_another_version_is_served_and_that_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    estimator = LogisticRegression().fit(ROWS, LABELS)
    with monkeypatch.context() as patch:
        patch.setattr("sklearn.base.__version__", "1.4.0")
        joblib.dump(estimator, tmp_path / "model.joblib")
    model = load_model(ModelSource("old", "1", "sklearn", tmp_path / "model.joblib"))
    assert model.infer({"predict": ASKED}, ())[0][2].shape == (7, 1)
    logged = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "model 'old': InconsistentVersionWarning: Trying to unpickle estimator" in logged[0].getMessage()


@pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"\x80\x04\x95\xff\xff"], ids=["empty", "garbage", "cut"])
@pytest.mark.parametrize("suffix", ["joblib", "skops"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(LoadFailed, match=rf"model 'm': 'model\.{suffix}' is no"):
        load_model(ModelSource("m", "1", "sklearn", path))


def test_a_half_copied_file_is_refused(tmp_path: Path) -> None:
    joblib.dump(RandomForestClassifier(20, random_state=0).fit(ROWS, LABELS), tmp_path / "model.joblib")
    whole = (tmp_path / "model.joblib").read_bytes()
    (tmp_path / "model.joblib").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadFailed, match="is no joblib or pickle file"):
        load_model(ModelSource("m", "1", "sklearn", tmp_path / "model.joblib"))


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="holds a dict, which has no predict or transform method"):
        load(tmp_path, {"weights": [1, 2]})
    with pytest.raises(LoadFailed, match="holds a KMeans, which has no predict_proba method"):
        load(tmp_path, KMeans(2, n_init=1).fit(ROWS), ModelSettings(parameters={"predict_fn": "predict_proba"}))


def test_a_pickle_that_needs_absent_code_names_it(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(b"cno_such_package.models\nRanker\n.")
    with pytest.raises(LoadFailed, match=r"'model\.pkl' needs the Python module 'no_such_package'"):
        load_model(ModelSource("m", "1", "sklearn", tmp_path / "model.pkl"))
    (tmp_path / "model.pkl").write_bytes(b"csklearn.linear_model\nGoneEstimator\n.")
    with pytest.raises(LoadFailed, match=r"pickled with other versions or code than are installed \(scikit-learn"):
        load_model(ModelSource("m", "1", "sklearn", tmp_path / "model.pkl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ModelSettings(inputs=(TensorSpec("x", "FP32", (-1, 5)),)), r"input 'x' with shape \[-1, 5\], the model takes"),
        (ModelSettings(inputs=(TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,)))), "declare 2 inputs"),
        (ModelSettings(inputs=(TensorSpec("x", "TEXT", (-1, 4)),)), "'x' has the unknown datatype 'TEXT'"),
        (
            ModelSettings(outputs=(TensorSpec("predict", "INT64", (-1, 1)), TensorSpec("q", "FP32", (-1,)))),
            "declare output 'q', but the model answers 'predict', 'predict_proba'",
        ),
    ],
)
def test_settings_that_contradict_the_model_are_refused(tmp_path: Path, settings: ModelSettings, message: str) -> None:
    with pytest.raises(LoadFailed, match=message):
        load(tmp_path, LogisticRegression().fit(ROWS, LABELS), settings)


def test_what_the_estimator_refuses_reaches_the_caller(tmp_path: Path) -> None:
    model = load(tmp_path, LogisticRegression().fit(ROWS, LABELS))
    with pytest.raises(InvalidRequest, match="model 'm': ValueError: Input X contains NaN"):
        model.infer({"predict": np.full((1, 4), np.nan)}, ())
    with pytest.raises(InvalidRequest, match="has no output 'score'; it has 'predict', 'predict_proba'"):
        model.infer({"predict": ASKED}, ("score",))


def test_what_else_it_raises_is_the_models_failure(tmp_path: Path) -> None:
    model = load(tmp_path, OneHotEncoder(handle_unknown="error").fit(LABELS[:, None]))
    with pytest.raises(InferenceFailed, match="model 'm': ValueError: Found unknown categories"):
        model.infer({"predict": np.full((1, 1), 7)}, ())


def test_a_batch_of_no_rows_does_not_end_the_server(tmp_path: Path) -> None:
    model = load(tmp_path, LogisticRegression().fit(ROWS, LABELS))
    with pytest.raises(InvalidRequest, match="minimum of 1 is required"):
        model.infer({"predict": ASKED[:0]}, ())


def test_a_compressed_file_counts_for_what_it_expands_to(tmp_path: Path) -> None:
    forest = RandomForestClassifier(30, random_state=0).fit(ROWS, random.integers(0, 2, size=60))
    sizes = []
    for name, compress in (("plain.joblib", 0), ("packed.joblib", 3)):
        joblib.dump(forest, tmp_path / name, compress=compress)
        sizes.append(load_model(ModelSource("m", "1", "sklearn", tmp_path / name)).size_bytes)
    assert 0.5 < sizes[0] / sizes[1] < 2
