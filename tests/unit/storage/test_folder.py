"""A folder of models kept in step: what is taken, when, and what is left alone."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmcore.errors import InvalidModel, LoadFailed, NotFound, Unavailable
from mmcore.storage import Change, FileOrigin, ModelFolder
from mmcore.storage.signature import signature

QUIET_S = 1.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A folder on a clock of its own; every scan comes a second after the one before."""

    def __init__(self, root: Path) -> None:
        self.clock = Clock()
        self.root = root
        self.folder = ModelFolder(root, clock=self.clock)

    def scan(self) -> dict[str, Change]:
        self.clock.now += QUIET_S
        return {change.name: change for change in self.folder.scan(QUIET_S)}

    def settle(self) -> dict[str, Change]:
        return self.scan() | self.scan()

    def put(self, name: str, content: str = "") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    root = tmp_path / "models"
    root.mkdir()
    found = Watched(root)
    yield found
    found.folder.close()


def test_a_model_is_taken_once_two_scans_saw_the_same(watched: Watched) -> None:
    watched.put("m/model.onnx")
    assert watched.scan() == {}
    taken = watched.scan()["m"]
    assert taken.layout is not None
    assert list(taken.layout.sources) == ["1"]
    assert watched.scan() == {}


def test_a_copy_in_progress_is_not_taken(watched: Watched) -> None:
    for size in range(1, 6):
        watched.put("m/model.onnx", "x" * size)
        assert watched.scan() == {}
    watched.put("m/model.onnx.data", "y")
    assert watched.scan() == {}
    assert "m" in watched.scan()


def test_scans_in_quick_succession_do_not_make_a_copy_complete(watched: Watched) -> None:
    watched.put("m/model.onnx")
    for _ in range(5):
        watched.clock.now += QUIET_S / 10
        assert watched.folder.scan(QUIET_S) == []
    watched.clock.now += QUIET_S
    assert [change.name for change in watched.folder.scan(QUIET_S)] == ["m"]


def test_a_half_copied_change_is_taken_when_it_is_whole(watched: Watched) -> None:
    watched.put("m/1/model.onnx")
    watched.settle()
    watched.put("m/2/model.onnx", "half")
    assert watched.scan() == {}
    watched.put("m/2/model.onnx", "whole file")
    assert watched.scan() == {}
    change = watched.scan()["m"]
    assert change.layout is not None
    assert list(change.layout.sources) == ["1", "2"]


def test_removal_is_told_after_two_scans(watched: Watched) -> None:
    watched.put("m/model.onnx")
    watched.settle()
    away = watched.root.parent / "away"
    (watched.root / "m").rename(away)
    assert watched.scan() == {}
    away.rename(watched.root / "m")
    assert watched.settle() == {}
    shutil.rmtree(watched.root / "m")
    assert watched.settle() == {"m": Change("m")}
    watched.put("m/model.onnx")
    assert watched.settle()["m"].layout is not None


def test_temporary_and_foreign_names_are_passed_over(watched: Watched) -> None:
    for name in (".git/model.onnx", "m.tmp/model.onnx", "m.part/model.onnx", "lost+found/model.onnx"):
        watched.put(name)
    for name in ("README.md", "notes.txt", "config.json"):
        watched.put(name, "{}")
    assert watched.settle() == {}


def test_a_file_is_a_model_by_its_stem(watched: Watched) -> None:
    watched.put("iris.joblib")
    assert watched.settle()["iris"].layout is not None
    assert watched.folder.source("iris", "1").path.name == "iris.joblib"
    (watched.root / "iris.joblib").unlink()
    assert watched.settle() == {"iris": Change("iris")}


def test_a_folder_that_is_no_model_is_told_with_its_reason(watched: Watched) -> None:
    watched.put("m/readme.md")
    change = watched.settle()["m"]
    assert change.layout is None
    assert change.problem == "no model file in m; it holds readme.md"
    watched.put("m/model.onnx")
    assert watched.settle()["m"].problem is None


def test_bytecode_written_beside_a_class_is_no_change(watched: Watched) -> None:
    watched.put("m/model.py", "class Model: ...")
    watched.settle()
    watched.put("m/__pycache__/model.cpython-311.pyc", "x")
    assert watched.settle() == {}
    watched.folder.confirm("m")


