"""What is found in model folders and files, and what is refused with which words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmcore.errors import InvalidModel
from mmcore.storage import detect, inspect
from mmcore.storage.layout import is_temporary

XGBOOST_JSON = b'{"learner":{"attributes":{}},"version":[3,0,0]}'
XGBOOST_UBJ = b"{L\x00\x00\x00\x00\x00\x00\x00\x07learner{}"
LIGHTGBM_TEXT = b"tree\nversion=v4\nnum_class=1\n"


def write(root: Path, **files: bytes | str) -> Path:
    """Files below root; ``__`` in a name stands for a slash and ``_dot_`` for a dot."""
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("model.joblib", b"not even a pickle", "sklearn"),
        ("anything.pkl", b"\x80\x04.", "sklearn"),
        ("model.skops", b"PK", "sklearn"),
        ("model.json", XGBOOST_JSON, "xgboost"),
        ("pretty.json", b'{\n  "learner" : {\n', "xgboost"),
        ("other-order.json", b'{"version":[1,7,0],"learner":{}}', "xgboost"),
        ("model.ubj", XGBOOST_UBJ, "xgboost"),
        ("model.bst", XGBOOST_UBJ, "xgboost"),
        ("model.bst", XGBOOST_JSON, "xgboost"),
        ("model.bst", b"binf\x00\x00", "xgboost"),
        ("model.bst", LIGHTGBM_TEXT, "lightgbm"),
        ("model.txt", LIGHTGBM_TEXT, "lightgbm"),
        ("graph.onnx", b"", "onnx"),
        ("model.pt", b"PK", "torchscript"),
        ("model.graphdef", b"", "tensorflow"),
        ("model.plan", b"", "tensorrt"),
        ("model.py", b"class Model: pass", "python"),
    ],
)
def test_the_format_is_told_by_name_and_content(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    sources = detect(tmp_path)
    assert list(sources) == ["1"]
    source = sources["1"]
    assert (source.name, source.version, source.format) == (tmp_path.name, "1", found)
    assert source.path == tmp_path / name


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    evil = b"cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.pkl").write_bytes(evil)
    assert detect(tmp_path / "m")["1"].format == "sklearn"
    assert not ran.exists()


def test_openvino_needs_both_its_files(tmp_path: Path) -> None:
    write(tmp_path, net_dot_xml="<net/>")
    with pytest.raises(InvalidModel, match="no model file"):
        detect(tmp_path)
    write(tmp_path, net_dot_bin=b"")
    assert detect(tmp_path)["1"].format == "openvino"


def test_a_saved_model_is_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "flat", saved_model_dot_pb=b"", variables__variables_dot_index=b"")
    assert detect(tmp_path / "flat")["1"].path == tmp_path / "flat"
    write(tmp_path / "deep", **{"1__model_dot_savedmodel__saved_model_dot_pb": b""})
    found = detect(tmp_path / "deep")["1"]
    assert (found.format, found.path) == ("tensorflow", tmp_path / "deep/1/model.savedmodel")


def test_a_class_uses_the_other_files_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path, model_dot_py="class Model: ...", model_dot_joblib=b"", weights_dot_onnx=b"")
    assert detect(tmp_path)["1"].format == "python"


def test_tritons_python_class_is_refused(tmp_path: Path) -> None:
    write(tmp_path, model_dot_py="import x\n\nclass TritonPythonModel:\n    pass\n")
    with pytest.raises(InvalidModel, match="TritonPythonModel"):
        detect(tmp_path)


def test_the_well_known_name_goes_first_and_two_of_a_kind_are_ambiguous(tmp_path: Path) -> None:
    write(tmp_path, model_dot_onnx=b"", older_dot_onnx=b"", scaler_dot_pkl=b"")
    assert detect(tmp_path)["1"].path.name == "model.onnx"
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(InvalidModel, match=r"older.onnx and scaler.pkl; name the model's file"):
        detect(tmp_path)


def test_what_is_beside_a_model_does_not_matter(tmp_path: Path) -> None:
    write(
        tmp_path,
        clf_dot_json=XGBOOST_JSON,
        metadata_dot_json='{"version": "7"}',
        notes_dot_txt="tree of life",
        README_dot_md="#",
        requirements_dot_txt="",
        _dot_hidden_dot_onnx=b"",
        half_dot_onnx_dot_part=b"",
    )
    assert detect(tmp_path)["1"].path.name == "clf.json"


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "m", model_dot_json='{"layers": []}', data_dot_csv="")
    with pytest.raises(
        InvalidModel, match=r"no model file in m; it holds data.csv, model.json; by its content model.json"
    ):
        detect(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidModel, match="it holds nothing"):
        detect(tmp_path / "empty")


def test_a_single_folder_inside_is_looked_into(tmp_path: Path) -> None:
    write(tmp_path, export__model_dot_onnx=b"")
    assert detect(tmp_path)["1"].path == tmp_path / "export/model.onnx"


def test_a_bare_file_is_a_model_named_by_its_stem(tmp_path: Path) -> None:
    write(tmp_path, iris_dot_joblib=b"", notes_dot_txt="hello")
    source = detect(tmp_path / "iris.joblib")["1"]
    assert (source.name, source.format) == ("iris", "sklearn")
    with pytest.raises(InvalidModel, match="not a model of a known format"):
        detect(tmp_path / "notes.txt")


def versions(root: Path, *names: str, config: str = "") -> Path:
    for name in names:
        write(root / name, model_dot_onnx=b"")
    if config:
        write(root, config_dot_pbtxt=config)
    return root


def test_versions_are_ordered_as_numbers_and_the_largest_is_last(tmp_path: Path) -> None:
    versions(tmp_path, "2", "10", "9", "011", "latest", "0")
    assert list(detect(tmp_path)) == ["2", "9", "10"]


@pytest.mark.parametrize(
    ("config", "served"),
    [
        ("version_policy { latest { num_versions: 2 } }", ["3", "10"]),
        ("version_policy { latest { } }", ["10"]),
        ("version_policy { all { } }", ["1", "2", "3", "10"]),
        ("version_policy { specific { versions: [1, 3, 77] } }", ["1", "3"]),
        ("", ["1", "2", "3", "10"]),
    ],
)
def test_the_version_policy_decides_what_is_served(tmp_path: Path, config: str, served: list[str]) -> None:
    versions(tmp_path, "1", "2", "3", "10", config=config)
    assert list(detect(tmp_path)) == served


def test_a_policy_that_serves_nothing_is_an_error(tmp_path: Path) -> None:
    versions(tmp_path, "1", config="version_policy { specific { versions: [5] } }")
    with pytest.raises(InvalidModel, match="serves none of the versions 1"):
        detect(tmp_path)


def test_a_broken_version_leaves_the_others(tmp_path: Path) -> None:
    versions(tmp_path, "1", "2", config="version_policy { latest { num_versions: 1 } }")
    (tmp_path / "3").mkdir()
    layout = inspect(tmp_path)
    assert list(layout.sources) == ["2"]
    assert layout.problems == {"3": "version 3: no model file in 3; it holds nothing"}


def test_a_folder_of_empty_versions_tells_why(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    with pytest.raises(InvalidModel, match="version 1: no model file"):
        detect(tmp_path)


def test_a_version_folder_may_have_settings_of_its_own(tmp_path: Path) -> None:
    versions(tmp_path, "1", "2")
    write(tmp_path, mmcore_dot_yaml="execution: thread\nparameters: {a: x}")
    write(tmp_path / "2", mmcore_dot_yaml="execution: inline")
    found = detect(tmp_path)
    assert found["1"].settings.execution == "thread"
    assert found["2"].settings.execution == "inline"
    assert found["2"].settings.parameters == {"a": "x"}


# Links.


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "outside", secret_dot_onnx=b"")
    model = tmp_path / "m"
    model.mkdir()
    (model / "model.onnx").symlink_to("../outside/secret.onnx")
    with pytest.raises(InvalidModel, match=r"model.onnx is a link that leaves the model's folder"):
        detect(model)


def test_a_link_out_anywhere_below_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "m", **{"1__model_dot_onnx": b"", "1__data__x": b""})
    (model / "1/data/passwd").symlink_to("/etc/passwd")
    with pytest.raises(InvalidModel, match="1/data/passwd is a link that leaves"):
        detect(model)


def test_a_version_that_links_outside_is_refused_alone(tmp_path: Path) -> None:
    model = versions(tmp_path / "m", "1")
    versions(tmp_path / "elsewhere", "2")
    (model / "2").symlink_to(tmp_path / "elsewhere/2")
    layout = inspect(model)
    assert list(layout.sources) == ["1"]
    assert "leaves the model's folder" in layout.problems["2"]


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    write(tmp_path, model_dot_onnx=b"")
    (tmp_path / "model.onnx.data").symlink_to("missing")
    with pytest.raises(InvalidModel, match="link to nothing"):
        detect(tmp_path)


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    versions(tmp_path / "store/abc", "1")
    (tmp_path / "m").symlink_to("store/abc")
    assert detect(tmp_path / "m")["1"].name == "m"


def test_a_mounted_config_map_works(tmp_path: Path) -> None:
    write(tmp_path / "..2026_11_23", model_dot_onnx=b"", config_dot_pbtxt="max_batch_size: 4")
    (tmp_path / "..data").symlink_to("..2026_11_23")
    for name in ("model.onnx", "config.pbtxt"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    found = detect(tmp_path)["1"]
    assert found.settings.max_batch_size == 4
    assert os.path.realpath(found.path) == str(tmp_path / "..2026_11_23/model.onnx")


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.onnx", "a/../../b", "a\0b"])
def test_a_stated_file_outside_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, model_dot_onnx=b"")
    write(tmp_path, mmcore_dot_yaml=f'file: "{name}"'.replace("\0", "\\0"))
    with pytest.raises(InvalidModel, match=r"mmcore.yaml: file: .*not a path inside the model's folder"):
        detect(tmp_path)


def test_names_of_work_in_progress() -> None:
    assert [name for name in (".x", "a.tmp", "a.onnx.part", "a~", "a", "tmp") if is_temporary(name)] == [
        ".x",
        "a.tmp",
        "a.onnx.part",
        "a~",
    ]
