"""Real models from their folder to an answer's bytes: the repository's samples, and models trained by others."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import joblib
import lightgbm
import numpy as np
import onnxruntime
import pytest
import skops.io
import xgboost
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from mmcore._ext.v2codec import (
    Signature,
    decode_infer_request,
    decode_infer_response,
    encode_infer_request,
    encode_infer_response,
)
from mmcore.errors import InvalidRequest
from mmcore.model import TensorSpec
from mmcore.runtimes import LoadedModel, load_model
from mmcore.storage import detect

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
TRAIN = ROOT / "deploy" / "samples" / "train.py"
random = np.random.default_rng(2)
FLOWERS = random.uniform(0.1, 8, size=(20, 4)).astype(np.float32)


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "new"
    with ThreadPoolExecutor() as pool:
        told = list(pool.map(train, [folder] * 2))
    # One of the two has waited for the other.
    assert sorted("up to date" in text for text in told) == [False, True]
    return folder


def train(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(TRAIN), "--all", str(folder)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(path: Path) -> LoadedModel:
    (source,) = detect(path).values()
    return load_model(source)


def ask(
    model: LoadedModel, inputs: list[tuple[str, str, NDArray[Any]]], outputs: tuple[str, ...] = ()
) -> dict[str, tuple[str, NDArray[Any]]]:
    """What a client gets: the request and the answer as bytes, the model between them."""
    signature = Signature(model.inputs, any_name=model.any_input_name, accepts=model.accepts)
    request = decode_infer_request(bytes(encode_infer_request("m", inputs, outputs=outputs)))
    answered = model.infer(signature.bind(request), request.output_names)
    body = encode_infer_response("m", "1", "", answered, raw=True)
    answer = decode_infer_response(body if isinstance(body, bytes) else b"".join(body))
    return {output.name: (output.datatype, output.array()) for output in answer.outputs}


def test_every_sample_is_found_and_loaded(samples: Path) -> None:
    platforms = {folder.name: load(folder).platform for folder in samples.iterdir() if not folder.name.startswith(".")}
    assert platforms == {
        "iris-sklearn": "sklearn",
        "diabetes-sklearn": "sklearn",
        "iris-xgboost": "xgboost",
        "iris-lightgbm": "lightgbm",
        "mlp-onnx": "onnxruntime_onnx",
        "mlp-openvino": "openvino",
        "mlp-savedmodel": "tensorflow_savedmodel",
        "mlp-torchscript": "pytorch_libtorch",
        "identity": "python",
        "simple": "python",
        "simple_string": "python",
    }


def test_training_again_leaves_what_is_there(samples: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in samples.rglob("*")}
    assert "up to date" in train(samples)
    assert {path: path.stat().st_mtime_ns for path in samples.rglob("*")} == before


def test_the_sklearn_sample_answers_int64_labels_under_any_input_name(samples: Path) -> None:
    estimator = joblib.load(samples / "iris-sklearn" / "model.joblib")
    answer = ask(load(samples / "iris-sklearn"), [("flowers", "FP32", FLOWERS)])
    datatype, labels = answer["predict"]
    assert (datatype, labels.shape) == ("INT64", (20, 1))
    np.testing.assert_array_equal(labels[:, 0], estimator.predict(FLOWERS))


def test_the_sklearn_sample_answers_every_output_asked_for(samples: Path) -> None:
    estimator = joblib.load(samples / "iris-sklearn" / "model.joblib")
    wanted = ("predict_proba", "decision_function", "predict")
    answer = ask(load(samples / "iris-sklearn"), [("predict", "FP32", FLOWERS)], wanted)
    assert tuple(answer) == wanted
    np.testing.assert_array_equal(answer["predict_proba"][1], estimator.predict_proba(FLOWERS))
    np.testing.assert_array_equal(answer["decision_function"][1], estimator.decision_function(FLOWERS))


@pytest.mark.parametrize("name", ["model.joblib", "model.skops"])
def test_a_pipeline_over_texts_takes_and_answers_them(tmp_path: Path, name: str) -> None:
    films = ["good film", "bad film", "great", "awful bad"]
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(films, ["good", "bad", "good", "bad"])
    (skops.io.dump if name.endswith("skops") else joblib.dump)(pipeline, tmp_path / name)
    model = load(tmp_path)
    assert model.inputs == (TensorSpec("predict", "BYTES", (-1,)),)
    assert [(spec.datatype, spec.shape) for spec in model.outputs[:2]] == [("BYTES", (-1, 1)), ("FP64", (-1, 2))]
    asked = np.array([b"good", b"bad", "ünknown".encode()], object)
    for shape in ((3,), (3, 1)):
        answer = ask(model, [("review", "BYTES", asked.reshape(shape))], ("predict", "predict_proba"))
        assert answer["predict"][1].tolist() == [[b"good"], [b"bad"], [answer["predict"][1][2, 0]]]
        np.testing.assert_array_equal(answer["predict_proba"][1], pipeline.predict_proba(["good", "bad", "ünknown"]))
    texts = np.full(4, b"good", object)
    for datatype, array, words in (
        ("FP32", np.zeros(2, np.float32), "expected datatype BYTES, got FP32"),
        ("BYTES", texts[:1].reshape(()), r"expected shape \[-1\], got \[\]"),
        ("BYTES", texts.reshape(2, 2), r"expected shape \[-1\], got \[2,2\]"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            ask(model, [("review", datatype, array)])


def test_a_pipeline_over_columns_of_text_states_their_number(tmp_path: Path) -> None:
    rows = np.array([["red", "s"], ["blue", "m"], ["red", "m"]], object)
    pipeline = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(rows, [7, 8, 7])
    joblib.dump(pipeline, tmp_path / "model.joblib")
    model = load(tmp_path)
    assert model.inputs == (TensorSpec("predict", "BYTES", (-1, 2)),)
    asked = np.array([[b"red", b"s"], [b"blue", b"m"]], object)
    datatype, labels = ask(model, [("row", "BYTES", asked)])["predict"]
    assert (datatype, labels.tolist()) == ("INT64", [[7], [8]])


def test_the_regression_sample_answers_fp64(samples: Path) -> None:
    patients = random.normal(size=(6, 10)).astype(np.float32)
    datatype, values = ask(load(samples / "diabetes-sklearn"), [("x", "FP32", patients)])["predict"]
    expected = joblib.load(samples / "diabetes-sklearn" / "model.joblib").predict(patients)
    assert datatype == "FP64"
    np.testing.assert_array_equal(values[:, 0], expected)


def test_the_xgboost_sample_answers_each_class(samples: Path) -> None:
    booster = xgboost.Booster({"nthread": 1}, model_file=samples / "iris-xgboost" / "model.json")
    datatype, values = ask(load(samples / "iris-xgboost"), [("predict", "FP32", FLOWERS)])["predict"]
    assert datatype == "FP32"
    np.testing.assert_array_equal(values, booster.inplace_predict(FLOWERS))


def test_the_lightgbm_sample_answers_each_class(samples: Path) -> None:
    booster = lightgbm.Booster(model_file=samples / "iris-lightgbm" / "model.txt")
    datatype, values = ask(load(samples / "iris-lightgbm"), [("predict", "FP32", FLOWERS)])["predict"]
    assert datatype == "FP64"
    np.testing.assert_array_equal(values, booster.predict(FLOWERS))


def test_the_onnx_sample_knows_its_irises(samples: Path) -> None:
    session = onnxruntime.InferenceSession(samples / "mlp-onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    datatype, values = ask(load(samples / "mlp-onnx"), [("input", "FP32", FLOWERS)])["probabilities"]
    assert datatype == "FP32"
    np.testing.assert_array_equal(values, session.run(None, {"input": FLOWERS})[0])
    known = np.array([[5.1, 3.5, 1.4, 0.2], [6.4, 3.2, 4.5, 1.5], [7.1, 3.0, 5.9, 2.1]], dtype=np.float32)
    (_, probabilities) = ask(load(samples / "mlp-onnx"), [("input", "FP32", known)])["probabilities"]
    assert probabilities.argmax(axis=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("sample", "asked", "answered"),
    [
        ("mlp-openvino", "input", "probabilities"),
        ("mlp-savedmodel", "input", "probabilities"),
        ("mlp-torchscript", "INPUT__0", "OUTPUT__0"),
    ],
)
def test_the_same_network_answers_the_same_in_every_format(
    samples: Path, sample: str, asked: str, answered: str
) -> None:
    model = load(samples / sample)
    assert (model.inputs, model.outputs) == (
        (TensorSpec(asked, "FP32", (-1, 4)),),
        (TensorSpec(answered, "FP32", (-1, 3)),),
    )
    datatype, values = ask(model, [(asked, "FP32", FLOWERS)])[answered]
    assert datatype == "FP32"
    np.testing.assert_allclose(
        values, ask(load(samples / "mlp-onnx"), [("input", "FP32", FLOWERS)])["probabilities"][1], rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(4,), (1, 3, 224, 224)])
def test_the_identity_sample_takes_any_shape_and_copies_nothing(samples: Path, shape: tuple[int, ...]) -> None:
    model = load(samples / "identity")
    array = np.ones(shape, np.float32)
    ((name, datatype, answered),) = model.infer({"INPUT0": array}, ())
    assert (name, datatype) == ("OUTPUT0", "FP32")
    assert answered is array


def test_the_simple_sample_adds_and_subtracts(samples: Path) -> None:
    left, right = random.integers(-1000, 1000, size=(2, 3, 16)).astype(np.int32)
    model = load(samples / "simple")
    answer = ask(model, [("INPUT0", "INT32", left), ("INPUT1", "INT32", right)])
    assert model.inputs[0] == TensorSpec("INPUT0", "INT32", (-1, 16))
    assert [datatype for datatype, _ in answer.values()] == ["INT32", "INT32"]
    np.testing.assert_array_equal(answer["OUTPUT0"][1], left + right)
    np.testing.assert_array_equal(answer["OUTPUT1"][1], left - right)


def test_the_simple_string_sample_adds_and_subtracts_what_text_spells(samples: Path) -> None:
    left, right = random.integers(-1000, 1000, size=(2, 3, 16))
    spelled = [np.array([str(value).encode() for value in side.flat], dtype=object) for side in (left, right)]
    inputs = [(f"INPUT{index}", "BYTES", side.reshape(3, 16)) for index, side in enumerate(spelled)]
    answer = ask(load(samples / "simple_string"), inputs)
    np.testing.assert_array_equal(answer["OUTPUT0"][1].astype(int), left + right)
    np.testing.assert_array_equal(answer["OUTPUT1"][1].astype(int), left - right)


def test_the_archived_stacks_onnx_mnist_gives_its_documented_answer() -> None:
    model = load(DATA / "mnist.onnx")
    digit = (np.arange(784) % 256).astype(np.float32).reshape(1, 1, 28, 28)
    assert model.inputs == (TensorSpec("Input3", "FP32", (1, 1, 28, 28)),)
    assert model.outputs == (TensorSpec("Plus214_Output_0", "FP32", (1, 10)),)
    _, scores = ask(model, [("Input3", "FP32", digit)])["Plus214_Output_0"]
    expected = [
        *(-187.18326, 255.29175, 1346.3765, 673.23883, -1563.057),
        *(1409.7051, -528.0634, 446.35184, -666.25525, -971.00525),
    ]
    np.testing.assert_allclose(scores, [expected], rtol=1e-4)


@pytest.mark.parametrize("name", ["predict", "input__0"])
def test_the_archived_stacks_xgboost_mushrooms_give_their_documented_answer(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(DATA / "mushroom.json")
    assert "Found JSON model saved before XGBoost 1.6" in caplog.text, "a warning of the library is logged"
    assert model.inputs == (TensorSpec("predict", "FP32", (-1, 126)),)
    datatype, values = ask(model, [(name, "FP32", np.zeros((3, 126), np.float32))])["predict"]
    assert (datatype, values.shape) == ("FP32", (3, 1))
    np.testing.assert_allclose(values, 0.01241208, rtol=1e-6)


def test_the_archived_stacks_simple_string_gives_its_documented_answer() -> None:
    model = load(DATA / "simple_string")
    assert model.platform == "tensorflow_graphdef"
    assert model.inputs == tuple(TensorSpec(name, "BYTES", (-1, 16)) for name in ("INPUT0", "INPUT1"))
    left, right = random.integers(-1000, 1000, size=(2, 3, 16))
    spelled = [np.array([str(value).encode() for value in side.flat], object).reshape(3, 16) for side in (left, right)]
    answer = ask(model, [("INPUT0", "BYTES", spelled[0]), ("INPUT1", "BYTES", spelled[1])])
    np.testing.assert_array_equal(answer["OUTPUT0"][1].astype(int), left + right)
    np.testing.assert_array_equal(answer["OUTPUT1"][1].astype(int), left - right)


MANY = """
import sys
from pathlib import Path
import numpy as np
from mmcore.runtimes import load_model
from mmcore.storage import detect

def load(folder):
    (source,) = detect(folder).values()
    model = load_model(source)
    rows = {spec.name: np.zeros((5, 4), np.float32) for spec in model.inputs}
    model.infer(rows, ())
    return model

def count():
    return len(list(Path("/proc/self/task").iterdir()))

folders = [Path(folder) for folder in sys.argv[1:]]
models = [load(folder) for folder in folders]
first = count()
while len(models) < 200:
    models.append(load(folders[len(models) % len(folders)]))
print(first, count() - first)
"""


def test_two_hundred_models_of_mixed_formats_do_not_mean_many_threads(samples: Path) -> None:
    names = [folder.name for folder in samples.iterdir() if folder.name.startswith(("iris-", "mlp-"))]
    assert len(names) == 7
    call = [sys.executable, "-c", MANY, *(str(samples / name) for name in sorted(names))]
    done = subprocess.run(call, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    first, added = map(int, done.stdout.split())
    assert added == 0
    assert first < 16
