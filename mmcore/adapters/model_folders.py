"""The folder that a server loads from: links to the files of each model, made when it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final, NamedTuple

from mmcore.errors import InvalidModel
from mmcore.pb import model_runtime_pb2 as pb
from mmcore.runtimes.size import files_of

#: Lays a model out: given its folder, its id, its format, its files and its schema or None.
Layout = Callable[[Path, str, str, Path, Path | None], None]


class LaidOut(NamedTuple):
    """A model as it was laid out: its format, its folder, and what its files take, in bytes."""

    kind: str
    folder: Path
    size_bytes: int


class ModelFolders:
    """The models' folders below ``root``, which is this runtime's alone but for the entries ``kept``. All blocking."""

    def __init__(self, root: Path, layout: Layout, *, kept: Collection[str] = ()) -> None:
        self.root: Final = root
        self._layout = layout
        self._kept = kept

    def make(self, request: pb.LoadModelRequest) -> LaidOut:
        """Make the model's folder.

        Raises:
            InvalidModel: its name or its files cannot be laid out.
            OSError: the folder cannot be written.
        """
        name = request.modelId
        if not name or "/" in name or name.startswith(".") or "\0" in name or name in self._kept:
            raise InvalidModel(f"{name!r} cannot be the name of a folder in the server's repository")
        try:
            key: dict[str, Any] = json.loads(request.modelKey or "{}")
            stated = key.get("model_type", request.modelType)
        except (ValueError, AttributeError, RecursionError):
            raise InvalidModel("the model's key is not a JSON object") from None
        if isinstance(stated, dict):
            stated = stated.get("name", "")
        kind = str(stated).removeprefix("mt:").partition(":")[0].lower()
        schema = Path(key["schema_path"]) if key.get("schema_path") else None
        path = Path(request.modelPath).absolute()
        if not path.exists():
            raise InvalidModel(f"{path} does not exist")
        folder = self.root / name
        self.remove(name)
        folder.mkdir(parents=True)
        self._layout(folder, name, kind, path, schema)
        return LaidOut(kind, folder, files_size(path))

    def remove(self, name: str) -> None:
        """Take a model's folder away, if there is one."""
        shutil.rmtree(self.root / name, ignore_errors=True)

    def clear(self) -> None:
        """Take away what is there."""
        self.root.mkdir(parents=True, exist_ok=True)
        for entry in self.root.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name not in self._kept:
                entry.unlink(missing_ok=True)


def files_size(path: Path) -> int:
    """What a model's files take, in bytes. Blocking."""
    return sum(file.stat().st_size for file in files_of(path))


def newest_version(path: Path) -> tuple[str, Path]:
    """The largest of the numbers that name the folders in ``path``, if all of them are named so; else version 1."""
    folders = [entry for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []
    if folders and all(entry.name.isdecimal() for entry in folders):
        newest = max(folders, key=lambda entry: int(entry.name))
        if int(newest.name) > 0:
            return str(int(newest.name)), newest
    return "1", path
