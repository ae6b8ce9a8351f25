"""A registry in a file: processes that share it, die with it, find it locked, replaced or gone."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from mmcore.errors import Unavailable
from mmcore.registry import InstanceRecord, ModelRecord, Registry, VModelRecord, open_registry
from mmcore.registry import sqlite as sqlite_store
from mmcore.registry.process_identity import is_running, this_process
from tests.registries import Registries, SqliteBackend, until
from tests.serving import ROOT, environment

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "registry.db"


@pytest.fixture
async def registries(path: Path) -> AsyncIterator[Registries]:
    opened = Registries(SqliteBackend(path))
    yield opened
    await opened.close()


@pytest.fixture
def start(path: Path) -> Iterator[Start]:
    """Starts a process of ``tests/registry_process.py``."""
    running: list[subprocess.Popen[str]] = []

    def run(instance: str, count: int = 0) -> subprocess.Popen[str]:
        call = [sys.executable, "-m", "tests.registry_process", f"sqlite:{path}", instance, str(count)]
        running.append(subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def done(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert process.stdout.readline() == "done\n"


@pytest.mark.slow
async def test_processes_write_one_record_at_once_and_lose_nothing(registries: Registries, start: Start) -> None:
    processes = [start(f"p{number}", 100) for number in range(3)]
    registry = await registries.open("a")
    for process in processes:
        await asyncio.to_thread(done, process)
    await until(lambda: registry.models.get("counted") == ModelRecord("t", references=300))
    assert set(registry.instances) == {"p0", "p1", "p2"}


@pytest.mark.slow
async def test_the_record_of_a_killed_process_goes_long_before_its_lease(registries: Registries, start: Start) -> None:
    registry = await registries.open("a")
    process = start("p")
    await asyncio.to_thread(done, process)
    await until(lambda: registry.instances.get("p") == InstanceRecord("address of p"))
    process.send_signal(signal.SIGKILL)
    await until(lambda: "p" not in registry.instances, timeout_s=5)


async def known(registries: Registries) -> tuple[Registry, Registry]:
    a, b = await registries.open("a"), await registries.open("b")
    await a.models.update("m", lambda _: ModelRecord("t"))
    await a.vmodels.update("v", lambda _: VModelRecord("o", "m", "m"))
    await b.publish(InstanceRecord("b's"))
    await until(lambda: "v" in b.vmodels and "b" in a.instances)
    return a, b


async def test_a_file_that_was_removed_is_made_again_from_what_the_instances_know(
    registries: Registries, path: Path
) -> None:
    a, b = await known(registries)
    heard: list[str] = []
    b.models.listen(heard.append)
    for file in list(path.parent.iterdir()):
        file.unlink()
    await until(lambda: path.exists() and a.connected and b.connected)
    c = await registries.open("c")
    await until(lambda: set(c.models) == {"m"} and set(c.vmodels) == {"v"} and set(c.instances) == {"b"})
    assert not heard
    await c.models.update("n", lambda _: ModelRecord("n"))
    await until(lambda: a.models.get("n") == b.models.get("n") == ModelRecord("n"))


async def test_while_the_file_is_locked_writes_are_refused_and_the_rest_goes_on(
    registries: Registries, path: Path
) -> None:
    a, b = await known(registries)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(Unavailable, match="database is locked"):
        await a.models.update("m", lambda _: None)
    assert time.monotonic() - started < 2 * sqlite_store.BUSY_S
    assert await b.models.read("m") == ModelRecord("t") == b.models.get("m")
    other.execute("ROLLBACK")
    other.close()
    await a.models.update("m", lambda _: None)
    await until(lambda: "m" not in b.models)


async def test_who_is_further_behind_than_the_log_takes_a_snapshot(
    registries: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "LOG_LENGTH", 5)
    a, b = await known(registries)
    heard: list[str] = []
    b.models.listen(heard.append)
    await b._store.transact({}, [])
    # One transaction with more changes than the log holds.
    names = [f"m{number}" for number in range(20)]
    await a.commit([(a.models, name) for name in names], lambda before: [ModelRecord("t") for _ in before])
    await until(lambda: len(b.models) == 21)
    assert sorted(heard) == sorted(names)


async def test_the_file_is_for_its_user_alone(registries: Registries, path: Path) -> None:
    await known(registries)
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


async def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    registry = open_registry(f"sqlite:{tmp_path}/file/registry.db", "a")
    with pytest.raises(Unavailable, match="registry"):
        await registry.start()
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at" * 100)
    registry = open_registry(f"sqlite:{tmp_path}/text.db", "a")
    with pytest.raises(Unavailable, match="not a database"):
        await registry.start()


def test_a_process_is_told_from_others() -> None:
    process = this_process()
    assert is_running(process)
    boot, namespace, pid, started_at = process.split(" ")
    assert not is_running(f"another-boot {namespace} {pid} {started_at}")
    assert not is_running(f"{boot} {namespace} {pid} 1")
    assert not is_running(f"{boot} {namespace} {2**22 + 1} {started_at}")
    assert is_running(f"{boot} pid:[1] {pid} 1")


def test_a_process_that_nobody_waited_for_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    with Path(f"/proc/{child.pid}/stat").open() as stat:
        started_at = stat.read().rpartition(")")[2].split()[19]
    boot, namespace, *_ = this_process().split(" ")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(f"{boot} {namespace} {child.pid} {started_at}")
    child.wait()
