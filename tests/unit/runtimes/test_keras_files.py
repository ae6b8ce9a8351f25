"""Exports of Keras files are kept by content, in bounds, and used only when they are as they were written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mmcore.errors import LoadFailed
from mmcore.runtimes import keras_files
from mmcore.runtimes.keras_files import KerasExports


class Exporter:
    """Stands for the program that writes a SavedModel: copies the file into the folder, and counts."""

    def __init__(self) -> None:
        self.exported: list[str] = []

    def __call__(self, path: Path, folder: Path) -> None:
        self.exported.append(path.name)
        if path.read_bytes() == b"broken":
            (folder / "half").mkdir(parents=True)
            raise LoadFailed(f"{path.name!r} is no model that Keras reads")
        (folder / "variables").mkdir(parents=True)
        (folder / "saved_model.pb").write_bytes(path.read_bytes())
        (folder / "variables" / "data").write_bytes(b"x" * 1000)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    made = Exporter()
    monkeypatch.setattr(keras_files, "_export", made)
    return made


@pytest.fixture
def exports(tmp_path: Path) -> KerasExports:
    return KerasExports(tmp_path / "exports")


def model(folder: Path, content: bytes = b"one", name: str = "model.keras") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def read(exports: KerasExports, path: Path) -> bytes:
    with exports.exported(path) as folder:
        assert (folder / "variables" / "data").stat().st_size == 1000
        return (folder / "saved_model.pb").read_bytes()


def test_the_same_content_is_exported_once(tmp_path: Path, exports: KerasExports, exporter: Exporter) -> None:
    first, second = model(tmp_path), model(tmp_path, name="copy.keras")
    assert [read(exports, path) for path in (first, second, first)] == [b"one"] * 3
    assert read(KerasExports(tmp_path / "exports"), first) == b"one"
    assert exporter.exported == ["model.keras"]
    assert read(exports, model(tmp_path, b"two")) == b"two"
    assert read(exports, model(tmp_path, b"one", "model.h5")) == b"one"
    assert len(exporter.exported) == 3


def test_another_framework_exports_anew(
    tmp_path: Path, exports: KerasExports, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path)
    read(exports, path)
    monkeypatch.setattr(keras_files, "version", lambda package: "99")
    read(exports, path)
    assert len(exporter.exported) == 2


def test_loads_at_the_same_time_export_once(tmp_path: Path, exports: KerasExports, exporter: Exporter) -> None:
    path = model(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: read(exports, path), range(8))) == [b"one"] * 8
    assert len(exporter.exported) == 1


def test_a_failed_export_leaves_nothing_and_is_tried_again(
    tmp_path: Path, exports: KerasExports, exporter: Exporter
) -> None:
    path = model(tmp_path, b"broken")
    for _ in range(2):
        with pytest.raises(LoadFailed, match=r"'model.keras' is no model"):
            read(exports, path)
    assert len(exporter.exported) == 2
    assert not list((tmp_path / "exports").rglob("half"))


@pytest.mark.parametrize("damage", ["changed", "cut", "added", "removed"])
def test_an_export_that_is_not_what_was_written_is_not_used(
    tmp_path: Path, exports: KerasExports, exporter: Exporter, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = model(tmp_path)
    read(exports, path)
    (kept,) = (tmp_path / "exports").rglob("saved_model.pb")
    data = kept.parent / "variables" / "data"
    match damage:
        case "changed":
            kept.write_bytes(b"two")
        case "cut":
            data.write_bytes(b"x" * 10)
        case "added":
            (kept.parent / "more").touch()
        case "removed":
            data.unlink()
    assert read(exports, path) == b"one"
    assert len(exporter.exported) == 2
    assert "is not what was written; it is not used" in caplog.text


def test_exports_stay_within_their_bounds(tmp_path: Path, exporter: Exporter) -> None:
    exports = KerasExports(tmp_path / "exports", keras_files._EXPECTED_BYTES + 5000)
    for number in range(20):
        assert read(exports, model(tmp_path, b"%d" % number)) == b"%d" % number
    assert sum(one.stat().st_size for one in (tmp_path / "exports").rglob("data")) < 6000
    read(exports, model(tmp_path, b"19"))
    assert len(exporter.exported) == 20
    # One that is larger than all may be is exported each time.
    for _ in range(2):
        read(exports, model(tmp_path, b"y" * 4000))
    assert len(exporter.exported) == 22


@pytest.mark.parametrize("spoil", ["others", "link", "file"])
def test_a_folder_that_others_may_write_to_is_not_used(
    tmp_path: Path, exporter: Exporter, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "exports"
    match spoil:
        case "others":
            folder.mkdir()
            folder.chmod(0o777)
        case "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            folder.symlink_to(tmp_path / "elsewhere")
        case "file":
            folder.touch()
    path = model(tmp_path)
    exports = KerasExports(folder)
    assert [read(exports, path) for _ in range(2)] == [b"one"] * 2
    assert len(exporter.exported) == 2
    assert "is not a folder that only this user may write to" in caplog.text


def test_a_full_disk_means_an_export_each_time(
    tmp_path: Path, exports: KerasExports, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    path = model(tmp_path)
    monkeypatch.setattr(keras_files, "_write_through", full)
    assert [read(exports, path) for _ in range(2)] == [b"one"] * 2
    assert not list((tmp_path / "exports" / "entries").iterdir())
