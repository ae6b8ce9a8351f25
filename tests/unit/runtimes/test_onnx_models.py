"""ONNX: the graph's names, datatypes and shapes, and ONNX Runtime's answers."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mmcore.errors import InferenceFailed, InvalidRequest, LoadFailed
from mmcore.model import NUMPY_DTYPES, ModelSettings, ModelSource, TensorSpec
from mmcore.runtimes import LoadedModel, load_model

pytestmark = pytest.mark.slow

TYPES = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip
random = np.random.default_rng(5)


def write(
    path: Path, nodes: list[onnx.NodeProto], inputs: list[object], outputs: list[object], **extra: object
) -> Path:
    infos = [[helper.make_tensor_value_info(*info) for info in infos] for infos in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *infos, **extra)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def load(path: Path, settings: ModelSettings = ModelSettings()) -> LoadedModel:
    return load_model(ModelSource("m", "1", "onnx", path, settings))


def add_sub(path: Path) -> Path:
    nodes = [helper.make_node("Add", ["A", "B"], ["SUM"]), helper.make_node("Sub", ["A", "B"], ["DIFF"])]
    shape = ["batch", 4]
    tensors = [(name, TensorProto.FLOAT, shape) for name in ("A", "B", "SUM", "DIFF")]
    return write(path, nodes, tensors[:2], tensors[2:])


@pytest.mark.parametrize("datatype", TYPES)
def test_every_datatype_goes_in_and_out(tmp_path: Path, datatype: str) -> None:
    info = [TYPES[datatype], ["n", 2]]
    node = helper.make_node("Identity", ["X"], ["Y"])
    model = load(write(tmp_path / "model.onnx", [node], [("X", *info)], [("Y", *info)]))
    assert model.inputs == (TensorSpec("X", datatype, (-1, 2)),)
    assert model.outputs == (TensorSpec("Y", datatype, (-1, 2)),)
    values = [[b"gr\xc3\xbcn", b""], [b"a", b"0"]] if datatype == "BYTES" else [[0, 1], [1, 0]]
    array = np.array(values, dtype=NUMPY_DTYPES[datatype])
    array.setflags(write=False)
    ((name, answered, values_back),) = model.infer({"X": array}, ())
    assert (name, answered, values_back.dtype) == ("Y", datatype, array.dtype)
    assert values_back.tolist() == array.tolist()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnxruntime.InferenceSession, LoadedModel]:
    """The framework's own session, and ours on the same file."""
    weights = numpy_helper.from_array(random.normal(size=(8, 5)).astype(np.float32), "w")
    nodes = [helper.make_node("MatMul", ["X", "w"], ["h"]), helper.make_node("Softmax", ["h"], ["Y"], axis=1)]
    tensors = [("X", TensorProto.FLOAT, ["n", 8])], [("Y", TensorProto.FLOAT, ["n", 5])]
    path = write(tmp_path_factory.mktemp("network") / "model.onnx", nodes, *tensors, initializer=[weights])
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), load(path)


@pytest.fixture(scope="module")
def echoes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    """A model for each datatype that answers what it gets, of any shape."""
    folder = tmp_path_factory.mktemp("echoes")
    node = helper.make_node("Identity", ["X"], ["Y"])
    return {
        datatype: load(write(folder / f"{datatype}.onnx", [node], [("X", number, None)], [("Y", number, None)]))
        for datatype, number in TYPES.items()
    }


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_datatype_and_shape_comes_back_as_it_is(echoes: dict[str, LoadedModel], data: st.DataObject) -> None:
    datatype = data.draw(st.sampled_from(list(TYPES)))
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    texts = st.text("aß中😀 ", max_size=5).map(str.encode)
    elements = texts if datatype == "BYTES" else None
    array = data.draw(hnp.arrays(NUMPY_DTYPES[datatype], shape, elements=elements))
    ((_, answered_as, values),) = echoes[datatype].infer({"X": array}, ())
    assert (answered_as, values.dtype, values.shape) == (datatype, array.dtype, array.shape)
    np.testing.assert_array_equal(values, array)


@given(rows=hnp.arrays(np.float32, st.tuples(st.integers(0, 9), st.just(8))))
def test_any_rows_are_answered_as_by_the_framework(
    network: tuple[onnxruntime.InferenceSession, LoadedModel], rows: NDArray[np.float32]
) -> None:
    session, model = network
    np.testing.assert_array_equal(model.infer({"X": rows}, ())[0][2], session.run(None, {"X": rows})[0])


def test_outputs_are_answered_as_asked(tmp_path: Path) -> None:
    model = load(add_sub(tmp_path / "model.onnx"))
    arrays = {"A": np.ones((1, 4), np.float32), "B": np.full((1, 4), 3, np.float32)}
    assert [name for name, _, _ in model.infer(arrays, ())] == ["SUM", "DIFF"]
    assert [(name, array[0, 0]) for name, _, array in model.infer(arrays, ("DIFF",))] == [("DIFF", -2)]
    assert [name for name, _, _ in model.infer(arrays, ("DIFF", "SUM"))] == ["DIFF", "SUM"]
    with pytest.raises(InvalidRequest, match="model 'm' has no output 'PRODUCT'; it has 'SUM', 'DIFF'"):
        model.infer(arrays, ("PRODUCT",))


