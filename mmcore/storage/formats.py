"""Tells a model's format from its file's name and first bytes; nothing is ever unpickled or executed for that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from mmcore.errors import InvalidModel

_HEAD_BYTES: Final = 4096
_XGBOOST_JSON: Final = re.compile(rb'\s*\{\s*"(learner|version)"\s*:')
_JSON_KEYS: Final = re.compile(rb'"learner"\s*:')
#: A UBJSON object whose first key is one of XGBoost's two: the key's length in any of its encodings stands between.
_XGBOOST_UBJ: Final = re.compile(rb"\{[\x00-\x7f]{2,9}(learner|version)", re.DOTALL)

#: Formats that the name alone tells.
_BY_SUFFIX: Final = {
    ".joblib": "sklearn",
    ".pkl": "sklearn",
    ".pickle": "sklearn",
    ".skops": "sklearn",
    ".onnx": "onnx",
    ".pt": "torchscript",
    ".pth": "torchscript",
    ".graphdef": "tensorflow",
    ".pb": "tensorflow",
    ".savedmodel": "tensorflow",
    ".h5": "tensorflow",
    ".keras": "tensorflow",
    ".mar": "torchserve",
    ".plan": "tensorrt",
    ".cbm": "catboost",
    ".tflite": "tflite",
    ".pmml": "pmml",
    ".pdmodel": "paddle",
}
#: Formats whose suffix others use too.
BY_CONTENT: Final = frozenset({".json", ".ubj", ".bst", ".model", ".txt"})


def format_of(path: Path) -> str | None:
    """The format of a file, or of a folder that is a model by itself; None when it is not a model.

    Raises:
        InvalidModel: it cannot be read.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return "tensorflow" if (path / "saved_model.pb").is_file() else None
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if suffix == ".xml":
        return "openvino" if path.with_suffix(".bin").is_file() else None
    if path.name == "model.py":
        return "python"
    return _told_by_content(_head(path)) if suffix in BY_CONTENT else None


def is_triton_python(path: Path) -> bool:
    """Whether a ``model.py`` is written for Triton's Python backend instead of for mmcore."""
    try:
        return re.search(rb"^class\s+TritonPythonModel\b", path.read_bytes(), re.MULTILINE) is not None
    except OSError as error:
        raise InvalidModel(f"{path.name} cannot be read: {error.strerror}") from error


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise InvalidModel(f"{path.name} cannot be read: {error.strerror}") from error


def _told_by_content(head: bytes) -> str | None:
    if head.startswith((b"tree\n", b"tree\r\n")):
        return "lightgbm"
    if head.startswith(b"binf") or _XGBOOST_UBJ.match(head):
        return "xgboost"
    # XGBoost writes the learner first; others that begin with a version need not be its own.
    if (match := _XGBOOST_JSON.match(head)) and (match[1] == b"learner" or _JSON_KEYS.search(head)):
        return "xgboost"
    return None
