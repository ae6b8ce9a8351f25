"""Whatever a settings file holds, it is read or refused with its name, and nothing else happens."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.errors import InvalidModel
from mmcore.storage import detect
from mmcore.storage.config_pbtxt import read_config_json
from mmcore.storage.settings import SETTINGS_FILES, read_settings

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["FP32", "..", "/etc/passwd", "model.onnx", "mlserver_sklearn.SKLearnModel", "64MiB", "thread"])
)  # fmt: skip
KEYS = st.sampled_from(
    [
        "name",
        "format",
        "version",
        "file",
        "max_batch_size",
        "inputs",
        "outputs",
        "execution",
        "size_bytes",
        "parameters",
        "implementation",
        "uri",
        "extra",
        "datatype",
        "shape",
        "labels",
        "dims",
        "data_type",
        "input",
        "version_policy",
        "specific",
        "versions",
        "latest",
        "num_versions",
        "backend",
        "platform",
    ]
)
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=6)
)
PBTXT_WORDS = [
    "name:",
    '"x"',
    "input",
    "{",
    "}",
    "[",
    "]",
    ",",
    "dims:",
    "-1",
    "3",
    "data_type:",
    "TYPE_FP32",
    "backend:",
    '"onnxruntime"',
    "max_batch_size:",
    "version_policy",
    "latest",
    "num_versions:",
    "\\",
    "'",
    "\x00",
]
PBTXT = st.lists(st.sampled_from(PBTXT_WORDS), max_size=20).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(SETTINGS_FILES)), document=DOCUMENTS, text=PBTXT, raw=st.binary(max_size=60))
def test_any_settings_file_is_read_or_refused_by_name(name: str, document: Any, text: str, raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        (model / "model.onnx").touch()
        for content in (json.dumps(document).encode(), yaml.safe_dump(document).encode(), text.encode(), raw):
            (model / name).write_bytes(content)
            try:
                read_settings(model)
            except InvalidModel as error:
                assert str(error).startswith(f"{name}: ")
            with contextlib.suppress(InvalidModel):
                (source,) = detect(model).values()
                assert source.path.resolve().is_relative_to(model.resolve())


@settings(max_examples=200, deadline=None)
@given(document=DOCUMENTS, text=st.text(max_size=40))
def test_any_configuration_in_a_request_is_read_or_refused(document: Any, text: str) -> None:
    for config in (json.dumps(document), text):
        with contextlib.suppress(InvalidModel):
            read_config_json(config, Path("/nonexistent"))
