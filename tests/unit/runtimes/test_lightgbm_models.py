"""LightGBM: answers equal ``Booster.predict``, in FP64, whatever the file is called."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmcore.errors import InvalidRequest, LoadFailed
from mmcore.model import ModelSettings, ModelSource, TensorSpec
from mmcore.runtimes import LoadedModel, load_model
from mmcore.storage import detect

pytestmark = pytest.mark.slow

random = np.random.default_rng(5)
ROWS = random.normal(size=(200, 5))
LABELS = np.arange(200) % 3
ASKED = random.normal(size=(9, 5)).astype(np.float32)
ASKED[0, 1] = np.nan  # a missing value

TASKS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "binary": (LABELS % 2, {"objective": "binary"}, 1),
    "regression": (LABELS * 1.5, {"objective": "regression"}, 1),
    "multiclass": (LABELS, {"objective": "multiclass", "num_class": 3}, 3),
    "one-against-all": (LABELS, {"objective": "multiclassova", "num_class": 3}, 3),
    "poisson": (LABELS * 1.5, {"objective": "poisson"}, 1),
    "dart": (LABELS * 1.5, {"objective": "regression", "boosting": "dart"}, 1),
    "forest": (LABELS % 2, {"objective": "binary", "boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.7}, 1),
    "linear-leaves": (LABELS * 1.5, {"objective": "regression", "linear_tree": True}, 1),
}


def train(task: str = "regression", rounds: int = 5, **more: Any) -> lightgbm.Booster:
    labels, options, _ = TASKS[task]
    fixed = {"num_threads": 1, "seed": 1, "verbose": -1, "min_data_in_leaf": 2, "num_leaves": 7, "deterministic": True}
    return lightgbm.train(fixed | options | more, lightgbm.Dataset(ROWS, labels), rounds)


def load(path: Path, settings: ModelSettings = ModelSettings()) -> LoadedModel:
    return load_model(ModelSource("m", "1", "lightgbm", path, settings))


def saved(booster: Any, path: Path, settings: ModelSettings = ModelSettings()) -> LoadedModel:
    booster.save_model(path)
    return load(path, settings)


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> tuple[lightgbm.Booster, LoadedModel]:
    booster = train()
    return booster, saved(booster, tmp_path_factory.mktemp("lightgbm") / "model.txt")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("rows", [1, 9])
def test_a_booster_answers_what_its_own_predict_does(tmp_path: Path, task: str, rows: int) -> None:
    columns = TASKS[task][2]
    booster = train(task)
    model = saved(booster, tmp_path / "model.txt")
    assert (model.platform, model.any_input_name, model.default_outputs) == ("lightgbm", True, ("predict",))
    assert model.inputs == (TensorSpec("predict", "FP32", (-1, 5)),)
    assert model.outputs == (TensorSpec("predict", "FP64", (-1, columns)),)
    ((name, datatype, values),) = model.infer({"predict": ASKED[:rows]}, ())
    assert (name, datatype, values.dtype, values.shape) == ("predict", "FP64", np.float64, (rows, columns))
    np.testing.assert_array_equal(values, booster.predict(ASKED[:rows]).reshape(rows, columns))


def test_a_model_saved_by_the_scikit_learn_interface_answers_probabilities(tmp_path: Path) -> None:
    classifier = lightgbm.LGBMClassifier(n_estimators=4, n_jobs=1, verbose=-1).fit(ROWS, LABELS)
    model = saved(classifier.booster_, tmp_path / "model.bst")
    np.testing.assert_array_equal(
        model.infer({"predict": ROWS}, ())[0][2], classifier.predict_proba(ROWS, validate_features=False)
    )


def test_early_stopping_answers_from_the_best_iteration(tmp_path: Path) -> None:
    data = lightgbm.Dataset(ROWS, random.normal(size=200), free_raw_data=False)
    check = lightgbm.Dataset(ROWS + 1, random.normal(size=200), reference=data)
    options = {"num_threads": 1, "verbose": -1, "early_stopping_round": 2}
    booster = lightgbm.train(options, data, 50, valid_sets=[check])
    assert booster.best_iteration < 50
    model = saved(booster, tmp_path / "model.txt")
    np.testing.assert_array_equal(model.infer({"predict": ASKED}, ())[0][2][:, 0], booster.predict(ASKED))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from(
        ["float16", "float32", "float64", "int8", "int16", "int32", "uint8", "uint32", "bool"]
    ).flatmap(lambda dtype: hnp.arrays(dtype, st.tuples(st.integers(0, 6), st.just(5))))
)
def test_any_rows_of_any_datatype_are_answered_as_by_the_framework(
    regression: tuple[lightgbm.Booster, LoadedModel], rows: Any
) -> None:
    booster, model = regression
    rows.setflags(write=False)
    values = model.infer({"predict": rows}, ())[0][2]
    expected = booster.predict(rows) if len(rows) else np.empty(0)
    np.testing.assert_array_equal(values, expected.reshape(-1, 1))
    assert {"FP64", "INT64", "BOOL"} <= set(model.accepts["predict"])


def test_rows_that_do_not_lie_side_by_side_are_read_right(regression: tuple[lightgbm.Booster, LoadedModel]) -> None:
    booster, model = regression
    wide = np.repeat(ASKED, 2, axis=1)
    for rows in (9, 1):
        values = model.infer({"predict": wide[:rows, ::2]}, ())[0][2]
        np.testing.assert_array_equal(values[:, 0], booster.predict(ASKED[:rows]))


@pytest.mark.parametrize("name", ["model.txt", "model.bst", "model", "anything.model"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_the_content_and_not_the_name_tells_the_format(tmp_path: Path, name: str, line_end: bytes) -> None:
    booster = train()
    (tmp_path / name).write_bytes(booster.model_to_string().encode().replace(b"\n", line_end))
    values = load(tmp_path / name).infer({"predict": ASKED}, ())[0][2]
    np.testing.assert_array_equal(values[:, 0], booster.predict(ASKED))


def test_the_settings_name_and_type_the_tensors(tmp_path: Path) -> None:
    settings = ModelSettings(
        inputs=(TensorSpec("rows", "FP64", (-1, 5)),), outputs=(TensorSpec("score", "FP32", (-1, 1)),)
    )
    booster = train()
    model = saved(booster, tmp_path / "model.txt", settings)
    assert (model.inputs, model.default_outputs) == (settings.inputs, ("score",))
    ((name, datatype, values),) = model.infer({"rows": ASKED}, ())
    assert (name, datatype, values.dtype) == ("score", "FP32", np.float32)
    np.testing.assert_array_equal(values[:, 0], booster.predict(ASKED).astype(np.float32))


CONFIG = """
backend: "fil"
max_batch_size: 64
input [{ name: "input__0" data_type: TYPE_FP32 dims: [ 5 ] }]
output [{ name: "output__0" data_type: TYPE_FP32 dims: [ WIDTH ] }]
parameters [PARAMETERS]
"""


def answered_by_the_tree_backend(folder: Path, booster: Any, file: str, width: int, **parameters: str) -> Any:
    """The one output of a Triton repository's model, with its metadata checked."""
    stated = ", ".join(f'{{ key: "{key}" value: {{ string_value: "{text}" }} }}' for key, text in parameters.items())
    (folder / "1").mkdir(exist_ok=True)
    booster.save_model(folder / "1" / file)
    (folder / "config.pbtxt").write_text(CONFIG.replace("WIDTH", str(width)).replace("PARAMETERS", stated))
    (source,) = detect(folder).values()
    model = load_model(source)
    assert model.inputs == (TensorSpec("input__0", "FP32", (-1, 5)),)
    assert model.outputs == (TensorSpec("output__0", "FP32", (-1, width)),)
    ((name, datatype, values),) = model.infer({"input__0": ASKED}, ())
    assert (name, datatype, values.dtype, values.shape) == ("output__0", "FP32", np.float32, (9, width))
    return values


