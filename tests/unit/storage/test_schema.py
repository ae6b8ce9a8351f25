"""The archived stack's ``_schema.json``: what it states, and which other settings it goes before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmcore.errors import InvalidModel
from mmcore.model import TensorSpec
from mmcore.storage import detect

SCHEMA: dict[str, Any] = {
    "inputs": [{"name": "INPUT__0", "datatype": "FP32", "shape": [-1, 3, 32, 32]}],
    "outputs": [{"name": "OUTPUT__0", "datatype": "STRING", "shape": [-1, 10]}],
}
INPUTS = (TensorSpec("INPUT__0", "FP32", (-1, 3, 32, 32)),)
OUTPUTS = (TensorSpec("OUTPUT__0", "BYTES", (-1, 10)),)


def written(folder: Path, schema: object, **files: str) -> Path:
    (folder / "model.pt").write_bytes(b"PK\3\4")
    (folder / "_schema.json").write_text(schema if isinstance(schema, str) else json.dumps(schema))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_schema_names_and_types_the_tensors(tmp_path: Path) -> None:
    (source,) = detect(written(tmp_path, SCHEMA)).values()
    assert (source.format, source.path.name) == ("torchscript", "model.pt")
    assert (source.settings.inputs, source.settings.outputs) == (INPUTS, OUTPUTS)


def test_a_schema_beside_the_version_folders_is_for_all_of_them(tmp_path: Path) -> None:
    written(tmp_path, SCHEMA)
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "model.pt").write_bytes(b"PK\3\4")
    assert {version: source.settings.inputs for version, source in detect(tmp_path).items()} == {
        "1": INPUTS,
        "2": INPUTS,
    }


def test_a_schema_goes_before_the_servers_own_settings_and_after_ours(tmp_path: Path) -> None:
    config = 'max_batch_size: 4 input [{ name: "x" data_type: TYPE_INT8 dims: [ 2 ] }]'
    ours = "outputs: [{name: y, datatype: INT8, shape: [-1]}]"
    (source,) = detect(written(tmp_path, SCHEMA, config__pbtxt=config, mmcore__yaml=ours)).values()
    assert source.settings.max_batch_size == 4
    assert source.settings.inputs == INPUTS
    assert source.settings.outputs == (TensorSpec("y", "INT8", (-1,)),)


def test_a_batch_dimension_must_be_free(tmp_path: Path) -> None:
    schema = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4]}]}
    with pytest.raises(InvalidModel, match=r"_schema\.json: 'x': its first dimension must be -1"):
        detect(written(tmp_path, schema, config__pbtxt="max_batch_size: 4"))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", r"_schema\.json: is not JSON"),
        ([], r"_schema\.json: expected a mapping"),
        ({"input": []}, r"_schema\.json: input: no such setting; known are inputs, outputs"),
        ({"inputs": {}}, r"_schema\.json: inputs: expected a list"),
        (
            {"inputs": [{"name": "x", "datatype": "TEXT", "shape": []}]},
            r"inputs\[0\]\.datatype: 'TEXT' is not a datatype",
        ),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}]}, r"inputs\[0\]\.shape: expected a list"),
    ],
)
def test_a_wrong_schema_is_named(tmp_path: Path, schema: object, message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        detect(written(tmp_path, schema))
