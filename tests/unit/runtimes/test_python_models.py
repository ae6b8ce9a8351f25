"""A class in model.py: loading, answering, and every way in which it can be wrong."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from mmcore.errors import InferenceFailed, InvalidRequest, LoadFailed
from mmcore.model import ModelSettings, ModelSource, TensorSpec
from mmcore.runtimes import LoadedModel, load_model

HEAD = """
class Model:
    inputs = [("X", "FP32", [-1, 2])]
    outputs = [("Y", "FP32", [-1, 2])]

"""
ROWS = np.array([[1, 2], [3, 4]], dtype=np.float32)


def load(folder: Path, text: str, settings: ModelSettings = ModelSettings(), name: str = "m") -> LoadedModel:
    (folder / "model.py").write_text(text)
    return load_model(ModelSource(name, "1", "python", folder / "model.py", settings))


def test_a_class_answers_with_the_tensors_it_declares(tmp_path: Path) -> None:
    model = load(tmp_path, HEAD + "    def predict(self, inputs):\n        return {'Y': inputs['X'] * 2}\n")
    assert model.inputs == (TensorSpec("X", "FP32", (-1, 2)),)
    assert model.outputs == (TensorSpec("Y", "FP32", (-1, 2)),)
    ((name, datatype, array),) = model.infer({"X": ROWS}, ())
    assert (name, datatype) == ("Y", "FP32")
    np.testing.assert_array_equal(array, ROWS * 2)


def test_an_identity_hands_on_the_very_array(tmp_path: Path) -> None:
    model = load(tmp_path, HEAD + "    def predict(self, inputs):\n        return {'Y': inputs['X']}\n")
    ((_, _, array),) = model.infer({"X": ROWS}, ())
    assert array is ROWS


def test_a_folder_can_stand_for_its_model_file(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(HEAD + "    def predict(self, inputs):\n        return {'Y': inputs['X']}\n")
    assert load_model(ModelSource("m", "1", "python", tmp_path)).default_outputs == ("Y",)


def test_only_the_outputs_asked_for_are_answered_in_the_order_asked(tmp_path: Path) -> None:
    model = load(
        tmp_path,
        "class Model:\n"
        "    inputs = [('X', 'INT64', [-1])]\n"
        "    outputs = [('A', 'INT64', [-1]), ('B', 'INT64', [-1]), ('C', 'INT64', [-1])]\n"
        "    def predict(self, inputs):\n"
        "        return {'A': inputs['X'], 'B': inputs['X'] + 1, 'C': inputs['X'] + 2}\n",
    )
    answered = model.infer({"X": np.array([5])}, ("C", "A"))
    assert [(name, array.tolist()) for name, _, array in answered] == [("C", [7]), ("A", [5])]


def test_the_settings_tensors_go_before_the_classs(tmp_path: Path) -> None:
    settings = ModelSettings(
        inputs=(TensorSpec("I", "INT32", (-1,)),), outputs=(TensorSpec("O", "FP64", (-1,)),), parameters={"by": "3"}
    )
    text = HEAD + (
        "    def load(self, path, parameters):\n"
        "        self.by = int(parameters['by']) + int((path / 'offset').read_text())\n"
        "    def predict(self, inputs):\n"
        "        return {'O': inputs['I'] * self.by}\n"
    )
    (tmp_path / "offset").write_text("4")
    model = load(tmp_path, text, settings)
    assert (model.inputs, model.outputs) == (settings.inputs, settings.outputs)
    ((_, datatype, array),) = model.infer({"I": np.array([2], dtype=np.int32)}, ())
    assert (datatype, array.dtype, array.tolist()) == ("FP64", np.float64, [14.0])


def test_text_in_an_answer_becomes_bytes(tmp_path: Path) -> None:
    model = load(
        tmp_path,
        "class Model:\n"
        "    inputs = [('X', 'BYTES', [-1])]\n"
        "    outputs = [('Y', 'BYTES', [-1])]\n"
        "    def predict(self, inputs):\n"
        "        return {'Y': [element.decode().upper() for element in inputs['X']]}\n",
    )
    ((_, datatype, array),) = model.infer({"X": np.array(["grün".encode(), b""], dtype=object)}, ())
    assert (datatype, array.dtype) == ("BYTES", np.dtype(object))
    assert array.tolist() == ["GRÜN".encode(), b""]


def test_numbers_of_the_same_kind_are_converted(tmp_path: Path) -> None:
    model = load(tmp_path, HEAD + "    def predict(self, inputs):\n        return {'Y': inputs['X'].astype('f8')}\n")
    ((_, _, array),) = model.infer({"X": ROWS}, ())
    assert array.dtype == np.float32


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("{'Y': 'text'}", r"returned output 'Y' that is no FP32"),
        ("{'Y': inputs['X'].astype('c8')}", r"returned output 'Y' that is no FP32"),
        ("{'Z': inputs['X'], 'W': 0}", r"returned no output 'Y', but 'Z', 'W'"),
        ("{}", r"returned no output 'Y', but nothing"),
        ("None", r"returned no output 'Y', but NoneType"),
        ("[1, 2]", r"returned no output 'Y', but list"),
    ],
)
def test_an_answer_that_is_no_answer_is_the_models_failure(tmp_path: Path, returned: str, message: str) -> None:
    model = load(tmp_path, HEAD + f"    def predict(self, inputs):\n        return {returned}\n")
    with pytest.raises(InferenceFailed, match=message):
        model.infer({"X": ROWS}, ())


def test_an_exception_reaches_the_caller_as_text_and_the_log_with_its_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tmp_path, HEAD + "    def predict(self, inputs):\n        raise ValueError('no such colour')\n")
    with pytest.raises(InferenceFailed) as caught:
        model.infer({"X": ROWS}, ())
    assert str(caught.value) == "model 'm': ValueError: no such colour"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.exc_info is not None


def test_failures_in_a_row_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(tmp_path, HEAD + "    def predict(self, inputs):\n        raise ValueError\n")
    for _ in range(50):
        with pytest.raises(InferenceFailed, match=r"model 'm': ValueError$"):
            model.infer({"X": ROWS}, ())
    assert len(caplog.records) == 1


def test_a_model_can_blame_the_caller(tmp_path: Path) -> None:
    text = "from mmcore.errors import InvalidRequest\n" + HEAD
    model = load(tmp_path, text + "    def predict(self, inputs):\n        raise InvalidRequest('Y < 0')\n")
    with pytest.raises(InvalidRequest, match=r"^Y < 0$"):
        model.infer({"X": ROWS}, ())


def test_an_unknown_output_is_the_callers_mistake(tmp_path: Path) -> None:
    model = load(tmp_path, HEAD + "    def predict(self, inputs):\n        return {'Y': inputs['X']}\n")
    with pytest.raises(InvalidRequest, match=r"model 'm' has no output 'Z'; it has 'Y'"):
        model.infer({"X": ROWS}, ("Z",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Model\n", r"SyntaxError"),
        ("import no_such_module\n", r"needs the Python module 'no_such_module', which is not installed"),
        ("raise RuntimeError('no GPU')\n", r"cannot load 'model\.py': RuntimeError: no GPU"),
        ("x = 1\n", r"has no class 'Model' with a predict method"),
        ("class Model: pass\n", r"has no class 'Model' with a predict method"),
        ("class Model:\n    def predict(self, inputs): ...\n", r"declares no inputs"),
        (
            "class Model:\n    inputs = [('X', 'FP32', [1])]\n    def predict(self, inputs): ...\n",
            r"declares no outputs: give the class outputs = ",
        ),
        ("class Model:\n    inputs = ['X']\n    def predict(self, inputs): ...\n", r"inputs is no list of \(name,"),
        (
            "class Model:\n    inputs = [('X', 'FLOAT', [1])]\n    def predict(self, inputs): ...\n",
            r"tensor 'X' has the unknown datatype 'FLOAT'",
        ),
        (
            HEAD + "    def predict(self, inputs): ...\n    def load(self, path, parameters): 1 / 0\n",
            r"ZeroDivisionError",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason_and_leaves_nothing_behind(
    tmp_path: Path, text: str, message: str
) -> None:
    modules, path = set(sys.modules), list(sys.path)
    with pytest.raises(LoadFailed, match=message):
        load(tmp_path, text)
    assert not {name for name in set(sys.modules) - modules if name.startswith("mmcore_model_")}
    assert sys.path == path


def test_another_class_can_be_named_in_the_settings(tmp_path: Path) -> None:
    text = HEAD.replace("Model", "Other") + "    def predict(self, inputs):\n        return {'Y': inputs['X']}\n"
    assert load(tmp_path, text, ModelSettings(parameters={"class": "Other"})).default_outputs == ("Y",)


def test_two_models_with_files_of_the_same_names_do_not_meet(tmp_path: Path) -> None:
    path, models = list(sys.path), []
    for factor in (2, 3):
        folder = tmp_path / f"x{factor}"
        (folder / "parts").mkdir(parents=True)
        (folder / "parts" / "__init__.py").write_text("from .number import FACTOR\n")
        (folder / "parts" / "number.py").write_text(f"FACTOR = {factor}\n")
        (folder / "scale.py").write_text("from .parts import FACTOR\n\ndef scale(x):\n    return x * FACTOR\n")
        text = "from .scale import scale\n" + HEAD
        models.append(load(folder, text + "    def predict(self, inputs):\n        return {'Y': scale(inputs['X'])}\n"))
    for factor, model in zip((2, 3), models, strict=True):
        np.testing.assert_array_equal(model.infer({"X": ROWS}, ())[0][2], ROWS * factor)
    assert sys.path == path
    assert not list(tmp_path.rglob("__pycache__")), "the folder is watched, and may be read-only"


def test_a_helper_imported_by_its_bare_name_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "scale.py").write_text("")
    with pytest.raises(LoadFailed, match=r"imports 'scale', which lies beside it: write 'from \. import scale'"):
        load(tmp_path, "import scale\n")


def test_a_rewritten_file_of_equal_size_and_time_is_read_anew(tmp_path: Path) -> None:
    answers = []
    for number in (1, 2):
        model = load(
            tmp_path, HEAD + f"    def predict(self, inputs):\n        return {{'Y': inputs['X'] * {number}}}\n"
        )
        answers.append(model.infer({"X": np.ones((1, 2), np.float32)}, ())[0][2].tolist())
        model.close()
    assert answers == [[[1, 1]], [[2, 2]]]


def test_closing_calls_the_model_and_forgets_its_modules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "part.py").write_text("")
    text = (
        "from . import part\n"
        + HEAD
        + "    def predict(self, inputs): ...\n    def close(self): raise OSError('stuck')\n"
    )
    model = load(tmp_path, text, name="parting")
    assert {name.rpartition("_")[2] for name in sys.modules if "parting" in name} == {"parting", "parting.part"}
    model.close()
    assert not [name for name in sys.modules if "parting" in name]
    assert "model 'parting' failed to close" in caplog.text
