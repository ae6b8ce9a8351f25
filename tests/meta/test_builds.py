"""The kinds of build setup.py offers, each proven on a small module: what it promises is really in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Its second line of code reads past the end when asked to: checked in a debug build, not in a release.
PROBE = '''"""A probe."""


def at(const unsigned char[::1] data, Py_ssize_t index) -> int:
    cdef int found
    found = data[index]
    return found
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, with the probe as its only module."""
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("ext", "mmcore/_ext"):
        (tmp_path / folder).mkdir(parents=True)
    for package in ("mmcore", "mmcore/_ext"):
        shutil.copy(ROOT / package / "__init__.py", tmp_path / package)
    (tmp_path / "ext/probe.pyx").write_text(PROBE)
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build in place; the caller's own switches do not count."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MMCORE_")}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree, env=clean | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def evaluate(tree: Path, code: str) -> str:
    """What the code prints in a new interpreter that sees the tree's package alone."""
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TRACED_LINES = """
import sys
from mmcore._ext.probe import at
lines = set()
def trace(frame, event, arg):
    if frame.f_code.co_filename.endswith("probe.pyx") and event == "line":
        lines.add(frame.f_lineno)
    return trace
sys.settrace(trace)
at(b"abc", 1)
sys.settrace(None)
print(sorted(lines))
"""

CHECKED = """
from mmcore._ext.probe import at
try:
    at(b"abc", 5)
except IndexError:
    print("checked")
"""


@pytest.mark.slow
def test_debug_build_traces_lines_and_checks_bounds_and_release_after_it_does_neither(tree: Path) -> None:
    assert build(tree, MMCORE_DEBUG="1").returncode == 0
    assert evaluate(tree, TRACED_LINES) == "[6, 7]"
    assert evaluate(tree, CHECKED) == "checked"
    assert list(tree.glob("build/debug-*/cython/ext/probe.html"))

    assert build(tree).returncode == 0
    assert evaluate(tree, TRACED_LINES) == "[]"
    assert evaluate(tree, "from mmcore._ext.probe import at; print(at(bytearray(8), 1))") == "0"


@pytest.mark.slow
def test_build_that_follows_the_same_build_does_no_work(tree: Path) -> None:
    assert "Cythonizing" in build(tree).stdout
    again = build(tree).stdout
    assert "Cythonizing" not in again
    assert "gcc" not in again


@pytest.mark.slow
def test_sanitizer_build_reports_a_read_past_the_end(tree: Path) -> None:
    assert build(tree, MMCORE_SANITIZE="1").returncode == 0
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # The interpreter's own blocks that live until its end are no leaks to tell of here.
    environment = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    code = "from mmcore._ext.probe import at; at(bytearray(4096), 4096 + 64)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "probe" in done.stderr


@pytest.mark.slow
def test_coverage_build_counts_lines_for_gcov_and_for_python(tree: Path) -> None:
    assert build(tree, MMCORE_COVERAGE="1").returncode == 0
    assert evaluate(tree, TRACED_LINES) == "[6, 7]"
    assert (tree / "ext/probe.c").exists()
    assert list(tree.glob("build/coverage-*/temp*/**/probe.gcno"))
    assert list(tree.glob("build/coverage-*/temp*/**/probe.gcda"))


def test_missing_library_is_named_with_the_packages_to_install(tree: Path) -> None:
    (tree / "ext/h2.pyx").write_text(PROBE)
    done = build(tree, PKG_CONFIG_LIBDIR="/nonexistent", PKG_CONFIG_PATH="")
    assert done.returncode == 1
    assert "libnghttp2-dev" in done.stderr
    assert "apt-get install" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_module_is_built_when_none_is_asked_for(tree: Path) -> None:
    done = build(tree, MMCORE_EXT="none")
    assert done.returncode == 0
    assert not list(tree.glob("mmcore/_ext/*.so"))
