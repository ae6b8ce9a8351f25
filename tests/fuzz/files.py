"""Fuzz targets for what is read from files, from the registry and from worker processes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mmcore.errors import InvalidModel, LoadFailed
from mmcore.registry.records import CorruptRecord, InstanceRecord, ModelRecord, Record, VModelRecord, decode, encode
from mmcore.runtimes.isolation.frames import BrokenFrame, description_in, error_in, size_in, unpack
from mmcore.runtimes.isolation.segment import Segment
from mmcore.storage.archives import unpack as unpack_archive
from mmcore.storage.config_pbtxt import read_config_json, read_config_pbtxt
from mmcore.storage.settings import read_settings

#: In memory, where there is such a place: thousands of folders are made.
_SHARED = Path("/dev/shm")
FOLDER = Path(tempfile.mkdtemp(prefix="mmcore-fuzz-", dir=_SHARED if _SHARED.is_dir() else None))
ARCHIVES = ("model.tar", "model.tar.gz", "model.zip", "model.gz")
SETTINGS = ("model-settings.json", "_schema.json", "mmcore.yaml")
RECORDS: tuple[type[Record], ...] = (ModelRecord, VModelRecord, InstanceRecord)


def config_pbtxt(data: bytes) -> None:
    """Triton's ``config.pbtxt``."""
    try:
        read_config_pbtxt(data.decode(errors="replace"), FOLDER)
    except InvalidModel:
        return


def config_json(data: bytes) -> None:
    """The same as JSON, as a load request may bring it."""
    try:
        read_config_json(data.decode(errors="replace"), FOLDER)
    except InvalidModel:
        return


def settings(data: bytes) -> None:
    """A model's other settings files; the first byte chooses."""
    if not data:
        return
    file = FOLDER / "settings" / SETTINGS[data[0] % len(SETTINGS)]
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data[1:])
    try:
        read_settings(file.parent)
    except InvalidModel:
        pass
    finally:
        file.unlink()


def archive(data: bytes) -> None:
    """A model's archive, the first byte chooses which kind: nothing outside of the folder, no link that leads there."""
    if not data:
        return
    with tempfile.TemporaryDirectory(dir=FOLDER) as made:
        base = Path(made)
        packed, folder = base / ARCHIVES[data[0] % len(ARCHIVES)], base / "unpacked"
        packed.write_bytes(data[1:])
        folder.mkdir()
        try:
            unpack_archive(packed, folder, lambda _: None)
        except LoadFailed:
            pass
        else:
            for path in folder.rglob("*"):
                assert os.path.realpath(path).startswith(str(folder.resolve()))
        assert {path.name for path in base.iterdir()} == {packed.name, folder.name}
        assert packed.read_bytes() == data[1:]


def registry_record(data: bytes) -> None:
    """What another instance, of another version perhaps, has written."""
    for kind in RECORDS:
        try:
            record = decode(kind, "name", data)
        except CorruptRecord:
            continue
        assert decode(kind, "name", encode(record)) == record


def worker_frame(data: bytes) -> None:
    """What a worker process sends; its model may have written it."""
    segment = Segment(-1)
    error_in(data)
    for read in (description_in, size_in):
        try:
            read(data)
        except BrokenFrame:
            continue
    try:
        for _, _, array in unpack(data, segment).tensors:
            array.tobytes()
    except BrokenFrame:
        return
