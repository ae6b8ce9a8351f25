"""XGBoost: answers equal those of its scikit-learn interface, in FP32, from any of its formats."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost

from mmcore.errors import InferenceFailed, InvalidRequest, LoadFailed
from mmcore.model import ModelSettings, ModelSource, TensorSpec
from mmcore.runtimes import LoadedModel, load_model

pytestmark = pytest.mark.slow

random = np.random.default_rng(3)
ROWS = random.normal(size=(80, 5)).astype(np.float32)
LABELS = np.arange(80) % 3
ASKED = random.normal(size=(9, 5)).astype(np.float32)
ASKED[0, 1] = np.nan  # a missing value


def train(labels: Any, rounds: int = 4, **options: Any) -> xgboost.Booster:
    return xgboost.train({"nthread": 1, "seed": 1} | options, xgboost.DMatrix(ROWS, labels), rounds)


def load(path: Path, settings: ModelSettings = ModelSettings()) -> LoadedModel:
    return load_model(ModelSource("m", "1", "xgboost", path, settings))


def saved(booster: Any, path: Path) -> LoadedModel:
    booster.save_model(path)
    return load(path)


@pytest.mark.parametrize(
    ("labels", "options", "columns"),
    [
        (LABELS % 2, {"objective": "binary:logistic"}, 1),
        (LABELS * 1.5, {"objective": "reg:squarederror"}, 1),
        (LABELS, {"objective": "multi:softprob", "num_class": 3}, 3),
        (LABELS, {"objective": "multi:softmax", "num_class": 3}, 1),
        (LABELS * 1.5, {"objective": "reg:squarederror", "booster": "dart", "rate_drop": 0.5}, 1),
        (LABELS * 1.5, {"objective": "reg:squarederror", "booster": "gblinear"}, 1),
        (np.stack([LABELS, LABELS * 2.0], axis=1), {"objective": "reg:squarederror"}, 2),
    ],
    ids=["binary", "regression", "softprob", "softmax", "dart", "linear", "two-targets"],
)
def test_a_booster_answers_what_its_own_predict_does(
    tmp_path: Path, labels: Any, options: dict[str, Any], columns: int
) -> None:
    booster = train(labels, **options)
    model = saved(booster, tmp_path / "model.json")
    assert (model.platform, model.any_input_name, model.default_outputs) == ("xgboost", True, ("predict",))
    assert model.inputs == (TensorSpec("predict", "FP32", (-1, 5)),)
    assert model.outputs == (TensorSpec("predict", "FP32", (-1, columns)),)
    rows = np.nan_to_num(ASKED) if options.get("booster") == "gblinear" else ASKED
    ((name, datatype, values),) = model.infer({"predict": rows}, ())
    assert (name, datatype, values.dtype, values.shape) == ("predict", "FP32", np.float32, (9, columns))
    expected = booster.predict(xgboost.DMatrix(rows), strict_shape=True).reshape(9, columns)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("objective", ["multi:softprob", "multi:softmax"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifier_answers_labels_and_offers_probabilities(tmp_path: Path, classes: int, objective: str) -> None:
    options = {"objective": objective} if classes == 3 else {}
    classifier = xgboost.XGBClassifier(n_estimators=4, max_depth=2, n_jobs=1, **options).fit(ROWS, LABELS % classes)
    model = saved(classifier, tmp_path / "model.ubj")
    predicted, probabilities = model.infer({"predict": ASKED}, ("predict", "predict_proba"))
    np.testing.assert_array_equal(predicted[2][:, 0], classifier.predict(ASKED))
    np.testing.assert_allclose(probabilities[2], classifier.predict_proba(ASKED), rtol=1e-6)
    assert model.outputs[1] == TensorSpec("predict_proba", "FP32", (-1, classes))
    assert [datatype for _, datatype, _ in model.infer({"predict": ASKED}, ())] == [model.outputs[0].datatype]
    assert predicted[1] == model.outputs[0].datatype
    assert predicted[2].dtype.kind == "i"


def test_several_labels_at_once_are_answered_each(tmp_path: Path) -> None:
    labels = np.stack([LABELS % 2, LABELS // 2], axis=1)
    classifier = xgboost.XGBClassifier(n_estimators=3, max_depth=2, n_jobs=1).fit(ROWS, labels)
    model = saved(classifier, tmp_path / "model.json")
    predicted, probabilities = model.infer({"predict": ASKED}, ("predict", "predict_proba"))
    np.testing.assert_array_equal(predicted[2], classifier.predict(ASKED))
    np.testing.assert_array_equal(probabilities[2], classifier.predict_proba(ASKED))


def test_early_stopping_answers_from_the_best_iteration(tmp_path: Path) -> None:
    regressor = xgboost.XGBRegressor(n_estimators=60, early_stopping_rounds=2, n_jobs=1)
    regressor.fit(ROWS, random.normal(size=80), eval_set=[(ASKED, random.normal(size=9))], verbose=False)
    assert regressor.best_iteration < len(regressor.get_booster().get_dump()) - 1
    model = saved(regressor, tmp_path / "model.json")
    np.testing.assert_array_equal(model.infer({"predict": ASKED}, ())[0][2][:, 0], regressor.predict(ASKED))


@pytest.mark.parametrize("name", ["model.json", "model.ubj", "model.bst", "model"])
@pytest.mark.parametrize("saved_as", ["json", "ubj"])
def test_the_content_and_not_the_name_tells_the_format(tmp_path: Path, name: str, saved_as: str) -> None:
    booster = train(LABELS * 1.5)
    (tmp_path / name).write_bytes(booster.save_raw(saved_as))
    values = load(tmp_path / name).infer({"predict": ASKED}, ())[0][2]
    np.testing.assert_array_equal(values[:, 0], booster.inplace_predict(ASKED))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.int32, np.int64, np.uint8, np.bool_])
def test_every_numeric_datatype_is_taken(tmp_path: Path, dtype: type) -> None:
    booster = train(LABELS * 1.5)
    model = saved(booster, tmp_path / "model.json")
    rows = (np.nan_to_num(ASKED) * 3).astype(dtype)
    rows.setflags(write=False)
    values = model.infer({"predict": rows}, ())[0][2]
    np.testing.assert_array_equal(values[:, 0], booster.inplace_predict(rows.astype(np.float32)))
    assert {"FP64", "INT64", "BOOL"} <= set(model.accepts["predict"])


def test_rows_that_do_not_lie_side_by_side_are_read_right(tmp_path: Path) -> None:
    booster = train(LABELS * 1.5)
    model = saved(booster, tmp_path / "model.json")
    wide = np.repeat(ASKED, 2, axis=1)
    np.testing.assert_array_equal(
        model.infer({"predict": wide[:, ::2]}, ())[0][2][:, 0], booster.inplace_predict(ASKED)
    )


def test_no_rows_get_no_answers(tmp_path: Path) -> None:
    model = saved(train(LABELS, objective="multi:softprob", num_class=3), tmp_path / "model.json")
    assert model.infer({"predict": ASKED[:0]}, ())[0][2].shape == (0, 3)


def test_the_settings_name_the_tensors_as_tritons_backend_does(tmp_path: Path) -> None:
    booster = train(LABELS % 2, objective="binary:logistic")
    booster.save_model(tmp_path / "model.json")
    settings = ModelSettings(
        inputs=(TensorSpec("input__0", "FP32", (-1, 5)),), outputs=(TensorSpec("output__0", "FP64", (-1, 1)),)
    )
    model = load(tmp_path / "model.json", settings)
    assert (model.inputs, model.default_outputs) == (settings.inputs, ("output__0",))
    ((name, datatype, values),) = model.infer({"input__0": ASKED}, ())
    assert (name, datatype, values.dtype) == ("output__0", "FP64", np.float64)
    assert [name for name, _, _ in model.infer({"input__0": ASKED}, ("predict",))] == ["predict"]


@pytest.mark.parametrize("objective", ["multi:softprob", "multi:softmax"])
def test_a_configuration_of_tritons_tree_backend_says_what_is_answered(tmp_path: Path, objective: str) -> None:
    binary = xgboost.XGBClassifier(n_estimators=4, n_jobs=1).fit(ROWS, LABELS % 2)
    classes = train(LABELS, objective=objective, num_class=3)

    def answered(booster: Any, width: int, **parameters: str) -> Any:
        booster.save_model(tmp_path / "xgboost.json")
        settings = ModelSettings(parameters={"output_class": "false", "model_type": "xgboost_json", **parameters})
        model = load(tmp_path / "xgboost.json", settings)
        assert model.inputs == (TensorSpec("input__0", "FP32", (-1, 5)),)
        assert model.outputs == (TensorSpec("output__0", "FP32", (-1, width)),)
        ((name, datatype, values),) = model.infer({"input__0": ASKED}, ())
        assert (name, datatype, values.dtype, values.shape) == ("output__0", "FP32", np.float32, (9, width))
        return values

    np.testing.assert_allclose(answered(binary, 1)[:, 0], binary.predict_proba(ASKED)[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(answered(binary, 1, output_class="true")[:, 0], binary.predict(ASKED))
    np.testing.assert_allclose(answered(binary, 2, predict_proba="true"), binary.predict_proba(ASKED), rtol=1e-6)
    each = classes.predict(xgboost.DMatrix(ASKED))
    best = each.argmax(axis=1) if each.ndim == 2 else each
    np.testing.assert_array_equal(answered(classes, 1, output_class="true")[:, 0], best)
    np.testing.assert_array_equal(answered(classes, 3, predict_proba="true").argmax(axis=1), best)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is neither JSON nor UBJSON"),
        (b"{", "is neither JSON nor UBJSON"),
        (b"binf" + bytes(100), "older binary format has to be converted"),
        (b"tree\nversion=v4\n", "is a LightGBM model"),
        (b"{}", r"is no model that XGBoost \d.* reads: Invalid model format"),
        (b'{"learner": 3}', r"is no model that XGBoost \d.* reads: Invalid cast, from Integer to Object$"),
        (b'{"a": "b"}', r"is no model that XGBoost"),
    ],
)
def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.bst").write_bytes(content)
    with pytest.raises(LoadFailed, match=message) as caught:
        load(tmp_path / "model.bst")
    assert "Stack trace" not in str(caught.value)


@pytest.mark.parametrize("saved_as", ["json", "ubj"])
@pytest.mark.parametrize("kept", [0.001, 0.3, 0.7, 0.999])
def test_a_half_copied_file_is_refused(tmp_path: Path, saved_as: str, kept: float) -> None:
    whole = train(LABELS * 1.5).save_raw(saved_as)
    (tmp_path / "model.json").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(LoadFailed, match=r"model 'm': 'model\.json' is"):
        load(tmp_path / "model.json")


def test_settings_that_contradict_the_model_are_refused(tmp_path: Path) -> None:
    train(LABELS * 1.5).save_model(tmp_path / "model.json")
    with pytest.raises(LoadFailed, match=r"input 'x' with shape \[-1, 4\], the model takes \[-1, 5\]"):
        load(tmp_path / "model.json", ModelSettings(inputs=(TensorSpec("x", "FP32", (-1, 4)),)))
    with pytest.raises(LoadFailed, match="answers numbers; the settings declare a BYTES output"):
        load(tmp_path / "model.json", ModelSettings(outputs=(TensorSpec("predict", "BYTES", (-1, 1)),)))


def test_what_the_library_refuses_reaches_the_caller_without_its_stack(tmp_path: Path) -> None:
    model = saved(train(LABELS * 1.5), tmp_path / "model.json")
    with pytest.raises(InferenceFailed) as caught:
        model.infer({"predict": np.zeros((2, 4), np.float32)}, ())
    assert "Stack trace" not in str(caught.value)
    assert str(caught.value).startswith("model 'm': ")
    with pytest.raises(InvalidRequest, match="has no output 'leaf'; it has 'predict'"):
        model.infer({"predict": ASKED}, ("leaf",))


def test_one_model_answers_in_several_threads_at_once(tmp_path: Path) -> None:
    booster = train(LABELS * 1.5)
    model = saved(booster, tmp_path / "model.json")
    rows = [random.normal(size=(number + 1, 5)).astype(np.float32) for number in range(4)]
    expected = [booster.inplace_predict(array) for array in rows]
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(100):
            if not np.array_equal(model.infer({"predict": rows[number]}, ())[0][2][:, 0], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
