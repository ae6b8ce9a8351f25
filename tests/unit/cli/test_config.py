from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mmcore.cli.main import run


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MMCORE_CONFIG", "MMCORE_GRPC_PORT", "MMCORE_REST_PORT", "MMCORE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)


def test_it_tells_where_each_value_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mmcore.yaml"
    file.write_text("grpc-port: 1\nrest-port: 2\npreload: [a, b]\n")
    monkeypatch.setenv("MMCORE_REST_PORT", "3")
    assert run(["config", "--config", str(file), "--workers", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["grpc-port"] == {"value": 1, "from": "file"}
    assert told["rest-port"] == {"value": 3, "from": "environment"}
    assert told["workers"] == {"value": 4, "from": "flag"}
    assert told["preload"] == {"value": ["a", "b"], "from": "file"}
    assert told["metrics-port"] == {"value": 2112, "from": "default"}
    assert run(["config", "--capacity", "2GiB"]) == 0
    assert any(line.split() == ["capacity", "2147483648", "flag"] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("flags", [["--grpc-port", "many"], ["--no-such"], ["--config", "/no/such/file"], ["word"]])
def test_what_serve_would_refuse_is_a_usage_error(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", *flags]) == 2
    assert "Error" in capsys.readouterr().err


def test_its_example_is_a_file_that_serve_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--example"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "all.yaml").write_text(text)
    assert run(["config", "--config", str(tmp_path / "all.yaml")]) == 0
    # Its defaults, where they are no words, are such that the file may state.
    lines = [line[1:] for line in text.splitlines() if line.startswith("#") and not line.startswith("# ")]
    stated = {name: value for name, value in yaml.safe_load("\n".join(lines)).items() if value is not None}
    assert stated["grpc-port"] == 8033
    assert stated["dashboard"] is True
