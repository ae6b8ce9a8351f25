"""How Triton wants a model: a folder with one version folder in it and, where there is one, ``config.pbtxt``.

It knows no files of Keras: those are written anew as SavedModels, where TensorFlow is installed beside this process.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from google.protobuf import text_format

from mmcore.adapters.model_folders import newest_version
from mmcore.adapters.schema import read_tensors
from mmcore.errors import InvalidModel
from mmcore.pb import model_config_pb2
from mmcore.runtimes import keras_files

_CONFIG: Final = "config.pbtxt"
#: By type: the name of a file, the name of a folder (empty: its entries are the version's own), and the backend.
_FORMATS: Final = {
    "tensorflow": ("model.graphdef", "model.savedmodel", "tensorflow"),
    "keras": ("", "model.savedmodel", "tensorflow"),
    "onnx": ("model.onnx", "model.onnx", "onnxruntime"),
    "pytorch": ("model.pt", "", "pytorch"),
    "torchscript": ("model.pt", "", "pytorch"),
    "tensorrt": ("model.plan", "", "tensorrt"),
    "python": ("model.py", "", "python"),
}


def lay_out(folder: Path, name: str, kind: str, path: Path, schema: Path | None) -> None:
    """Link the model's files into ``folder``, and write its configuration from its own or from its schema.

    A file of Keras takes many seconds, the first time.

    Raises:
        InvalidModel: its schema cannot be read, or contradicts its configuration.
        LoadFailed: a file of Keras cannot be made a SavedModel.
    """
    tensors = read_tensors(schema) if schema is not None else {}
    if path.is_dir() and (path / _CONFIG).is_file():
        for entry in path.iterdir():
            if entry.name != _CONFIG:
                (folder / entry.name).symlink_to(entry)
        (folder / _CONFIG).write_text(_own_config((path / _CONFIG).read_text(encoding="utf-8"), tensors))
        return
    file_name, folder_name, backend = _FORMATS.get(kind, ("", "", ""))
    version, content = newest_version(path)
    if content.is_dir() and kind in _FORMATS:
        content = _unwrapped(content, file_name, folder_name)
    if content.is_file() and (kind == "keras" or content.suffix in keras_files.SUFFIXES):
        (folder / version).mkdir()
        _convert(content, folder / version / folder_name)
    elif content.is_file():
        (folder / version).mkdir()
        (folder / version / (file_name or content.name)).symlink_to(content)
    elif folder_name:
        (folder / version).mkdir()
        (folder / version / folder_name).symlink_to(content)
    else:
        (folder / version).symlink_to(content)
    if tensors:
        config = model_config_pb2.ModelConfig(backend=backend)
        _describe(config, tensors)
        (folder / _CONFIG).write_text(text_format.MessageToString(config))


def _convert(file: Path, folder: Path) -> None:
    """Write a Keras file as a SavedModel; keras_files keeps what it has written for the next load."""
    if file.suffix not in keras_files.SUFFIXES:
        known = " or ".join(keras_files.SUFFIXES)
        raise InvalidModel(f"{file.name} is no file of Keras, {known}; Triton takes a SavedModel's folder as well")
    missing = [package for package in ("keras", "tensorflow") if find_spec(package) is None]
    if missing:
        raise InvalidModel(
            f"{file.name} is a file of Keras, which Triton takes as a SavedModel alone: install {' and '.join(missing)}"
            " beside mmcore to have it converted, or export it"
        )
    with keras_files.exports.exported(file) as exported:
        shutil.copytree(exported, folder)


def _unwrapped(content: Path, file_name: str, folder_name: str) -> Path:
    """What a folder holds alone, where that is the model."""
    entries = [entry for entry in content.iterdir() if entry.name != "_schema.json"]
    if len(entries) == 1 and (entries[0].is_file() or folder_name) and entries[0].name != "saved_model.pb":
        return entries[0]
    return content


def _own_config(text: str, tensors: dict[str, list[dict[str, Any]]]) -> str:
    """The model's own configuration without its name, which is the folder's, and with the schema's tensors.

    One with fields that are not known here goes as it is.
    """
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError:
        return text
    config.name = ""
    _describe(config, tensors)
    return text_format.MessageToString(config)


def _describe(config: model_config_pb2.ModelConfig, tensors: dict[str, list[dict[str, Any]]]) -> None:
    for side, field in (("inputs", "input"), ("outputs", "output")):
        if side in tensors:
            config.ClearField(field)
        for tensor in tensors.get(side, ()):
            dims = tensor["shape"]
            if config.max_batch_size > 0:
                if not dims or dims[0] != -1:
                    raise InvalidModel(f"the schema's {tensor['name']!r} must have -1 as its first dimension")
                dims = dims[1:]
            datatype = {"BYTES": "STRING"}.get(tensor["datatype"], tensor["datatype"])
            try:
                getattr(config, field).add(name=tensor["name"], data_type=f"TYPE_{datatype}", dims=dims)
            except ValueError:
                raise InvalidModel(f"the schema's {tensor['name']!r} has no datatype {datatype!r}") from None
