"""Control groups of workers: where they are made, what is written into them, and, with the kernel, that they end."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mmcore.model import ModelSettings, ModelSource
from mmcore.runtimes.isolation import process
from mmcore.runtimes.isolation.cgroup import WorkerGroups, place_for_workers
from mmcore.runtimes.isolation.model import IsolatedModel

MIB = 2**20


@pytest.fixture
def delegated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of files as the kernel has it for a service with Delegate= and DelegateSubgroup=; the service's group."""
    service = tmp_path / "sys/fs/cgroup/system.slice/mmcore.service"
    (service / "server").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (service / "cgroup.controllers").write_text("cpu memory pids\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/x\n0::/system.slice/mmcore.service/server\n")

    def getxattr(path: Path, name: str) -> bytes:
        if (Path(path), name) != (service, "user.delegate"):
            raise OSError(errno.ENODATA, "no such attribute")
        return b"1"

    monkeypatch.setattr(os, "getxattr", getxattr)
    return service


def test_groups_are_made_only_where_they_have_been_given_away(delegated: Path, tmp_path: Path) -> None:
    assert place_for_workers(tmp_path) == delegated
    own = tmp_path / "proc/self/cgroup"
    # Not given away; the kernel's root, which a container sees too; not what the mount shows; version 1 alone.
    for membership in ("0::/system.slice/mmcore.service", "0::/", "0::/../other/server", "4:memory:/x"):
        own.write_text(membership + "\n")
        if os.geteuid() == 0 or not membership.endswith("service"):
            assert place_for_workers(tmp_path) is None, membership
    own.unlink()
    assert place_for_workers(tmp_path) is None


def test_a_group_has_the_limits_of_its_worker(delegated: Path) -> None:
    groups = WorkerGroups(delegated)
    assert (delegated / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    group = groups.make(256 * MIB, 2)
    group.add(4711)
    [folder] = delegated.glob("mmcore-worker-*")
    written = {file.name: file.read_text() for file in folder.iterdir()}
    assert written == {
        "cgroup.procs": "4711", "cpu.max": "200000 100000", "memory.max": str((256 + 128) * MIB),
        "memory.oom.group": "1", "memory.swap.max": "0", "pids.max": "512",
    }  # fmt: skip
    group.end()
    assert (folder / "cgroup.kill").read_text() == "1"
    groups.make(None, None)
    [other] = set(delegated.glob("mmcore-worker-*")) - {folder}
    assert [file.name for file in other.iterdir()] == ["pids.max"]


def test_what_a_killed_instance_left_is_removed_and_nobody_elses(delegated: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(30)
    for pid in (gone.pid, os.getpid()):
        (delegated / f"mmcore-worker-{pid}-0").mkdir()
    (delegated / "other").mkdir()
    WorkerGroups(delegated)
    assert (delegated / f"mmcore-worker-{os.getpid()}-0").is_dir()
    assert (delegated / "other").is_dir()
    assert (delegated / f"mmcore-worker-{gone.pid}-0/cgroup.kill").read_text() == "1"


def test_without_a_place_nothing_is_made(tmp_path: Path) -> None:
    group = WorkerGroups(None).make(MIB, 1)
    group.add(4711)
    group.end()
    # Given away, and yet the kernel refuses: processes are in it.
    (tmp_path / "cgroup.controllers").write_text("memory")
    (tmp_path / "cgroup.subtree_control").mkdir()
    WorkerGroups(tmp_path).make(MIB, 1).add(4711)
    assert not list(tmp_path.glob("mmcore-worker-*"))


@pytest.fixture
def real() -> Iterator[Path]:
    """A group of the kernel's own that this test may fill; the test is left out where there is none."""
    for base in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        folder = base / f"mmcore-test-{os.getpid()}"
        if (base / "cgroup.controllers").is_file():
            with contextlib.suppress(OSError):
                folder.mkdir()
                break
    else:
        pytest.skip("no cgroup v2 that may be written")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (folder / "cgroup.procs").write_text(str(child.pid))
        usable = (folder / "cgroup.kill").exists()  # Linux 5.14
    except OSError:
        usable = False
    finally:
        child.communicate(b"\n", timeout=30)
    if not usable:
        folder.rmdir()
        pytest.skip("no process may be put into a cgroup v2 here")
    yield folder
    folder.rmdir()


def test_a_worker_and_all_it_has_started_are_in_its_group_and_end_with_it(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = WorkerGroups(real)
    monkeypatch.setattr(process, "_groups", lambda: groups)
    (tmp_path / "model.py").write_text("""
import os, time
if not os.fork():
    os.setsid()
    time.sleep(600)
class Model:
    inputs = outputs = [("x", "FP32", [-1])]
    def predict(self, inputs):
        return inputs
""")
    model = IsolatedModel(ModelSource("m", "1", "python", tmp_path / "model.py", ModelSettings()))
    [folder] = real.glob("mmcore-worker-*")
    inside = [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    assert len(inside) == 2
    model.close()
    assert not folder.exists()
    left = [one for one in psutil.process_iter(["pid", "status"]) if one.info["pid"] in inside]
    assert [one for one in left if one.info["status"] != psutil.STATUS_ZOMBIE] == []
