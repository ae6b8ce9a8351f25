"""Which runtime reads a model, and what its owner is told when none can."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest

from mmcore.errors import LoadFailed
from mmcore.model import ModelSettings, ModelSource
from mmcore.runtimes import FORMATS, load_model
from mmcore.runtimes.load_warnings import logged_for

ECHO = """
class Model:
    inputs = [("X", "FP32", [-1])]
    outputs = [("Y", "FP32", [-1])]

    def predict(self, inputs):
        return {"Y": inputs["X"]}
"""


def test_the_formats_that_are_served_are_listed() -> None:
    assert set(FORMATS) == {"lightgbm", "onnx", "openvino", "python", "sklearn", "tensorflow", "torchscript", "xgboost"}


def test_a_format_without_a_runtime_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        LoadFailed, match=r"model 'm': the format 'pmml' is not served; these are: lightgbm, onnx, openvino, python"
    ):
        load_model(ModelSource("m", "1", "pmml", tmp_path))


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"'model\.py' does not exist"):
        load_model(ModelSource("m", "1", "python", tmp_path / "model.py"))


@pytest.mark.parametrize(
    ("served", "framework", "extra"),
    [
        ("onnx", "onnxruntime", "onnx"),
        ("openvino", "openvino", "openvino"),
        ("sklearn", "joblib", "sklearn"),
        ("torchscript", "torch", "torch"),
        ("xgboost", "xgboost", "xgboost"),
    ],
)
def test_a_missing_framework_is_named_with_what_installs_it(
    served: str, framework: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"mmcore.runtimes.{served}", raising=False)
    monkeypatch.setitem(sys.modules, framework, None)  # what Python does where there is no such module
    with pytest.raises(LoadFailed, match=rf"{framework}.*pip install 'mmcore\[{extra}\]'"):
        load_model(ModelSource("m", "1", served, tmp_path / "model"))


def test_lightgbm_is_looked_for_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mmcore.runtimes.lightgbm", raising=False)
    monkeypatch.delitem(sys.modules, "lightgbm", raising=False)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(LoadFailed, match=r"No module named 'lightgbm'.*pip install 'mmcore\[lightgbm\]'"):
        load_model(ModelSource("m", "1", "lightgbm", tmp_path / "model.txt"))


def test_tensorflow_is_looked_for_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorflow", "tensorflow_library", "keras_files"):
        monkeypatch.delitem(sys.modules, f"mmcore.runtimes.{module}", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadFailed, match=r"No module named 'tensorflow'.*pip install 'mmcore\[tensorflow\]'"):
        load_model(ModelSource("m", "1", "tensorflow", tmp_path / "model.graphdef"))


def test_skops_is_named_where_a_file_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skops.io", None)
    (tmp_path / "model.skops").write_bytes(b"PK")
    with pytest.raises(LoadFailed, match=r"'model\.skops' needs skops; install it with: pip install 'mmcore\[skops\]'"):
        load_model(ModelSource("m", "1", "sklearn", tmp_path / "model.skops"))


def test_no_framework_is_imported_for_a_python_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for framework in ("onnxruntime", "sklearn", "joblib", "xgboost", "torch", "openvino", "tensorflow"):
        monkeypatch.setitem(sys.modules, framework, None)
    (tmp_path / "model.py").write_text(ECHO)
    assert load_model(ModelSource("m", "1", "python", tmp_path)).platform == "python"


def test_the_stated_size_goes_before_the_estimate(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(ECHO)
    (tmp_path / "weights.bin").write_bytes(bytes(1_000_000))
    estimated = load_model(ModelSource("m", "1", "python", tmp_path))
    stated = load_model(ModelSource("m", "1", "python", tmp_path, ModelSettings(size_bytes=123)))
    assert 1_000_000 < estimated.size_bytes < 1_200_000
    assert stated.size_bytes == 123


def test_memory_that_runs_out_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise MemoryError\n")
    with pytest.raises(LoadFailed, match=r"model 'm': out of memory while loading 'model\.py'"):
        load_model(ModelSource("m", "1", "python", tmp_path / "model.py"))


def test_a_warning_while_loading_is_logged_under_the_models_name(caplog: pytest.LogCaptureFixture) -> None:
    warnings.simplefilter("always")
    with logged_for("iris"):
        warnings.warn("made by an older version", UserWarning, stacklevel=1)
    assert "model 'iris': UserWarning: made by an older version" in caplog.text


def test_a_warning_outside_of_loading_goes_where_it_went_before(caplog: pytest.LogCaptureFixture) -> None:
    warnings.simplefilter("always")
    with logged_for("iris"):
        pass
    with pytest.warns(UserWarning, match="not of a load"):
        warnings.warn("not of a load", UserWarning, stacklevel=1)
    assert not caplog.text
