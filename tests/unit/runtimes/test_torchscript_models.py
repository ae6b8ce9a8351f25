"""TorchScript: names from settings or conventions, answers equal to PyTorch's own, read-only requests unharmed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple  # noqa: UP035  # the spelling that TorchScript's compiler knows

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from mmcore.errors import InferenceFailed, InvalidRequest, LoadFailed
from mmcore.model import ModelSettings, ModelSource, TensorSpec
from mmcore.runtimes import LoadedModel, load_model
from mmcore.storage import detect

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]

random = np.random.default_rng(11)
ROWS = random.normal(size=(6, 4)).astype(np.float32)
ROWS.setflags(write=False)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.last(torch.relu(self.hidden(x))), 1)


class Pictures(nn.Module):
    """Behaves differently in training: dropout, statistics; writes to its input and to intermediates."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 4, 3)
        self.level = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.9)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels.mul_(2)
        return self.drop(torch.relu_(self.level(self.look(pixels)))).mean([2, 3])


class Both(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        return left + right, left - right


class Keyed(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Dict[str, Tensor]:  # noqa: UP006
        return {"sum": left + right, "difference": left - right}


class Listed(nn.Module):
    def forward(self, tensors: List[Tensor]) -> List[Tensor]:  # noqa: UP006
        return [tensors[0] + tensors[1], tensors[0] - tensors[1]]


class Mapped(nn.Module):
    def forward(self, tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:  # noqa: UP006
        answer: Dict[str, Tensor] = {}  # noqa: UP006
        for name, tensor in tensors.items():
            answer[name] = tensor * 2
        return answer


class Growing(nn.Module):
    def forward(self, x: Tensor) -> List[Tensor]:  # noqa: UP006
        answer = [x]
        answer.append(x + 1)
        return answer


class Shouting(nn.Module):
    def forward(self, words: List[str], mark: str = "!") -> List[str]:  # noqa: UP006
        return [word.upper() + mark for word in words]


class Optionally(nn.Module):
    def forward(self, x: Tensor, factor: Optional[Tensor] = None, power: int = 1) -> Tensor:  # noqa: UP045
        return x**power if factor is None else x * factor


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        self.seen += 1
        return x, self.seen


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Narrow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 3).to(torch.bfloat16)


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x, x)


class Counted(nn.Module):
    def forward(self, x: Tensor, times: int) -> Tensor:
        return x * times


class Nothing(nn.Module):
    def forward(self) -> Tensor:
        return torch.zeros(1)


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[Tensor, Tensor]]:  # noqa: UP006
        return x, (x, x)


def saved(module: nn.Module, path: Path, *, trace: tuple[Any, ...] | None = None) -> Path:
    scripted: Any = torch.jit.trace(module, trace, strict=False) if trace else torch.jit.script(module)
    scripted.save(str(path))
    return path


def load(
    path: Path, inputs: tuple[TensorSpec, ...] = (), outputs: tuple[TensorSpec, ...] = (), **more: Any
) -> LoadedModel:
    settings = ModelSettings(inputs=inputs, outputs=outputs, **more)
    return load_model(ModelSource("m", "1", "torchscript", path, settings))


def specs(*names: str, datatype: str = "FP32", shape: tuple[int, ...] = (-1, 4)) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, datatype, shape) for name in names)


def names_of(model: LoadedModel) -> tuple[list[str], list[str]]:
    return [spec.name for spec in model.inputs], [spec.name for spec in model.outputs]


@pytest.mark.parametrize("trace", [None, (torch.zeros(2, 4),)], ids=["scripted", "traced"])
def test_a_module_answers_what_it_answers_in_pytorch(tmp_path: Path, trace: tuple[Any, ...] | None) -> None:
    module = Network().eval()
    model = load(saved(module, tmp_path / "model.pt", trace=trace))
    assert (model.platform, model.any_input_name, model.default_outputs) == ("pytorch_libtorch", False, ("OUTPUT__0",))
    assert (model.inputs, model.outputs) == (specs("INPUT__0", shape=()), specs("OUTPUT__0", shape=()))
    for rows in (ROWS, ROWS[:1], ROWS[:0]):
        ((name, datatype, values),) = model.infer({"INPUT__0": rows}, ())
        assert (name, datatype, values.dtype) == ("OUTPUT__0", "FP32", np.float32)
        with torch.no_grad():
            np.testing.assert_allclose(values, module(torch.tensor(rows)).numpy(), rtol=1e-6)