def test_settings_narrow_the_graphs_shapes_and_choose_the_default_outputs(tmp_path: Path) -> None:
    settings = ModelSettings(inputs=(TensorSpec("A", "FP32", (8, 4)),), outputs=(TensorSpec("DIFF", "FP32", (-1, -1)),))
    model = load(add_sub(tmp_path / "model.onnx"), settings)
    assert model.inputs == (TensorSpec("A", "FP32", (8, 4)), TensorSpec("B", "FP32", (-1, 4)))
    assert model.default_outputs == ("DIFF",)
    assert [spec.name for spec in model.outputs] == ["SUM", "DIFF"]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (TensorSpec("C", "FP32", (-1, 4)), "declare input 'C', but the model's inputs are 'A', 'B'"),
        (TensorSpec("A", "INT32", (-1, 4)), "declare input 'A' as INT32, the model as FP32"),
        (TensorSpec("A", "FP32", (-1, 5)), r"declare input 'A' with shape \[-1, 5\], the model with \[-1, 4\]"),
        (TensorSpec("A", "FP32", (4,)), r"declare input 'A' with shape \[4\], the model with"),
    ],
)
def test_settings_that_contradict_the_graph_are_refused(tmp_path: Path, declared: TensorSpec, message: str) -> None:
    with pytest.raises(LoadFailed, match=message):
        load(add_sub(tmp_path / "model.onnx"), ModelSettings(inputs=(declared,)))


def test_a_graph_that_states_no_shape_takes_any(tmp_path: Path) -> None:
    info = [TensorProto.FLOAT, None]
    node = helper.make_node("Identity", ["X"], ["Y"])
    model = load(write(tmp_path / "model.onnx", [node], [("X", *info)], [("Y", *info)]))
    assert model.inputs == (TensorSpec("X", "FP32", ()),)
    for shape in ((), (3,), (1, 2, 3)):
        assert model.infer({"X": np.zeros(shape, np.float32)}, ())[0][2].shape == shape


@pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"{}"], ids=["empty", "garbage", "json"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(LoadFailed, match=r"^model 'm': 'model\.onnx' is no model that ONNX Runtime \d.* reads: [^\[]"):
        load(tmp_path / "model.onnx")


def test_a_half_copied_file_is_refused(tmp_path: Path) -> None:
    whole = add_sub(tmp_path / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadFailed, match="is no model that ONNX Runtime"):
        load(tmp_path / "model.onnx")


def test_an_operator_the_framework_does_not_know_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Teleport", ["X"], ["Y"])
    tensors = [("X", TensorProto.FLOAT, [1])], [("Y", TensorProto.FLOAT, [1])]
    with pytest.raises(LoadFailed, match="Teleport"):
        load(write(tmp_path / "model.onnx", [node], *tensors))


def test_tensors_that_are_not_served_are_refused(tmp_path: Path) -> None:
    info = [TensorProto.BFLOAT16, [1]]
    node = helper.make_node("Identity", ["X"], ["Y"])
    with pytest.raises(LoadFailed, match=r"input 'X' is a tensor\(bfloat16\), which is not served"):
        load(write(tmp_path / "model.onnx", [node], [("X", *info)], [("Y", *info)]))


def test_dimensions_that_must_agree_are_checked_by_the_framework(tmp_path: Path) -> None:
    model = load(add_sub(tmp_path / "model.onnx"))
    with pytest.raises((InvalidRequest, InferenceFailed), match=r"model 'm': .*running (Add|Sub) node.* 2 by 3$"):
        model.infer({"A": np.ones((2, 4), np.float32), "B": np.ones((3, 4), np.float32)}, ())


def test_text_that_is_not_utf8_is_the_callers_mistake(tmp_path: Path) -> None:
    info = [TensorProto.STRING, [1]]
    model = load(
        write(tmp_path / "model.onnx", [helper.make_node("Identity", ["X"], ["Y"])], [("X", *info)], [("Y", *info)])
    )
    with pytest.raises(InvalidRequest, match="input 'X': the model takes text, but an element is not UTF-8"):
        model.infer({"X": np.array([b"\xff"], dtype=object)}, ())


def test_sessions_bring_no_threads_of_their_own(tmp_path: Path) -> None:
    path = add_sub(tmp_path / "model.onnx")
    load(path)

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    models = [load(path) for _ in range(20)]
    assert len(models) == 20
    assert threads() <= before  # another test's may end meanwhile


def test_a_large_model_can_be_given_threads(tmp_path: Path) -> None:
    path = add_sub(tmp_path / "model.onnx")
    model = load(path, ModelSettings(parameters={"intra_op_thread_count": "2"}))
    arrays = {"A": np.ones((1, 4), np.float32), "B": np.ones((1, 4), np.float32)}
    assert model.infer(arrays, ("SUM",))[0][2].tolist() == [[2, 2, 2, 2]]
    with pytest.raises(LoadFailed, match="the parameter intra_op_thread_count is 'many', which is no number"):
        load(path, ModelSettings(parameters={"intra_op_thread_count": "many"}))


def test_weights_beside_the_file_count(tmp_path: Path) -> None:
    path = add_sub(tmp_path / "model.onnx")
    before = load(path).size_bytes
    (tmp_path / "model.onnx.data").write_bytes(bytes(1_000_000))
    (tmp_path / "another.onnx").write_bytes(bytes(1_000_000))
    assert 1_000_000 < load(path).size_bytes - before < 3_000_000


def test_one_model_answers_in_several_threads_at_once(tmp_path: Path) -> None:
    model = load(add_sub(tmp_path / "model.onnx"))
    wrong: list[float] = []

    def ask(number: float) -> None:
        array = np.full((3, 4), number, np.float32)
        for _ in range(200):
            if model.infer({"A": array, "B": array}, ("SUM",))[0][2][0, 0] != 2 * number:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
