"""OpenVINO IR: names, datatypes and shapes are the model's own, answers the framework's, and no threads appear."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from openvino import opset13 as op

from mmcore.errors import InferenceFailed, InvalidRequest, LoadFailed
from mmcore.model import ModelSettings, ModelSource, TensorSpec
from mmcore.runtimes import LoadedModel, load_model
from mmcore.storage import detect

pytestmark = pytest.mark.slow

random = np.random.default_rng(13)
ROWS = random.normal(size=(6, 4)).astype(np.float32)
ROWS.setflags(write=False)
HIDDEN = random.normal(size=(4, 16)).astype(np.float32)
LAST = random.normal(size=(16, 3)).astype(np.float32)


def network() -> openvino.Model:
    x = op.parameter([-1, 4], np.float32, name="x")
    hidden = op.relu(op.matmul(x, HIDDEN, False, False))
    answer = op.softmax(op.matmul(hidden, LAST, False, False), 1)
    answer.output(0).get_tensor().set_names({"probabilities"})
    return openvino.Model([answer], [x], "network")


def both(shape: list[int], dtype: Any = np.int32) -> openvino.Model:
    left, right = op.parameter(shape, dtype, name="left"), op.parameter(shape, dtype, name="right")
    added, taken = op.add(left, right), op.subtract(left, right)
    added.output(0).get_tensor().set_names({"sum", "alias"})
    taken.output(0).get_tensor().set_names({"difference"})
    return openvino.Model([added, taken], [left, right], "both")


def same(datatype: Any, shape: Any) -> openvino.Model:
    x = op.parameter(shape, datatype, name="x")
    answer = op.result(x)
    return openvino.Model([answer], [x], "same")


def saved(model: openvino.Model, path: Path) -> Path:
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def load(path: Path, settings: ModelSettings = ModelSettings()) -> LoadedModel:
    return load_model(ModelSource("m", "1", "openvino", path, settings))


def test_a_model_answers_what_the_framework_does(tmp_path: Path) -> None:
    path = saved(network(), tmp_path / "model.xml")
    model = load(path)
    assert (model.platform, model.any_input_name) == ("openvino", False)
    assert model.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert model.outputs == (TensorSpec("probabilities", "FP32", (-1, 3)),)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for rows in (ROWS, ROWS[:1], ROWS[:3], ROWS[::2], ROWS[:0]):
        ((name, datatype, values),) = model.infer({"x": rows}, ())
        assert (name, datatype, values.dtype) == ("probabilities", "FP32", np.float32)
        np.testing.assert_allclose(values, compiled(np.array(rows))[0], rtol=1e-6)


def test_an_answer_outlives_the_requests_that_follow_it(tmp_path: Path) -> None:
    model = load(saved(both([2]), tmp_path / "model.xml"))
    one = np.array([1, 2], np.int32)
    first = model.infer({"left": one, "right": one}, ())
    model.infer({"left": one * 7, "right": one}, ())
    np.testing.assert_array_equal(first[0][2], [2, 4])


def test_a_request_gets_the_outputs_it_asks_for_in_its_order(tmp_path: Path) -> None:
    model = load(saved(both([-1, 2]), tmp_path / "model.xml"))
    left, right = random.integers(-9, 9, size=(2, 3, 2)).astype(np.int32)
    assert [(spec.name, spec.datatype, spec.shape) for spec in model.outputs] == [
        ("alias", "INT32", (-1, 2)),
        ("difference", "INT32", (-1, 2)),
    ]
    answer = model.infer({"left": left, "right": right}, ("difference", "alias"))
    assert [name for name, _, _ in answer] == ["difference", "alias"]
    np.testing.assert_array_equal(answer[0][2], left - right)
    np.testing.assert_array_equal(answer[1][2], left + right)
    with pytest.raises(InvalidRequest, match="has no output 'product'; it has 'alias', 'difference'"):
        model.infer({"left": left, "right": right}, ("product",))


def test_the_settings_choose_among_a_tensors_names_and_narrow_its_shape(tmp_path: Path) -> None:
    path = saved(both([-1, 2]), tmp_path / "model.xml")
    declared = (TensorSpec("sum", "INT32", (8, 2)),)
    model = load(path, ModelSettings(outputs=declared))
    assert (model.outputs[0], model.default_outputs) == (declared[0], ("sum",))
    for wrong, message in (
        (TensorSpec("total", "INT32", (-1, 2)), "declare output 'total', but the model's outputs are 'alias'"),
        (TensorSpec("sum", "FP32", (-1, 2)), "declare output 'sum' as FP32, the model as INT32"),
        (TensorSpec("sum", "INT32", (-1, 3)), r"with shape \[-1, 3\], the model with \[-1, 2\]"),
    ):
        with pytest.raises(LoadFailed, match=message):
            load(path, ModelSettings(outputs=(wrong,)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_datatype_and_shape_comes_back_as_it_is(echoes: dict[str, LoadedModel], data: st.DataObject) -> None:
    datatype = data.draw(st.sampled_from(list(echoes)))
    dtype = {"BOOL": np.bool_, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64}.get(datatype)
    dtype = dtype or np.dtype(datatype.lower())
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=4)))
    array.setflags(write=False)
    ((_, answered_as, values),) = echoes[datatype].infer({"x": array}, ())
    assert (answered_as, values.dtype) == (datatype, array.dtype)
    np.testing.assert_array_equal(values, array)


@pytest.fixture(scope="module")
def echoes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folder = tmp_path_factory.mktemp("openvino")
    dtypes = (np.bool_, np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64)
    models = [
        load(saved(same(dtype, [-1, -1]), folder / f"{np.dtype(dtype)}.xml"))
        for dtype in (*dtypes, np.float16, np.float32, np.float64)
    ]
    return {model.inputs[0].datatype: model for model in models}


def test_text_is_bytes(tmp_path: Path) -> None:
    model = load(saved(same(openvino.Type.string, [-1]), tmp_path / "model.xml"))
    assert model.inputs == (TensorSpec("x", "BYTES", (-1,)),)
    words = np.array([b"ah", "é".encode(), b""], object)
    ((_, datatype, answered),) = model.infer({"x": words}, ())
    assert (datatype, answered.tolist()) == ("BYTES", words.tolist())
    with pytest.raises(InvalidRequest, match="input 'x': the model takes text, but an element is not UTF-8"):
        model.infer({"x": np.array([b"\xff"], object)}, ())


def test_what_the_plugin_does_not_take_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = saved(same(np.float32, openvino.PartialShape.dynamic()), tmp_path / "model.xml")
    with pytest.raises(LoadFailed, match="doesn't support Parameter operation with dynamic rank"):
        load(path)


def test_answers_are_of_full_precision_unless_the_settings_ask_for_less(tmp_path: Path) -> None:
    path = saved(network(), tmp_path / "model.xml")
    hidden = np.maximum(ROWS.astype(np.float64) @ HIDDEN, 0) @ LAST
    exact = np.exp(hidden) / np.exp(hidden).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(load(path).infer({"x": ROWS}, ())[0][2], exact, rtol=1e-4)
    fast = load(path, ModelSettings(parameters={"INFERENCE_PRECISION_HINT": "bf16"}))
    np.testing.assert_allclose(fast.infer({"x": ROWS}, ())[0][2], exact, atol=0.1)
    with pytest.raises(LoadFailed, match=r"OpenVINO \d.* reads: "):
        load(path, ModelSettings(parameters={"INFERENCE_PRECISION_HINT": "f3"}))


def test_a_datatype_that_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="input 'x' is of bf16, which cannot be sent over KServe v2"):
        load(saved(same(openvino.Type.bf16, [2]), tmp_path / "model.xml"))


def test_a_damaged_pair_of_files_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = saved(network(), tmp_path / "model.xml")
    xml, weights = whole.read_bytes(), whole.with_suffix(".bin").read_bytes()
    for content, beside, message in (
        (b"", weights, "it holds no <net>"),
        (b"<html></html>", weights, "it holds no <net>"),
        (xml[: len(xml) // 2], weights, "is no model that OpenVINO"),
        (xml, weights[:50], "is no model that OpenVINO .*: Incorrect weights in bin file"),
    ):
        whole.write_bytes(content)
        whole.with_suffix(".bin").write_bytes(beside)
        with pytest.raises(LoadFailed, match=message) as caught:
            load(whole)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_weights_that_are_overwritten_leave_a_loaded_model_as_it_was(tmp_path: Path) -> None:
    path = saved(network(), tmp_path / "model.xml")
    model = load(path)
    before = model.infer({"x": ROWS}, ())[0][2]
    with path.with_suffix(".bin").open("r+b") as file:
        file.truncate(0)
    np.testing.assert_array_equal(model.infer({"x": ROWS}, ())[0][2], before)


def test_what_the_framework_refuses_reaches_the_caller_in_one_line(tmp_path: Path) -> None:
    left, right = (op.parameter([-1, -1], np.float32, name=name) for name in ("left", "right"))
    product = openvino.Model([op.matmul(left, right, False, False)], [left, right], "product")
    model = load(saved(product, tmp_path / "model.xml"))
    with pytest.raises(InferenceFailed, match=r"^model 'm': .*shapes are incompatible.*$"):
        model.infer({"left": ROWS, "right": ROWS}, ())
    np.testing.assert_allclose(model.infer({"left": ROWS, "right": ROWS.T}, ())[0][2], ROWS @ ROWS.T, rtol=1e-5)
    fixed = load(saved(both([2]), tmp_path / "fixed.xml"))
    with pytest.raises(InvalidRequest, match=r"model 'm': .*got \[3\] expecting \[2\]"):
        fixed.infer({"left": np.zeros(3, np.int32), "right": np.zeros(3, np.int32)}, ())
    two = np.ones(2, np.int32)
    np.testing.assert_array_equal(fixed.infer({"left": two, "right": two}, ())[0][2], [2, 2])


def test_a_repository_with_versions_is_read(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    saved(network(), tmp_path / "1" / "model.xml")
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    (tmp_path / "config.pbtxt").write_text('backend: "openvino" version_policy { all {} }')
    found = detect(tmp_path)
    assert [(version, source.format) for version, source in found.items()] == [("1", "openvino"), ("2", "openvino")]
    assert load_model(found["2"]).inputs == (TensorSpec("x", "FP32", (-1, 4)),)


def test_one_model_answers_in_several_threads_at_once(tmp_path: Path) -> None:
    path = saved(network(), tmp_path / "model.xml")
    model = load(path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    rows = [random.normal(size=(count + 1, 4)).astype(np.float32) for count in range(4)]
    expected = [compiled(array)[0].copy() for array in rows]
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(50):
            if not np.allclose(model.infer({"x": rows[number]}, ())[0][2], expected[number], rtol=1e-5):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


SERVE_ALONE = """
import sys
import numpy as np
from pathlib import Path
from mmcore.model import ModelSource
from mmcore.runtimes import load_model
models = []
def load():
    models.append(load_model(ModelSource("m", "1", "openvino", Path(sys.argv[1]))))
    models[-1].infer({"x": np.zeros((100, 4), np.float32)}, ())
    return len(list(Path("/proc/self/task").iterdir()))
first = load()
for _ in range(30):
    last = load()
print(last - first)
"""


def test_many_models_do_not_mean_many_threads(tmp_path: Path) -> None:
    path = saved(network(), tmp_path / "model.xml")
    done = subprocess.run([sys.executable, "-c", SERVE_ALONE, str(path)], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["0"], done.stdout + done.stderr


def test_its_maker_is_not_told_of_its_use() -> None:
    from openvino.tools.ovc import telemetry_stub, telemetry_utils

    assert telemetry_utils.tm is telemetry_stub