def test_a_module_saved_while_training_answers_as_evaluated_and_leaves_the_request_alone(tmp_path: Path) -> None:
    module = Pictures().train()
    path = saved(module, tmp_path / "model.pt")
    module.eval()
    pixels = random.normal(size=(2, 3, 8, 8)).astype(np.float32)
    before = pixels.copy()
    pixels.setflags(write=False)
    model = load(path, specs("INPUT__0", shape=(-1, 3, 8, 8)))
    for _ in range(3):
        ((_, _, values),) = model.infer({"INPUT__0": pixels}, ())
        with torch.no_grad():
            np.testing.assert_allclose(values, module(torch.tensor(before)).numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize(
    ("module", "declared", "order"),
    [
        (Both(), ("left", "right"), (0, 1)),
        (Both(), ("right", "left"), (1, 0)),
        (Both(), ("A__0", "B__1"), (0, 1)),
        (Both(), ("A__1", "B__0"), (1, 0)),
        (Both(), ("first", "second"), (0, 1)),
        (Both(), ("left", "other__0"), (0, 1)),
        (Listed(), ("a", "b"), (0, 1)),
        (Listed(), ("a__1", "b__0"), (1, 0)),
    ],
)
def test_names_are_matched_to_arguments_as_tritons_users_expect(
    tmp_path: Path, module: nn.Module, declared: tuple[str, str], order: tuple[int, int]
) -> None:
    model = load(saved(module, tmp_path / "model.pt"), specs(*declared))
    values = (ROWS, ROWS * 3)
    request = {name: values[place] for name, place in zip(declared, order, strict=True)}
    answer = model.infer(request, ())
    assert [name for name, _, _ in answer] == ["OUTPUT__0", "OUTPUT__1"]
    np.testing.assert_array_equal(answer[0][2], ROWS + ROWS * 3)
    np.testing.assert_array_equal(answer[1][2], ROWS - ROWS * 3)


@pytest.mark.parametrize("module", [Both(), Keyed()])
def test_a_request_gets_the_outputs_it_asks_for_in_its_order(tmp_path: Path, module: nn.Module) -> None:
    model = load(saved(module, tmp_path / "model.pt"))
    left, right = model.default_outputs
    answer = model.infer({"INPUT__0": ROWS, "INPUT__1": ROWS}, (right, left))
    assert [name for name, _, _ in answer] == [right, left]
    np.testing.assert_array_equal(answer[0][2], ROWS - ROWS)
    with pytest.raises(InvalidRequest, match=rf"has no output 'other'; it has '{left}', '{right}'"):
        model.infer({"INPUT__0": ROWS, "INPUT__1": ROWS}, ("other",))


@pytest.mark.parametrize("trace", [None, (torch.zeros(2), torch.zeros(2))], ids=["scripted", "traced"])
def test_a_dictionary_that_is_answered_names_the_outputs(tmp_path: Path, trace: tuple[Any, ...] | None) -> None:
    path = saved(Keyed(), tmp_path / "model.pt", trace=trace)
    assert names_of(load(path)) == (["INPUT__0", "INPUT__1"], ["sum", "difference"])
    assert names_of(load(path, specs("left", "right"), specs("difference"))) == (["left", "right"], ["difference"])
    with pytest.raises(LoadFailed, match="declare output 'product', but forward answers 'sum', 'difference'"):
        load(path, outputs=specs("product"))


def test_a_dictionary_that_is_taken_has_the_declared_keys(tmp_path: Path) -> None:
    path = saved(Mapped(), tmp_path / "model.pt")
    model = load(path, specs("a", "b"), specs("b", "a"))
    answer = model.infer({"a": ROWS, "b": ROWS + 1}, ())
    np.testing.assert_array_equal(answer[0][2], (ROWS + 1) * 2)
    np.testing.assert_array_equal(answer[1][2], ROWS * 2)
    with pytest.raises(LoadFailed, match=r"forward takes a Dict\[str, Tensor\]: declare its tensors as inputs"):
        load(path)
    with pytest.raises(LoadFailed, match=r"forward answers a Dict\[str, Tensor\] of unknown length: declare"):
        load(path, specs("a"))


def test_a_list_of_a_length_that_only_running_tells_needs_declared_outputs(tmp_path: Path) -> None:
    path = saved(Growing(), tmp_path / "model.pt")
    with pytest.raises(LoadFailed, match=r"forward answers a List\[Tensor\] of unknown length: declare the outputs"):
        load(path)
    answer = load(path, outputs=specs("one", "two")).infer({"INPUT__0": ROWS}, ())
    np.testing.assert_array_equal(answer[1][2], ROWS + 1)
    with pytest.raises(InferenceFailed, match="output 'three': IndexError"):
        load(path, outputs=specs("one", "two", "three")).infer({"INPUT__0": ROWS}, ())


def test_optional_arguments_may_be_declared_or_left_out(tmp_path: Path) -> None:
    path = saved(Optionally(), tmp_path / "model.pt")
    np.testing.assert_array_equal(load(path).infer({"INPUT__0": ROWS}, ())[0][2], ROWS)
    model = load(path, specs("factor", "x"))
    np.testing.assert_array_equal(model.infer({"x": ROWS, "factor": ROWS}, ())[0][2], ROWS * ROWS)
    with pytest.raises(LoadFailed, match="the settings declare no input for forward's argument 'x'"):
        load(path, specs("factor"))


def test_lists_of_texts_are_bytes(tmp_path: Path) -> None:
    path = saved(Shouting(), tmp_path / "model.pt")
    model = load(path)
    assert model.inputs == (TensorSpec("INPUT__0", "BYTES", (-1,)),)
    ((_, datatype, words),) = model.infer({"INPUT__0": np.array([b"ah", "é".encode()], object)}, ())
    assert (datatype, words.tolist()) == ("BYTES", [b"AH!", "é!".encode()])
    with pytest.raises(InvalidRequest, match="an element is not UTF-8"):
        model.infer({"INPUT__0": np.array([b"\xff"], object)}, ())
    with pytest.raises(LoadFailed, match="'words', a list of texts: declare it as BYTES"):
        load(path, specs("words"))


@settings(max_examples=80, deadline=None)
@given(
    array=st.sampled_from(
        [
            *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
            *("float16", "float32", "float64"),
        ]
    ).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
)
def test_any_datatype_and_shape_comes_back_as_it_is(same: LoadedModel, array: Any) -> None:
    array.setflags(write=False)
    ((_, datatype, answered),) = same.infer({"INPUT__0": array}, ())
    assert answered.dtype == array.dtype
    np.testing.assert_array_equal(answered, array)
    assert datatype == "FP32" or datatype in same.accepts["INPUT__0"]


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(saved(Same(), tmp_path_factory.mktemp("torch") / "model.pt"))


def test_declared_datatypes_are_answered_whatever_the_module_gives(tmp_path: Path) -> None:
    path = saved(Same(), tmp_path / "model.pt")
    model = load(path, specs("x"), specs("y", datatype="FP64"))
    ((name, datatype, values),) = model.infer({"x": ROWS}, ())
    assert (name, datatype, values.dtype) == ("y", "FP64", np.float64)
    assert model.accepts == {}
    with pytest.raises(InferenceFailed, match="output 'y' is FP32, but the settings declare BYTES"):
        load(path, specs("x"), specs("y", datatype="BYTES")).infer({"x": ROWS}, ())


def test_an_undeclared_outputs_datatype_is_found_out_where_the_inputs_are_declared(tmp_path: Path) -> None:
    path = saved(Narrow(), tmp_path / "model.pt")
    assert load(path, specs("x")).outputs == specs("OUTPUT__0", datatype="BF16", shape=())
    ((_, datatype, values),) = load(path).infer({"INPUT__0": ROWS}, ())
    assert (datatype, values.dtype) == ("BF16", np.float32)
    narrow = load(path, specs("x", datatype="BF16"))
    np.testing.assert_allclose(narrow.infer({"x": ROWS}, ())[0][2], ROWS * 3, rtol=1e-2)


def test_what_a_module_keeps_is_answered_as_it_was(tmp_path: Path) -> None:
    model = load(saved(Counting(), tmp_path / "model.pt"), specs("x"))
    answers = [model.infer({"x": ROWS}, ())[1][2] for _ in range(3)]
    assert [float(seen[0]) for seen in answers] == [1, 2, 3]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Counted(), "forward takes 'times', a int, which cannot be sent over KServe v2"),
        (Nothing(), "forward takes no tensor"),
        (Nested(), r"forward answers a Tuple\[Tensor, Tuple\[Tensor, Tensor\]\], which cannot be sent"),
    ],
)
def test_a_module_over_other_things_than_tensors_is_refused(tmp_path: Path, module: nn.Module, message: str) -> None:
    with pytest.raises(LoadFailed, match=message):
        load(saved(module, tmp_path / "model.pt"))


