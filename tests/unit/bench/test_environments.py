"""Environments of third-party servers: made once, and a failure told with the installer's own words."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench import environments
from bench.builds import NotMeasured


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """The commands that would have run; environments go to ``tmp_path``."""
    ran: list[tuple[str, ...]] = []

    def remember(name: str, *argv: str) -> None:
        ran.append(argv)
        (tmp_path / f"venv-{name}").mkdir(exist_ok=True)

    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "_run", remember)
    return ran


def test_an_environment_is_made_once(calls: list[tuple[str, ...]], tmp_path: Path) -> None:
    said = io.StringIO()
    assert environments.mlserver(Console(file=said)) == tmp_path / "venv-mlserver"
    assert [argv[1:3] for argv in calls] == [("-m", "venv"), ("-m", "pip")]
    assert "mlserver-lightgbm==1.7.1" in calls[1]
    assert any(package.startswith("xgboost==") for package in calls[1])
    assert "installing mlserver==1.7.1" in said.getvalue()
    environments.mlserver(Console(file=said))
    assert len(calls) == 2


def test_a_half_made_environment_is_made_again(calls: list[tuple[str, ...]], tmp_path: Path) -> None:
    (tmp_path / "venv-mlserver").mkdir()
    (tmp_path / "venv-mlserver" / environments.STAMP).write_text("another release")
    environments.mlserver(Console(file=io.StringIO()))
    assert len(calls) == 2


def test_a_package_without_a_server_is_not_measured(calls: list[tuple[str, ...]]) -> None:
    with pytest.raises(NotMeasured, match="holds no server for this Python"):
        environments.triton(Console(file=io.StringIO()))


def test_what_the_installer_said_is_told() -> None:
    with pytest.raises(NotMeasured, match="triton cannot be installed: no space left"):
        environments._run("triton", sys.executable, "-c", "raise SystemExit('no space left')")
