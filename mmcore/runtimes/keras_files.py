"""Keras files as SavedModels: written by a process of their own, and kept for the next load of the same content.

Writing one takes many seconds, nearly all of them for the import of TensorFlow's Python package. What is kept is found
by the file's content and the versions that wrote it, lies in a folder that nobody else may write to, and is read only
when it is as it was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from mmcore.errors import LoadFailed
from mmcore.storage.disk_cache import DiskCache, Lease

log = logging.getLogger(__name__)

SUFFIXES: Final = (".keras", ".h5")

#: What all exports of this machine's user may take, and what is set aside for one: so much and twice its file.
_LIMIT_BYTES: Final = 2**30
_EXPECTED_BYTES: Final = 2**20
_TIMEOUT_S: Final = 300.0
_EXPORT: Final = "model.savedmodel"
_DIGEST: Final = "digest"
_WRITERS: Final = ("keras", "tensorflow", "tensorflow-cpu")


class KerasExports:
    """Exports in ``folder``, which is made for its owner alone; together at most ``limit_bytes``."""

    def __init__(self, folder: Path, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._cache = DiskCache(folder, limit_bytes)

    @contextmanager
    def exported(self, path: Path) -> Iterator[Path]:
        """The folder of the SavedModel of a Keras file, for as long as the context lasts.

        Raises:
            LoadFailed: Keras cannot read the file.
        """
        try:
            kept = self._kept(path)
        except OSError as error:
            log.warning("exports of Keras files are not kept: %s", error)
            kept = None
        if kept is not None:
            yield self._cache.files(kept.digest) / _EXPORT
            return
        with tempfile.TemporaryDirectory(prefix="mmcore-keras-") as folder:
            export = Path(folder) / _EXPORT
            _export(path, export)
            yield export

    def _kept(self, path: Path) -> Lease | None:
        """The export in the cache, made if need be; None where it cannot be kept or is not what it was."""
        expected = _EXPECTED_BYTES + 2 * path.stat().st_size
        if expected > self._limit_bytes:
            return None
        self._make_private()
        digest = _content_digest(path)
        lease = self._cache.lease(digest)
        if lease is None:
            with self._cache.making(digest, expected, _Patience()) as place:
                if not isinstance(place, Lease):
                    _export(path, place.folder / _EXPORT)
                    (place.folder / _DIGEST).write_text(_tree_digest(place.folder / _EXPORT))
                    place.take(max(0, _write_through(place.folder) - expected))
            lease = self._cache.lease(digest)
        if lease is None:
            return None
        files = self._cache.files(digest)
        if (files / _DIGEST).read_text() != _tree_digest(files / _EXPORT):
            log.warning("the kept export of %r in %s is not what was written; it is not used", path.name, files)
            return None
        return lease

    def _make_private(self) -> None:
        """Make the folder where it is missing.

        Raises:
            PermissionError: it is somebody else's, or others may write to it.
        """
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)
        found = self._folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{self._folder} is not a folder that only this user may write to")


class _Patience:
    """Waits for another export of the same file, which ends in time or with its process."""

    def pause(self, seconds: float) -> None:
        """Wait so long."""
        time.sleep(seconds)


def _export(path: Path, folder: Path) -> None:
    """Write a Keras file as a SavedModel, in a process of its own."""
    command = [sys.executable, "-m", "mmcore.runtimes.keras_export", str(path), str(folder)]
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(  # noqa: S603  # our own module, on a path of the models' folder
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"{path.name!r}: Keras took longer than {_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise LoadFailed(f"{path.name!r} is no model that Keras reads: {lines[-1] if lines else done.returncode}")


def _content_digest(path: Path) -> str:
    """What tells an export: the file's bytes, its suffix, and what writes it."""
    found = hashlib.sha256(path.suffix.encode())
    for package in _WRITERS:
        with contextlib.suppress(PackageNotFoundError):
            found.update(f"\n{package} {version(package)}".encode())
    found.update(b"\n" + path.read_bytes())
    return found.hexdigest()


def _tree_digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            found.update(f"{path.relative_to(folder)}\n{len(content)}\n".encode() + content)
    return found.hexdigest()


def _write_through(folder: Path) -> int:
    """Have all files on the disk before the entry is; their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            total += path.stat().st_size
    return total


#: Those of this user, for all instances on this machine.
exports: Final = KerasExports(Path(tempfile.gettempdir()) / f"mmcore-exports-{os.getuid()}")