def test_settings_that_contradict_the_module_are_refused(tmp_path: Path) -> None:
    path = saved(Both(), tmp_path / "model.pt")
    with pytest.raises(LoadFailed, match="the inputs a, b, c, but forward takes left, right"):
        load(path, specs("a", "b", "c"))
    with pytest.raises(LoadFailed, match="declare no input for forward's argument 'right'"):
        load(path, specs("a"))
    with pytest.raises(LoadFailed, match="the settings declare 3 outputs, but forward answers 2"):
        load(path, outputs=specs("a", "b", "c"))
    with pytest.raises(LoadFailed, match="'left', a tensor: it cannot be BYTES"):
        load(path, specs("left", "right", datatype="BYTES"))


def test_a_file_that_is_no_torchscript_is_refused_with_what_to_do(tmp_path: Path) -> None:
    network = Network()
    whole = saved(network, tmp_path / "whole.pt").read_bytes()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    torch.export.save(torch.export.export(Same(), (torch.zeros(2),)), tmp_path / "program.pt2")
    for name, content, message in (
        ("empty.pt", b"", "is no TorchScript archive"),
        ("half.pt", whole[: len(whole) // 2], "is no TorchScript archive, or is cut short"),
        ("weights.pt", None, r"holds weights or a pickled module; save the module with torch\.jit\.script"),
        ("program.pt2", None, r"holds a program of torch\.export; save the module with"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(LoadFailed, match=message) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_what_the_module_raises_reaches_the_caller_in_one_line(tmp_path: Path) -> None:
    model = load(saved(Network(), tmp_path / "model.pt"))
    with pytest.raises(InferenceFailed) as caught:
        model.infer({"INPUT__0": np.zeros((1, 3), np.float32)}, ())
    assert str(caught.value) == "model 'm': mat1 and mat2 shapes cannot be multiplied (1x3 and 4x16)"
    with pytest.raises(InferenceFailed, match=r"a tensor of torch.complex64 has no V2 datatype"):
        load(saved(Complex(), tmp_path / "complex.pt")).infer({"INPUT__0": ROWS}, ())


CONFIG = """
platform: "pytorch_libtorch"
max_batch_size: 8
input [{ name: "INPUT__0" data_type: TYPE_FP32 dims: [ 4 ] }]
output [{ name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ 3 ] }]
"""


def test_a_triton_repository_and_a_schema_give_the_same_model(tmp_path: Path) -> None:
    module = Network().eval()
    triton, archived = tmp_path / "triton", tmp_path / "archived"
    (triton / "1").mkdir(parents=True)
    archived.mkdir()
    saved(module, triton / "1" / "model.pt")
    (triton / "config.pbtxt").write_text(CONFIG)
    saved(module, archived / "network.pt")
    (archived / "_schema.json").write_text(
        '{"inputs": [{"name": "INPUT__0", "datatype": "FP32", "shape": [-1, 4]}],'
        ' "outputs": [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [-1, 3]}]}'
    )
    for folder in (triton, archived):
        (source,) = detect(folder).values()
        model = load_model(source)
        assert model.inputs == specs("INPUT__0")
        assert model.outputs == specs("OUTPUT__0", shape=(-1, 3))
        with torch.no_grad():
            np.testing.assert_allclose(
                model.infer({"INPUT__0": ROWS}, ())[0][2], module(torch.tensor(ROWS)).numpy(), rtol=1e-6
            )


def test_one_module_answers_in_several_threads_at_once(tmp_path: Path) -> None:
    module = Network().eval()
    model = load(saved(module, tmp_path / "model.pt"))
    rows = [random.normal(size=(count + 1, 4)).astype(np.float32) for count in range(4)]
    with torch.no_grad():
        expected = [module(torch.tensor(array)).numpy() for array in rows]
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(50):
            if not np.allclose(model.infer({"INPUT__0": rows[number]}, ())[0][2], expected[number], rtol=1e-5):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (torch.get_num_threads(), torch.get_num_interop_threads()) == (1, 1)