def test_a_root_that_is_away_for_a_moment_ends_no_model(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.put("m/model.onnx")
    watched.settle()
    away = watched.root.with_name("away")
    watched.root.rename(away)
    with caplog.at_level(logging.WARNING):
        assert watched.settle() == {}
    assert len(caplog.records) == 1
    away.rename(watched.root)
    assert watched.settle() == {}


def test_settings_rename_a_model(watched: Watched) -> None:
    watched.put("folder/model.onnx")
    assert set(watched.settle()) == {"folder"}
    watched.put("folder/mmcore.yaml", "name: given")
    assert watched.settle() == {"folder": Change("folder"), "given": watched_change(watched, "given")}
    assert watched.folder.source("given", "1").name == "given"
    assert (watched.folder.has("given"), watched.folder.has("folder")) == (True, False)
    (watched.root / "folder/mmcore.yaml").unlink()
    assert set(watched.settle()) == {"folder", "given"}
    assert watched.folder.has("folder")


def watched_change(watched: Watched, name: str) -> Change:
    return watched.folder.look_again(name)[0]


def test_a_name_is_given_once_and_passes_on(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.put("a/model.onnx")
    watched.put("b/model.onnx")
    watched.put("b/mmcore.yaml", "name: a")
    with caplog.at_level(logging.WARNING):
        assert set(watched.settle()) == {"a"}
    assert "has the name 'a' already" in caplog.text
    assert watched.folder.path("a") == watched.root / "a"
    shutil.rmtree(watched.root / "a")
    changes: dict[str, Change] = {}
    for _ in range(4):
        changes |= watched.scan()
    assert changes["a"].layout is not None
    assert watched.folder.path("a") == watched.root / "b"


def test_a_source_is_refused_while_its_files_change(watched: Watched) -> None:
    watched.put("m/model.onnx", "one")
    watched.settle()
    assert watched.folder.source("m", "1").format == "onnx"
    watched.put("m/model.onnx", "two, half")
    with pytest.raises(Unavailable, match="'m' are being changed"):
        watched.folder.source("m", "1")
    with pytest.raises(Unavailable):
        watched.folder.confirm("m")
    watched.settle()
    watched.folder.confirm("m")
    with pytest.raises(NotFound, match="'m' version 4 is not found"):
        watched.folder.source("m", "4")
    shutil.rmtree(watched.root / "m")
    with pytest.raises(NotFound):
        watched.folder.source("m", "1")


def test_a_broken_version_is_refused_with_its_reason(watched: Watched) -> None:
    watched.put("m/1/model.onnx")
    watched.put("m/2/nothing.md")
    watched.settle()
    with pytest.raises(LoadFailed, match="version 2: no model file"):
        watched.folder.source("m", "2")


def test_a_switched_link_is_a_change(watched: Watched) -> None:
    outside = watched.root.parent
    for name in ("one", "two"):
        (outside / name).mkdir()
        (outside / name / "model.onnx").write_text("same")
    (watched.root / "m").symlink_to(outside / "one")
    assert "m" in watched.settle()
    (watched.root / "next").symlink_to(outside / "two")
    (watched.root / "next").replace(watched.root / "m")
    assert "m" in watched.settle()


def test_a_config_map_update_is_a_change(watched: Watched) -> None:
    watched.put("m/..v1/model.onnx", "one")
    watched.put("m/..v2/model.onnx", "two")
    model = watched.root / "m"
    (model / "..data").symlink_to("..v1")
    (model / "model.onnx").symlink_to("..data/model.onnx")
    assert "m" in watched.settle()
    (model / "..data_tmp").symlink_to("..v2")
    (model / "..data_tmp").replace(model / "..data")
    assert "m" in watched.settle()
    assert watched.folder.source("m", "1").path.read_text() == "two"


def test_a_signature_sees_names_sizes_and_contents_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = signature(tmp_path)
    assert signature(tmp_path) == first
    assert first.size_bytes == 1
    (tmp_path / "b").write_text("22")
    second = signature(tmp_path)
    assert second.digest != first.digest
    assert second.size_bytes == 3
    stat = (tmp_path / "a").stat()
    (tmp_path / "a.new").write_text("9")
    os.utime(tmp_path / "a.new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (tmp_path / "a.new").replace(tmp_path / "a")
    assert signature(tmp_path).digest != second.digest
    with pytest.raises(OSError, match="No such file"):
        signature(tmp_path / "missing")


async def test_start_takes_what_is_there_and_scan_now_what_is_new(watched: Watched) -> None:
    folder = ModelFolder(watched.root)
    watched.put("m/model.onnx")
    assert [change.name for change in await folder.start()] == ["m"]
    watched.put("n/model.onnx")
    assert [change.name for change in await folder.scan_now()] == ["n"]
    assert await folder.scan_now() == []
    folder.close()


async def test_what_is_new_is_taken_though_the_pause_ended_early(watched: Watched) -> None:
    # As uvloop's timers do, which count whole milliseconds.
    folder = ModelFolder(watched.root, clock=lambda: time.monotonic() * 0.9)
    assert await folder.start() == []
    watched.put("m/model.onnx")
    assert [change.name for change in await folder.scan_now()] == ["m"]
    folder.close()


async def test_old_files_are_taken_at_start_without_a_pause(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.put("m/model.onnx")

    async def no_sleep(seconds: float) -> None:
        raise AssertionError("paused")

    folder = ModelFolder(watched.root)
    monkeypatch.setattr("mmcore.storage.folder.SETTLED_AGE_S", -1.0)
    monkeypatch.setattr("asyncio.sleep", no_sleep)
    assert [change.name for change in await folder.start()] == ["m"]
    folder.close()


async def test_a_root_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        await ModelFolder(tmp_path / "nowhere").start()


async def test_watching_hands_over_changes_and_survives_an_error(watched: Watched) -> None:
    folder = ModelFolder(watched.root, interval_s=0.01)
    changes: asyncio.Queue[str] = asyncio.Queue()

    def apply(found: list[Change]) -> None:
        changes.put_nowait(found[0].name)
        if found[0].name == "bad":
            raise RuntimeError("a fault in whoever listens")

    task = asyncio.create_task(folder.watch(apply))
    for name in ("bad", "good"):
        watched.put(f"{name}/model.onnx")
        assert await asyncio.wait_for(changes.get(), 10) == name
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    folder.close()


def test_files_of_its_own_go_with_their_origin(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/model.onnx").write_text("")
    origin = FileOrigin("m", tmp_path / "own", owned=True)
    assert origin.source("m", "1").name == "m"
    origin.confirm("m")
    (tmp_path / "own/model.onnx").write_text("other")
    with pytest.raises(Unavailable):
        origin.confirm("m")
    origin.close()
    assert not (tmp_path / "own").exists()
    with pytest.raises((InvalidModel, OSError)):
        origin.source("m", "1")


async def test_a_folder_that_is_a_model_itself_is_told_of(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.put("m/config.pbtxt")
    await watched.folder.start()
    assert caplog.records == []
    own = ModelFolder(watched.root / "m")
    await own.start()
    own.close()
    assert "holds config.pbtxt" in caplog.text
    assert "the folder above it" in caplog.text
