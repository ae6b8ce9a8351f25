"""TensorFlow: SavedModels, frozen graphs and Keras files answer as the framework does, which is never imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmcore.adapters import triton
from mmcore.errors import InvalidRequest, LoadFailed
from mmcore.model import NUMPY_DTYPES, ModelSettings, ModelSource, TensorSpec
from mmcore.runtimes import LoadedModel, keras_files, load_model
from mmcore.storage import detect

pytestmark = pytest.mark.slow

MAKE = Path(__file__).with_name("tensorflow_models.py")
ECHOED = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "bfloat16": "BF16", "float32": "FP32",
    "float64": "FP64", "string": "BYTES",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensorflow")
    done = subprocess.run([sys.executable, str(MAKE), str(folder)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module", autouse=True)
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras_files, "exports", keras_files.KerasExports(tmp_path_factory.mktemp("keras") / "exports"))
        yield


@pytest.fixture(scope="module")
def network(made: Path) -> LoadedModel:
    return load(made / "network")


@pytest.fixture(scope="module")
def echoes(made: Path) -> dict[str, LoadedModel]:
    return {datatype: load(made / "echoes", parameters={"TF_SIGNATURE_DEF": name}) for name, datatype in ECHOED.items()}


def load(path: Path, **stated: Any) -> LoadedModel:
    return load_model(ModelSource("m", "1", "tensorflow", path, ModelSettings(**stated)))


def test_a_saved_model_answers_what_the_framework_does(made: Path, network: LoadedModel) -> None:
    assert (network.platform, network.any_input_name) == ("tensorflow_savedmodel", False)
    assert network.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert network.outputs == (TensorSpec("best", "INT64", (-1,)), TensorSpec("probabilities", "FP32", (-1, 3)))
    expected = np.load(made / "network.npz")
    for rows in (slice(None), slice(0, 1), slice(0, 0), slice(None, None, 2)):
        best, probabilities = network.infer({"x": expected["x"][rows]}, ())
        assert (best[:2], probabilities[:2]) == (("best", "INT64"), ("probabilities", "FP32"))
        np.testing.assert_array_equal(best[2], expected["best"][rows])
        np.testing.assert_allclose(probabilities[2], expected["probabilities"][rows], rtol=1e-5)


def test_a_request_gets_the_outputs_it_asks_for_in_its_order(made: Path, network: LoadedModel) -> None:
    rows = np.load(made / "network.npz")["x"]
    assert [name for name, _, _ in network.infer({"x": rows}, ("probabilities", "best"))] == ["probabilities", "best"]
    assert [name for name, _, _ in network.infer({"x": rows}, ("best",))] == ["best"]
    with pytest.raises(InvalidRequest, match="has no output 'worst'; it has 'best', 'probabilities'"):
        network.infer({"x": rows}, ("worst",))


def test_a_signature_is_chosen_as_with_tritons_backend(made: Path) -> None:
    model = load(made / "network", parameters={"TF_SIGNATURE_DEF": "other"})
    assert [spec.name for spec in (*model.inputs, *model.outputs)] == ["rows", "twice"]
    with pytest.raises(LoadFailed, match="has no signature 'third', but 'other', 'serving_default'; choose one with"):
        load(made / "network", parameters={"TF_SIGNATURE_DEF": "third"})
    with pytest.raises(LoadFailed, match=r"'network' is no SavedModel that TensorFlow reads: .*tags: \{ train \}"):
        load(made / "network", parameters={"TF_GRAPH_TAG": "train"})


def test_the_settings_narrow_what_the_model_says(made: Path) -> None:
    model = load(
        made / "network",
        inputs=(TensorSpec("x", "FP32", (8, 4)),),
        outputs=(TensorSpec("probabilities", "FP32", (-1, 3)),),
    )
    assert model.inputs[0].shape == (8, 4)
    assert model.default_outputs == ("probabilities",)
    for wrong, message in (
        ({"inputs": (TensorSpec("y", "FP32", (-1, 4)),)}, "declare input 'y', but the model's inputs are 'x'"),
        ({"inputs": (TensorSpec("x", "FP64", (-1, 4)),)}, "declare input 'x' as FP64, the model as FP32"),
        ({"outputs": (TensorSpec("best", "INT64", (-1, 1)),)}, r"with shape \[-1, 1\], the model with \[-1\]"),
    ):
        with pytest.raises(LoadFailed, match=message):
            load(made / "network", **wrong)


def test_texts_and_a_table_filled_from_a_file_of_the_model(made: Path) -> None:
    model = load(made / "words")
    assert model.inputs == (TensorSpec("words", "BYTES", (-1,)),)
    words = np.array([b"moon", b"", b"star", "é".encode() * 40, b"nul\0nul"], object)
    places, shouted = model.infer({"words": words}, ("places", "shouted"))
    assert places[2].tolist() == [1, -1, 2, -1, -1]
    assert shouted[1] == "BYTES"
    assert shouted[2].tolist() == [b"MOON!", b"!", b"STAR!", "é".encode() * 40 + b"!", b"NUL\0NUL!"]


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_datatype_and_shape_comes_back_as_it_is(echoes: dict[str, LoadedModel], data: st.DataObject) -> None:
    datatype = data.draw(st.sampled_from(list(echoes)))
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    if datatype == "BYTES":
        shape = data.draw(shapes)
        size = int(np.prod(shape))
        array = np.empty(size, object)
        array[:] = data.draw(st.lists(st.binary(max_size=60), min_size=size, max_size=size))
        array = array.reshape(shape)
    else:
        array = data.draw(hnp.arrays(NUMPY_DTYPES[datatype], shapes))
    array.setflags(write=False)
    ((name, answered_as, values),) = echoes[datatype].infer({"x": array}, ())
    assert (name, answered_as, values.dtype) == ("y", datatype, array.dtype)
    if datatype == "BF16":
        rounded = np.abs(array) * 2.0**-8 + 1e-38
        assert values.shape == array.shape
        finite = np.isfinite(array) & np.isfinite(values)
        assert (np.abs(values[finite] - array[finite]) <= rounded[finite]).all()
        np.testing.assert_array_equal(np.isnan(values), np.isnan(array))
    else:
        np.testing.assert_array_equal(values, array)


def test_large_tensors_come_back_as_they_are(echoes: dict[str, LoadedModel]) -> None:
    pixels = np.arange(3 * 224 * 224, dtype=np.float32).reshape(1, 3, 224, 224)
    for array in (pixels, pixels[:, :, ::2], pixels.T):
        np.testing.assert_array_equal(echoes["FP32"].infer({"x": array}, ())[0][2], array)


def test_the_memory_of_texts_is_let_go(echoes: dict[str, LoadedModel]) -> None:
    from mmcore.runtimes import tensorflow_library

    texts = np.array([b"x" * size for size in (0, 1, 22, 23, 1000)], object)
    for _ in range(50):
        echoes["BYTES"].infer({"x": texts}, ())
    assert not tensorflow_library._strings


@pytest.mark.parametrize("name", ["frozen.pb", "model.graphdef"])
def test_a_frozen_graph_has_its_placeholders_and_results_as_tensors(made: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(made / "frozen.pb", tmp_path / name)
    (source,) = detect(tmp_path).values()
    model = load_model(source)
    assert model.platform == "tensorflow_graphdef"
    assert model.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    expected = np.load(made / "network.npz")
    answers = {datatype: values for _, datatype, values in model.infer({"x": expected["x"]}, ())}
    np.testing.assert_array_equal(answers["INT64"], expected["best"])
    np.testing.assert_allclose(answers["FP32"], expected["probabilities"], rtol=1e-5)
    hidden = load(source.path, outputs=(TensorSpec("Relu:0", "FP32", (-1, 16)),))
    assert [name for name, _, _ in hidden.infer({"x": expected["x"]}, ())] == ["Relu:0"]
    for wrong in ("Nothing", "Relu:1", "Relu:x"):
        with pytest.raises(LoadFailed, match=f"declare output '{wrong}', but the graph's outputs are '"):
            load(source.path, outputs=(TensorSpec(wrong, "FP32", (-1, 16)),))


@pytest.mark.parametrize("name", ["sequence.keras", "sequence.h5"])
def test_a_keras_file_answers_what_keras_does_and_so_does_what_triton_gets_of_it(
    made: Path, tmp_path: Path, name: str
) -> None:
    triton.lay_out(tmp_path, "m", "keras", made / name, None)
    expected = np.load(made / "sequence.npz")
    for path in (made / name, tmp_path / "1" / "model.savedmodel"):
        model = load(path)
        assert model.inputs == (TensorSpec("flowers", "FP32", (-1, 4)),)
        assert model.outputs == (TensorSpec("output_0", "FP32", (-1, 3)),)
        np.testing.assert_allclose(model.infer({"flowers": expected["x"]}, ())[0][2], expected["y"], rtol=1e-5)


def test_a_keras_file_is_exported_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(made / "sequence.keras").close()

    def export(path: Path, folder: Path) -> None:
        pytest.fail("exported again")

    monkeypatch.setattr(keras_files, "_export", export)
    model = load(made / "sequence.keras")
    expected = np.load(made / "sequence.npz")
    np.testing.assert_allclose(model.infer({"flowers": expected["x"]}, ())[0][2], expected["y"], rtol=1e-5)


def test_a_keras_file_that_brings_code_is_refused(made: Path) -> None:
    with pytest.raises(LoadFailed, match=r"'code\.keras' is no model that Keras reads: .*Lambda") as caught:
        load(made / "code.keras")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused_in_one_line(made: Path, tmp_path: Path) -> None:
    graph = (made / "frozen.pb").read_bytes()
    for content, message in (
        (b"", "is empty"),
        (b"junk", "is no graph that TensorFlow reads"),
        (graph[: len(graph) // 2], "is no graph that TensorFlow reads"),
    ):
        (tmp_path / "model.graphdef").write_bytes(content)
        with pytest.raises(LoadFailed, match=message) as caught:
            load(tmp_path / "model.graphdef")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["saved_model.pb", "variables/variables.index", "assets/vocabulary.txt"])
def test_a_saved_model_without_one_of_its_files_is_refused(made: Path, tmp_path: Path, missing: str) -> None:
    name = "words" if missing.startswith("assets") else "network"
    folder = shutil.copytree(made / name, tmp_path / "model")
    whole = (folder / missing).read_bytes()
    (folder / missing).write_bytes(whole[: len(whole) // 2])
    if not missing.startswith("assets"):  # half a vocabulary is one
        with pytest.raises(LoadFailed, match="is no SavedModel that TensorFlow reads"):
            load(folder)
    (folder / missing).unlink()
    with pytest.raises(LoadFailed, match=r"'model' is (no SavedModel that TensorFlow reads|not whole): ") as caught:
        load(folder)
    assert str(tmp_path) not in str(caught.value)


def test_what_the_graph_refuses_is_the_requests_fault(network: LoadedModel) -> None:
    with pytest.raises(InvalidRequest) as caught:
        network.infer({"x": np.zeros((2, 3), np.float32)}, ())
    assert str(caught.value) == "model 'm': Matrix size-incompatible: In[0]: [2,3], In[1]: [4,16]"


def test_a_repository_with_versions_is_read(made: Path, tmp_path: Path) -> None:
    for version in ("1", "3"):
        shutil.copytree(made / "network", tmp_path / version / "model.savedmodel")
    (tmp_path / "config.pbtxt").write_text(
        'platform: "tensorflow_savedmodel" max_batch_size: 4 version_policy { all {} }'
        ' input [{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] }]'
        ' output [{ name: "best" data_type: TYPE_INT64 dims: [] }]'
    )
    found = detect(tmp_path)
    assert list(found) == ["1", "3"]
    model = load_model(found["3"])
    assert (model.inputs, model.outputs) == (
        (TensorSpec("x", "FP32", (-1, 4)),),
        (TensorSpec("best", "INT64", (-1,)),),
    )


def test_one_model_answers_in_several_threads_at_once(made: Path, network: LoadedModel) -> None:
    expected = np.load(made / "network.npz")
    rows, answers = expected["x"], expected["probabilities"]
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(100):
            values = network.infer({"x": rows[number : number + 2]}, ("probabilities",))[0][2]
            if not np.allclose(values, answers[number : number + 2], rtol=1e-4):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


SERVE_ALONE = """
import hashlib, sys
import numpy as np
from pathlib import Path
from mmcore.model import ModelSource
from mmcore.runtimes import load_model
count = lambda: len(list(Path("/proc/self/task").iterdir()))
def load():
    model = load_model(ModelSource("m", "1", "tensorflow", Path(sys.argv[1])))
    model.infer({"x": np.zeros((100, 4), np.float32)}, ())
    return model
models = [load()]
first = count()
models += [load() for _ in range(30)]
last = count()
for model in models:
    model.close()
import ssl  # a second library of its own cryptography
print(last - first, *(name for name in ("tensorflow", "keras") if name in sys.modules))
if len(sys.argv) > 2:
    import tensorflow
    model = load()
    print(tensorflow.constant(model.infer({"x": np.zeros((1, 4), np.float32)}, ("best",))[0][2]).numpy())
"""


def test_many_models_do_not_mean_many_threads(made: Path) -> None:
    call = [sys.executable, "-c", SERVE_ALONE, str(made / "network")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["0"], done.stdout + done.stderr


def test_a_python_model_may_import_tensorflow_beside_it(made: Path) -> None:
    call = [sys.executable, "-c", SERVE_ALONE, str(made / "network"), "import"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "[0]"]