def test_a_configuration_of_tritons_tree_backend_says_what_is_answered(tmp_path: Path) -> None:
    def answered(booster: Any, width: int, **parameters: str) -> Any:
        return answered_by_the_tree_backend(tmp_path, booster, "model.txt", width, model_type="lightgbm", **parameters)

    binary, classes = train("binary"), train("multiclass")
    positive = binary.predict(ASKED).astype(np.float32)
    each = classes.predict(ASKED).astype(np.float32)
    np.testing.assert_array_equal(answered(binary, 1)[:, 0], positive)
    np.testing.assert_array_equal(answered(binary, 1, output_class="true")[:, 0], positive > 0.5)
    threshold = float(np.median(positive))
    lower = answered(binary, 1, output_class="true", threshold=str(threshold))
    np.testing.assert_array_equal(lower[:, 0], positive > threshold)
    both = answered(binary, 2, output_class="true", predict_proba="true")
    np.testing.assert_array_equal(both, np.stack([1 - positive, positive], axis=1))
    np.testing.assert_array_equal(answered(classes, 3, output_class="false"), each)
    np.testing.assert_array_equal(answered(classes, 3, predict_proba="true"), each)
    np.testing.assert_array_equal(answered(classes, 1, output_class="true")[:, 0], each.argmax(axis=1))


