"""A test that hangs must not hold the run of all tests: not even in its clean-up after a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import ROOT

HANGING = """
import threading
import pytest

@pytest.fixture
def hanging():
    yield
    threading.Event().wait()

def test_one(hanging):
    assert 1 == 2

def test_other():
    pass
"""


@pytest.mark.slow
def test_a_clean_up_that_hangs_after_a_failure_ends_its_process_and_the_next_test_is_run(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nfaulthandler_timeout = 1\nfaulthandler_exit_on_timeout = true\n")
    (tmp_path / "test_it.py").write_text(HANGING)
    call = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-c", tmp_path / "pytest.ini"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--numprocesses=1", *map(str, call), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert "crashed while running" in done.stdout
    assert ", 1 passed in" in done.stdout
    assert "test_it.py::test_one failed in its call: AssertionError: assert 1 == 2" in done.stderr
    assert "in hanging" in done.stderr  # where it hung


LEFT_OPEN = """
from mmcore.transport import Server

EVERY_LOOP = True

async def test_one():
    global server
    server = Server()
    await server.listen_tcp("127.0.0.1", 0)
    assert 1 == 2
"""


@pytest.mark.slow
def test_what_a_failed_test_leaves_open_keeps_no_loop_from_closing(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(LEFT_OPEN)
    call = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, call)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert "2 failed" in done.stdout
