"""The command starts itself again under the allocator it serves best with, once, and leaves a choice that was made."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from mmcore.server import allocator

Started = list[tuple[str, list[str], dict[str, str]]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    calls: Started = []
    for name in ("LD_PRELOAD", "PYTHONMALLOC", "MALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", lambda program, argv, environment: calls.append((program, argv, environment)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "mmcore.cli.main", "serve", "--grpc-port", "0"])
    return calls


def test_the_same_command_is_started_with_the_library(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "find_jemalloc", lambda: Path("/somewhere/libjemalloc.so.2"))
    allocator.choose_allocator()
    [(program, argv, environment)] = started
    assert program == sys.executable
    assert argv == [sys.executable, "-m", "mmcore.cli.main", "serve", "--grpc-port", "0"]
    assert environment["LD_PRELOAD"] == "/somewhere/libjemalloc.so.2"
    assert environment["PYTHONMALLOC"] == "malloc"
    assert "background_thread:true" in environment["MALLOC_CONF"]


def test_options_of_the_library_that_are_set_stay(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "find_jemalloc", lambda: Path("/somewhere/libjemalloc.so.2"))
    monkeypatch.setenv("MALLOC_CONF", "narenas:1")
    allocator.choose_allocator()
    assert started[0][2]["MALLOC_CONF"] == "narenas:1"


def test_another_allocator_is_not_put_under_openvino(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "find_jemalloc", lambda: Path("/somewhere/libjemalloc.so.2"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "openvino" else None)
    allocator.choose_allocator()
    assert started[0][2]["PYTHONMALLOC"] == "malloc"
    assert "LD_PRELOAD" not in started[0][2]


def test_without_the_library_python_takes_its_objects_from_glibc(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocator, "find_jemalloc", lambda: None)
    allocator.choose_allocator()
    assert started[0][2]["PYTHONMALLOC"] == "malloc"
    assert "LD_PRELOAD" not in started[0][2]


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONMALLOC"])
def test_a_choice_that_was_made_is_left(started: Started, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    allocator.choose_allocator()
    assert started == []


def test_the_library_is_found_where_distributions_put_it(tmp_path: Path) -> None:
    assert allocator.find_jemalloc((str(tmp_path),)) is None
    place = tmp_path / "aarch64-linux-gnu" / "libjemalloc.so.2"
    place.parent.mkdir()
    place.touch()
    assert allocator.find_jemalloc((str(tmp_path / "absent"), str(tmp_path))) == place
