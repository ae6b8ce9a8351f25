"""How models are laid out for servers: links and settings, by type, version and schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmcore.adapters import mlserver, ovms, triton
from mmcore.adapters.opening import open_runtime
from mmcore.adapters.repository import RepositoryRuntime
from mmcore.adapters.torchserve import TorchServeRuntime
from mmcore.errors import InvalidModel, RpcError, Status
from mmcore.pb import model_runtime_pb2 as pb

SCHEMA = {
    "inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "Y", "datatype": "BYTES", "shape": [-1]}],
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def links(folder: Path) -> dict[str, str]:
    """Every link below ``folder`` to the last parts of where it leads."""
    found = {}
    for entry in sorted(folder.rglob("*")):
        if entry.is_symlink():
            found[str(entry.relative_to(folder))] = "/".join(entry.readlink().parts[-2:])
    return found


@pytest.mark.parametrize(("kind", "files", "asked", "expected"), [
    ("onnx", ["m/net.onnx"], "m/net.onnx", {"1/model.onnx": "m/net.onnx"}),
    ("onnx", ["m/net.onnx"], "m", {"1/model.onnx": "m/net.onnx"}),
    ("onnx", ["m/net.onnx", "m/weights"], "m", {"1/model.onnx": "in/m"}),
    ("tensorflow", ["m/saved_model.pb", "m/variables/v"], "m", {"1/model.savedmodel": "in/m"}),
    ("tensorflow", ["m/saved_model.pb"], "m/saved_model.pb", {"1/model.graphdef": "m/saved_model.pb"}),
    ("pytorch", ["m/2/a.pt", "m/14/b.pt"], "m", {"14/model.pt": "14/b.pt"}),
    ("pytorch", ["m/1/a.pt", "m/NAN/b.pt"], "m", {"1": "in/m"}),
    ("tensorrt", ["m/model.plan", "m/more"], "m", {"1": "in/m"}),
    ("else", ["m/some.bin"], "m/some.bin", {"1/some.bin": "m/some.bin"}),
])  # fmt: skip
def test_triton_gets_one_version_with_the_names_it_knows(
    tmp_path: Path, made: Path, kind: str, files: list[str], asked: str, expected: dict[str, str]
) -> None:
    root = tree(tmp_path / "in", *files)
    triton.lay_out(made, "id", kind, root / asked, None)
    assert links(made) == expected


@pytest.mark.parametrize(("name", "absent", "text"), [
    ("net.pkl", "", r"net\.pkl is no file of Keras, \.keras or \.h5"),
    ("net.h5", "tensorflow", "a SavedModel alone: install tensorflow beside mmcore"),
])  # fmt: skip
def test_a_keras_file_that_cannot_be_converted_for_triton_is_refused(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, name: str, absent: str, text: str
) -> None:
    monkeypatch.setattr(triton, "find_spec", lambda package: None if package == absent else True)
    root = tree(tmp_path / "in", name)
    with pytest.raises(InvalidModel, match=text):
        triton.lay_out(made, "id", "keras", root / name, None)


def test_a_folder_for_keras_is_a_saved_model(tmp_path: Path, made: Path) -> None:
    root = tree(tmp_path / "in", "m/saved_model.pb", "m/variables/v")
    triton.lay_out(made, "id", "keras", root / "m", None)
    assert links(made) == {"1/model.savedmodel": "in/m"}


def test_tritons_configuration_loses_its_name_and_takes_the_schemas_tensors(tmp_path: Path, made: Path) -> None:
    root = tree(tmp_path / "m", "1/model.py", "schema.json")
    (root / "config.pbtxt").write_text('name: "other" backend: "python" max_batch_size: 8')
    (root / "schema.json").write_text(json.dumps(SCHEMA))
    triton.lay_out(made, "id", "python", root, root / "schema.json")
    text = (made / "config.pbtxt").read_text()
    assert "other" not in text
    assert "TYPE_STRING" in text
    assert "dims: 4" in text
    assert "dims: -1" not in text
    assert links(made)["1"] == "m/1"


def test_a_configuration_is_made_of_a_schema(tmp_path: Path, made: Path) -> None:
    root = tree(tmp_path, "net.onnx")
    (root / "schema.json").write_text(json.dumps(SCHEMA))
    triton.lay_out(made, "id", "onnx", root / "net.onnx", root / "schema.json")
    text = (made / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in text
    assert "dims: -1" in text


def test_a_schema_without_a_batch_dimension_contradicts_a_batched_configuration(tmp_path: Path, made: Path) -> None:
    root = tree(tmp_path / "m", "1/model.py")
    (root / "config.pbtxt").write_text("max_batch_size: 8")
    (root / "schema.json").write_text(json.dumps({"inputs": [{"name": "X", "datatype": "FP32", "shape": [4]}]}))
    with pytest.raises(InvalidModel, match="'X' must have -1"):
        triton.lay_out(made, "id", "python", root, root / "schema.json")


def test_a_configuration_with_unknown_fields_goes_as_it_is(tmp_path: Path, made: Path) -> None:
    root = tree(tmp_path / "m", "1/model.py")
    (root / "config.pbtxt").write_text("from_the_future: 1")
    triton.lay_out(made, "id", "python", root, None)
    assert (made / "config.pbtxt").read_text() == "from_the_future: 1"


def test_mlserver_gets_settings_for_a_bare_file(tmp_path: Path, made: Path) -> None:
    root = tree(tmp_path, "any-name.joblib")
    (root / "schema.json").write_text(json.dumps(SCHEMA))
    mlserver.lay_out(made, "id", "sklearn", root / "any-name.joblib", root / "schema.json")
    assert json.loads((made / "model-settings.json").read_text()) == {
        "name": "id",
        "implementation": "mlserver_sklearn.SKLearnModel",
        "parameters": {"uri": str(made / "any-name.joblib")},
        **SCHEMA,
    }


def test_mlserver_is_told_the_only_file_of_a_folder_whatever_its_name(tmp_path: Path, made: Path) -> None:
    tree(tmp_path / "m", "odd.bin")
    mlserver.lay_out(made, "id", "own", tmp_path / "m", None)
    settings = json.loads((made / "model-settings.json").read_text())
    assert settings == {"name": "id", "parameters": {"uri": str(made / "m" / "odd.bin")}}


def test_mlservers_own_settings_are_kept_but_for_name_and_place(tmp_path: Path, made: Path) -> None:
    root = tree(tmp_path / "m", "model.joblib")
    own = {"name": "x", "implementation": "a.B", "parameters": {"uri": "./model.joblib", "extra": {"k": 1}}}
    (root / "model-settings.json").write_text(json.dumps(own))
    mlserver.lay_out(made, "id", "sklearn", root, None)
    settings = json.loads((made / "model-settings.json").read_text())
    assert settings["name"] == "id"
    assert settings["implementation"] == "a.B"
    assert settings["parameters"] == {"uri": str(made / "model.joblib"), "extra": {"k": 1}}


@pytest.mark.parametrize("text", ["[]", "{", '{"parameters": 1}', '{"parameters": {"uri": "../../secret"}}'])
def test_settings_that_cannot_be_or_lead_outside_are_refused(tmp_path: Path, made: Path, text: str) -> None:
    root = tree(tmp_path / "m", "model.joblib")
    (root / "model-settings.json").write_text(text)
    with pytest.raises(InvalidModel, match=r"model-settings\.json"):
        mlserver.lay_out(made, "id", "sklearn", root, None)


@pytest.mark.parametrize(("kind", "files", "asked", "expected"), [
    ("onnx", ["m/net.onnx"], "m/net.onnx", {"1/model.onnx": "m/net.onnx"}),
    ("onnx", ["m/net.onnx"], "m", {"1": "in/m"}),
    ("openvino_ir", ["m/2/net.xml", "m/14/net.xml"], "m", {"14": "m/14"}),
    ("openvino_ir", ["m/net.xml", "m/net.bin"], "m/net.xml", {"1/net.xml": "m/net.xml", "1/net.bin": "m/net.bin"}),
    ("openvino_ir", ["m/1/a.xml", "m/NAN/b.xml"], "m", {"1": "in/m"}),
])  # fmt: skip
def test_ovms_gets_one_version(
    tmp_path: Path, made: Path, kind: str, files: list[str], asked: str, expected: dict[str, str]
) -> None:
    root = tree(tmp_path / "in", *files)
    ovms.lay_out(made, "id", kind, root / asked, None)
    assert links(made) == expected


@pytest.mark.parametrize(("files", "asked"), [(["m/a.mar", "m/b.mar"], "m"), (["m/readme"], "m"), ([], "m")])
async def test_torchserve_takes_one_archive(tmp_path: Path, files: list[str], asked: str) -> None:
    root = tree(tmp_path, *files)
    runtime = TorchServeRuntime("localhost:7070", "localhost:7071", tmp_path / "store")
    with pytest.raises(RpcError, match=r"\.mar") as error:
        await runtime.load(pb.LoadModelRequest(modelId="m", modelPath=str(root / asked)), 1)
    assert error.value.status is Status.INVALID_ARGUMENT
    await runtime.close()


def test_an_adapter_is_asked_for_by_the_servers_name(tmp_path: Path) -> None:
    runtime = open_runtime(f"triton://localhost:8001?repo={tmp_path}")
    assert isinstance(runtime, RepositoryRuntime)
    assert runtime.address == "localhost:8001"


@pytest.mark.parametrize(
    "address",
    [
        *(
            "triton://localhost:8001",
            "mlserver://localhost?repo=x",
            "triton://h:1?repo=x&y=1",
            "ovms://h:1?repo=x&rest=0",
        ),
        *("ovms://h:1?repo=x&config=", "torchserve://h:1?repo=x&management=a"),
    ],
)
def test_an_adapters_address_needs_a_port_and_a_repository(address: str) -> None:
    with pytest.raises(ValueError, match="repo"):
        open_runtime(address)
