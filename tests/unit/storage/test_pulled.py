"""The origin of registered models: mounted files, held files, and what a long pull logs."""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path

import pytest

from mmcore.errors import LoadFailed, NotFound, Unavailable
from mmcore.model import ModelInfo
from mmcore.storage import DiskCache, PulledOrigin, Puller, StorageConfig, progress
from mmcore.storage.progress import LogProgress

SCHEMA = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]}


@pytest.fixture
def puller(tmp_path: Path) -> Puller:
    return Puller(StorageConfig(None), DiskCache(tmp_path / "cache", 10**9), pvc_mounts=tmp_path / "pvc")


def origin(puller: Puller, info: ModelInfo) -> PulledOrigin:
    return PulledOrigin(puller, {"mine": info}.get)


def test_single_mounted_file_has_the_format_and_schema_it_is_registered_with(puller: Puller, tmp_path: Path) -> None:
    claim = tmp_path / "pvc" / "claim"
    claim.mkdir(parents=True)
    (claim / "mnist.bin").write_bytes(b"x")
    (claim / "schema.json").write_text(json.dumps(SCHEMA))
    key = {"storage_params": {"type": "pvc", "name": "claim"}, "schema_path": "schema.json"}
    made = origin(puller, ModelInfo("mt:sklearn:1", "mnist.bin", json.dumps(key)))
    source = made.source("mine", "1")
    assert (source.format, source.path, source.settings.inputs[0].name) == ("sklearn", claim / "mnist.bin", "x")
    made.confirm("mine")
    made.source("mine", "1")
    (claim / "mnist.bin").write_bytes(b"changed")
    with pytest.raises(Unavailable, match="the files of model 'mine' changed"):
        made.confirm("mine")


def test_folder_without_a_stated_format_is_looked_into(puller: Puller, tmp_path: Path) -> None:
    (tmp_path / "m" / "3").mkdir(parents=True)
    (tmp_path / "m" / "3" / "net.onnx").write_bytes(b"x")
    source = origin(puller, ModelInfo("rt:any", str(tmp_path / "m"))).source("mine", "1")
    assert (source.format, source.version, source.path.name) == ("onnx", "1", "net.onnx")
    (tmp_path / "m" / "3" / "net.onnx").unlink()
    with pytest.raises(LoadFailed, match="no model file in 3; it holds nothing"):
        origin(puller, ModelInfo("rt:any", str(tmp_path / "m"))).source("mine", "1")
    with pytest.raises(NotFound):
        origin(puller, ModelInfo("", str(tmp_path / "m"))).source("other", "1")


def test_files_stay_while_their_source_is_held(tmp_path: Path) -> None:
    puller = Puller(StorageConfig(None), DiskCache(tmp_path / "cache", 100))
    for name in "ab":
        (tmp_path / f"{name}.onnx").write_bytes(name.encode() * 60)
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / f"{name}.onnx", f"{name}.onnx")
    infos = {name: ModelInfo("", str(tmp_path / f"{name}.tar")) for name in "ab"}
    puller.cache._limit = 2 * 2**20
    both = PulledOrigin(puller, infos.get)
    held = both.source("a", "1")
    puller.cache._limit = 2**20
    with pytest.raises(LoadFailed, match="no room"):
        both.source("b", "1")
    assert held.path.read_bytes() == b"a" * 60
    path = held.path
    del held
    assert both.source("b", "1").path.read_bytes() == b"b" * 60
    assert not path.exists()


def test_long_pull_logs_how_far_it_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "mmcore")
    told = LogProgress()
    told.started("s3://models/m/a", 3, 4_000_000)
    told.received(1_000_000)
    assert caplog.messages == []
    monkeypatch.setattr(progress, "_EVERY_S", 0.0)
    told.received(1_000_000)
    assert caplog.messages[0].startswith("pulling s3://models/m/a (3 files): 2.0 of 4.0 MB, ")