def test_a_folder_of_mlserver_is_read(tmp_path: Path) -> None:
    booster = train("multiclass")
    booster.save_model(tmp_path / "trees.any")
    (tmp_path / "model-settings.json").write_text(
        '{"name": "trees", "implementation": "mlserver_lightgbm.LightGBMModel",'
        ' "parameters": {"uri": "./trees.any", "version": "v1"}}'
    )
    (source,) = detect(tmp_path).values()
    assert (source.name, source.format) == ("trees", "lightgbm")
    ((name, datatype, values),) = load_model(source).infer({"predict": ASKED}, ())
    assert (name, datatype) == ("predict", "FP64")
    np.testing.assert_array_equal(values, booster.predict(ASKED))


def test_wrong_parameters_of_the_tree_backend_are_named(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="the parameter output_class is 'perhaps', neither true nor false"):
        saved(train(), tmp_path / "model.txt", ModelSettings(parameters={"output_class": "perhaps"}))
    with pytest.raises(LoadFailed, match="the parameter threshold is 'half', which is no number"):
        load(tmp_path / "model.txt", ModelSettings(parameters={"output_class": "true", "threshold": "half"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with 'tree'"),
        (b'{"learner": {}}', "does not begin with 'tree'"),
        (b"tree\nversion=v4\n", "is cut short"),
        (b"tree\ntree_sizes=\nend of trees\n", "is no model that LightGBM reads: "),
        (b"tree\ntree_sizes=\n\0\nend of trees\n", "it holds zero bytes"),
    ],
)
def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.txt").write_bytes(content)
    with pytest.raises(LoadFailed, match=message) as caught:
        load(tmp_path / "model.txt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.001, 0.1, 0.3, 0.5, 0.7])
def test_a_half_copied_file_is_refused(tmp_path: Path, kept: float) -> None:
    whole = train(rounds=20).model_to_string().split("\nend of trees")[0].encode()
    (tmp_path / "model.txt").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(LoadFailed, match=r"model 'm': 'model\.txt' is"):
        load(tmp_path / "model.txt")


def test_settings_that_contradict_the_model_are_refused(tmp_path: Path) -> None:
    train().save_model(tmp_path / "model.txt")
    with pytest.raises(LoadFailed, match=r"input 'x' with shape \[-1, 4\], the model takes \[-1, 5\]"):
        load(tmp_path / "model.txt", ModelSettings(inputs=(TensorSpec("x", "FP32", (-1, 4)),)))
    with pytest.raises(LoadFailed, match="answers numbers; the settings declare a BYTES output"):
        load(tmp_path / "model.txt", ModelSettings(outputs=(TensorSpec("predict", "BYTES", (-1, 1)),)))


def test_rows_of_another_width_never_reach_the_library(regression: tuple[lightgbm.Booster, LoadedModel]) -> None:
    _, model = regression
    for shape in ((1, 4), (2, 6), (5,), (1, 5, 1)):
        with pytest.raises(InvalidRequest, match=r"input 'predict': expected shape \[-1, 5\], got"):
            model.infer({"predict": np.zeros(shape, np.float32)}, ())
    with pytest.raises(InvalidRequest, match="has no output 'leaf'; it has 'predict'"):
        model.infer({"predict": ASKED}, ("leaf",))


def test_one_model_answers_in_several_threads_at_once(tmp_path: Path) -> None:
    booster = train("multiclass")
    model = saved(booster, tmp_path / "model.txt")
    rows = [random.normal(size=(count, 5)).astype(dtype) for count in (1, 1, 4) for dtype in (np.float32, np.float64)]
    expected = [booster.predict(array) for array in rows]
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(200):
            if not np.array_equal(model.infer({"predict": rows[number]}, ())[0][2], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


SERVE_ALONE = """
import sys, threading
import numpy as np
from pathlib import Path
from mmcore.model import ModelSource
from mmcore.runtimes import load_model
count = lambda: len(list(Path("/proc/self/task").iterdir()))
before = count()
models = [load_model(ModelSource(str(n), "1", "lightgbm", Path(sys.argv[1]))) for n in range(50)]
for model in models:
    model.infer({"predict": np.zeros((100, 5), np.float32)}, ())
    model.close()
print(count() - before, *(name for name in ("lightgbm", "sklearn", "scipy", "pandas") if name in sys.modules))
"""


def test_serving_starts_no_threads_and_imports_no_other_framework(tmp_path: Path) -> None:
    train("multiclass").save_model(tmp_path / "model.txt")
    done = subprocess.run(
        [sys.executable, "-c", SERVE_ALONE, str(tmp_path / "model.txt")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["0"], done.stdout + done.stderr
