"""What servers find when they start: files that an instance made for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmcore.adapters import open_runtime


@pytest.mark.parametrize("server", ["triton", "mlserver"])
def test_a_repository_is_there(server: str, tmp_path: Path) -> None:
    open_runtime(f"{server}://127.0.0.1:1?repo={tmp_path}/models").prepare()
    assert (tmp_path / "models").is_dir()


def test_ovms_has_its_file_and_one_that_is_there_stays(tmp_path: Path) -> None:
    runtime = open_runtime(f"ovms://127.0.0.1:1?repo={tmp_path}/models&config={tmp_path}/models.json")
    runtime.prepare()
    assert (tmp_path / "models.json").read_text() == '{"model_config_list": []}'
    (tmp_path / "models.json").write_text("other")
    runtime.prepare()
    assert (tmp_path / "models.json").read_text() == "other"


def test_torchserve_has_the_settings_that_the_archived_releases_manifest_waits_for(tmp_path: Path) -> None:
    runtime = open_runtime(f"torchserve://127.0.0.1:7070?repo={tmp_path}&management=7071")
    runtime.prepare()
    lines = (tmp_path / "mmconfig.properties").read_text().splitlines()
    assert {"grpc_inference_port=7070", "grpc_management_port=7071", f"model_store={tmp_path}"} <= set(lines)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mmconfig.properties"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        open_runtime(f"triton://127.0.0.1:1?repo={tmp_path}/file/models").prepare()
