"""What is published: an sdist that builds anywhere, a wheel that holds the package alone, a command that starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mmcore

ROOT = Path(__file__).parents[2]
PAGE = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mmcore/server/dashboard/page").iterdir()}
SOURCES = sorted(path.stem for path in (ROOT / "ext").glob("*.pyx"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this tree and the wheel made from that sdist, each in isolation."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def only(folder: Path, pattern: str) -> Path:
    [found] = folder.glob(pattern)
    return found


def test_sdist_carries_all_sources_and_nothing_generated(published: Path) -> None:
    with tarfile.open(only(published, "*.tar.gz")) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for source in SOURCES:
        assert f"ext/{source}.pyx" in names
    declared = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mmcore").rglob("*.p[xy][di]")}
    assert declared | PAGE <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or (name[:4] == "ext/" and name[-2:] == ".c")]


def test_wheel_holds_the_package_alone(published: Path) -> None:
    names = zipfile.ZipFile(only(published, "*.whl")).namelist()
    for source in SOURCES:
        assert [name for name in names if name.startswith(f"mmcore/_ext/{source}.cpython-") and name.endswith(".so")]
    assert {"mmcore/py.typed", "mmcore/pb/descriptors.binpb", "mmcore/server/rest/try.html", *PAGE} <= set(names)
    assert {name.split("/", 1)[0] for name in names} == {"mmcore", f"mmcore-{mmcore.__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".c", ".pyx", ".pxd", ".h"))]


def test_wheel_installs_into_an_empty_environment_and_its_command_runs(published: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", only(published, "*.whl")], check=True)
    imports = "; ".join(f"import mmcore._ext.{source}" for source in SOURCES)
    subprocess.run([python, "-W", "error", "-c", imports], cwd=tmp_path, check=True)
    for arguments in (["--version"], ["--help"], ["serve", "--help"]):
        done = subprocess.run(
            [tmp_path / "venv/bin/mmcore", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert mmcore.__version__ in done.stdout or "Usage" in done.stdout


def test_an_sdist_is_the_same_whoever_builds_it(tmp_path: Path) -> None:
    made = []
    for number, mask in enumerate((0o022, 0o077)):
        copy, out = tmp_path / f"copy-{number}", tmp_path / f"out-{number}"
        tree = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
        assert tree.returncode == 0, tree.stderr
        for name in tree.stdout.decode().strip("\0").split("\0"):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, copy / name)
                (copy / name).chmod(((ROOT / name).stat().st_mode | 0o600) & ~mask)
        done = subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out), str(copy)],
            env=os.environ | {"MMCORE_EXT": "none"}, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        made.append(only(out, "*.tar.gz").read_bytes())
    assert made[0] == made[1]


def test_the_pinned_tools_are_such_as_the_build_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "deploy/release/build.txt").read_text(), re.MULTILINE))
    for one in map(Requirement, asked):
        assert pinned[one.name.lower()] in one.specifier
    assert (ROOT / "deploy/release/build.txt").read_text().count("--hash=sha256:") >= len(asked)
