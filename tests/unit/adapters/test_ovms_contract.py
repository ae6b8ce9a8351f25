"""What the stand-in for OpenVINO Model Server promises, and so what our adapter relies on the real one for.

No package of the server can be had here (PyPI has its client alone, Debian nothing). Each test names the place in its
documentation, or in reference/runtimes.md §2.5, that it repeats; whoever has a server can hold it against these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmcore.adapters import ovms
from tests.ovms_server import Ovms


@pytest.fixture
def server(tmp_path: Path) -> Ovms:
    return Ovms(tmp_path / "config.json")


def lists(server: Ovms, **bases: Path) -> None:
    """Write the file: {"model_config_list": [{"config": {"name", "base_path"}}]}, "Model Server Configuration"."""
    entries = [{"config": {"name": name, "base_path": str(base)}} for name, base in bases.items()]
    server.config.write_text(json.dumps({"model_config_list": entries}))


def model(folder: Path, file: str = "net.onnx", version: str = "1") -> Path:
    (folder / version).mkdir(parents=True)
    (folder / version / file).write_bytes(b"weights")
    return folder


def states(listed: dict[str, Any], name: str) -> list[tuple[str, str]]:
    return [(one["version"], one["state"]) for one in listed[name]["model_version_status"]]


def test_a_reload_is_201_when_something_changed_200_when_nothing_did(server: Ovms, tmp_path: Path) -> None:
    """REST API, "Config Reload API": the codes, and that the body has what `GET /v1/config` has."""
    lists(server, m=model(tmp_path / "m"))
    status, listed = server.reload()
    assert (status, states(listed, "m")) == (201, [("1", "AVAILABLE")])
    assert listed["m"]["model_version_status"][0]["status"] == {"error_code": "OK", "error_message": "OK"}
    assert server.reload() == (200, listed)


def test_the_newest_version_alone_is_served(server: Ovms, tmp_path: Path) -> None:
    """Model Server Parameters, "model_version_policy": latest, one, where nothing is said."""
    model(model(tmp_path / "m", version="2"), version="14")
    lists(server, m=tmp_path / "m")
    assert states(server.reload()[1], "m") == [("14", "AVAILABLE")]


def test_what_the_file_names_no_more_is_unloaded_when_the_reload_is_answered(server: Ovms, tmp_path: Path) -> None:
    """ "Config Reload API", and reference/runtimes.md: a retired version stays listed, as END."""
    lists(server, m=model(tmp_path / "m"))
    server.reload()
    lists(server)
    status, listed = server.reload()
    assert (status, states(listed, "m")) == (201, [("1", "END")])


def test_a_model_that_does_not_load_makes_412_and_leaves_the_others_serving(server: Ovms, tmp_path: Path) -> None:
    """ "Config Reload API": an error without the list, so the list is asked for; the cause is at its version."""
    lists(server, good=model(tmp_path / "good"), bad=model(tmp_path / "bad", "broken.onnx"))
    status, answer = server.reload()
    assert (status, list(answer)) == (412, ["error"])
    assert states(server.models, "good") == [("1", "AVAILABLE")]
    [version] = server.models["bad"]["model_version_status"]
    assert version["state"] == "LOADING"
    assert version["status"]["error_code"] != "OK"


def test_a_file_that_cannot_be_read_is_412_and_changes_nothing(server: Ovms, tmp_path: Path) -> None:
    lists(server, m=model(tmp_path / "m"))
    server.reload()
    server.config.write_text('{"model_config_list": [')
    assert server.reload()[0] == 412
    assert states(server.models, "m") == [("1", "AVAILABLE")]


def test_what_the_adapter_lays_out_is_what_the_server_loads(server: Ovms, tmp_path: Path) -> None:
    """ "Preparing a Model Repository": base_path/VERSION/files; the links of it are followed."""
    files = model(tmp_path / "files", "net.xml", "3")
    (tmp_path / "models" / "m").mkdir(parents=True)
    ovms.lay_out(tmp_path / "models" / "m", "m", "openvino_ir", files, None)
    lists(server, m=tmp_path / "models" / "m")
    assert states(server.reload()[1], "m") == [("3", "AVAILABLE")]
