"""Finds the model in a folder or file: its versions, each one's format and file, and what its settings say.

A model folder holds the model's files, or numeric version folders that do (``1/``, ``2/``; a leading zero is no
version, as with Triton). Without version folders it is version "1". Hidden and temporary names are not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mmcore.errors import InvalidModel
from mmcore.model import ModelSource
from mmcore.storage.containment import inside, refuse_links_out
from mmcore.storage.formats import BY_CONTENT, format_of, is_triton_python
from mmcore.storage.settings import SETTINGS_FILES, read_settings
from mmcore.storage.stated import Stated, VersionPolicy

DEFAULT_VERSION: Final = "1"
_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
_NAMED_IN_ERRORS: Final = 5
#: Folders and files that hold no model whatever their suffix.
_NOT_MODELS: Final = SETTINGS_FILES | {"__pycache__", "requirements.txt", "labels.txt"}


@dataclass(frozen=True, slots=True)
class Layout:
    """What one model folder, or file, holds.

    Attributes:
        name: the model's name: its folder's, or the one its settings give.
        sources: every version that can be asked for, ascending; the last is the default.
        problems: reasons why other versions cannot be, by version.
    """

    name: str
    sources: dict[str, ModelSource]
    problems: dict[str, str]


def is_temporary(name: str) -> bool:
    """Whether a file or folder of that name is somebody's work in progress."""
    return name.startswith(".") or name.endswith((".tmp", ".part", "~"))


def detect(path: Path) -> dict[str, ModelSource]:
    """The versions of the model in a folder or file, ascending; the last is the default.

    Raises:
        InvalidModel: there is none, with the reason.
    """
    layout = inspect(path)
    if not layout.sources:
        raise InvalidModel("; ".join(layout.problems.values()) or "no version is available")
    return layout.sources


def inspect(path: Path, *, name: str | None = None, override: Callable[[Path], Stated] | None = None) -> Layout:
    """Everything about the model in a folder or file.

    ``name`` is the name to give it, else its settings or its folder decide. ``override`` reads settings that are laid
    over the folder's own ones; it is given the folder.

    Raises:
        InvalidModel: its settings are wrong, or it is no model at all.
    """
    if not path.is_dir():
        return _bare_file(path, name)
    stated = read_settings(path)
    if override is not None:
        stated = override(path).over(stated)
    called = name or stated.name or path.name
    folders = _version_folders(path)
    if folders:
        return _versions(path, folders, called, stated)
    version = stated.version or DEFAULT_VERSION
    return Layout(called, {version: _source(path, path, called, version, stated)}, {})


def _versions(path: Path, folders: list[Path], name: str, stated: Stated) -> Layout:
    """The layout of a folder with version folders, which are given in ascending order."""
    policy = stated.policy or VersionPolicy()
    wanted = {folder.name for folder in folders}
    if policy.latest is None:
        wanted = set(policy.allowed(wanted))
        if not wanted:
            raise InvalidModel(f"version_policy serves none of the versions {', '.join(one.name for one in folders)}")
    sources: dict[str, ModelSource] = {}
    problems: dict[str, str] = {}
    for folder in folders:
        if folder.name in wanted:
            try:
                own = read_settings(folder).over(stated)
                sources[folder.name] = _source(path, folder, name, folder.name, own)
            except InvalidModel as error:
                problems[folder.name] = f"version {folder.name}: {error}"
    if policy.latest is not None:
        # Counted among those that hold a model: an empty newest folder must not take the place of one that works.
        sources = {version: sources[version] for version in policy.allowed(sources)}
        oldest = int(min(sources, key=int, default="0"))
        problems = {version: problem for version, problem in problems.items() if int(version) > oldest}
    return Layout(name, sources, problems)


def _bare_file(path: Path, name: str | None) -> Layout:
    stated = format_of(path)
    if stated is None:
        raise InvalidModel(f"{path.name} is not a model of a known format")
    called = name or path.stem
    return Layout(called, {DEFAULT_VERSION: ModelSource(called, DEFAULT_VERSION, stated, path)}, {})


def _version_folders(path: Path) -> list[Path]:
    found = [one for one in path.iterdir() if _VERSION.fullmatch(one.name) and one.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name))


def _source(base: Path, folder: Path, name: str, version: str, stated: Stated) -> ModelSource:
    refuse_links_out(base, folder)
    found, path = _stated_file(folder, stated) if stated.file else _search(folder, stated.format)
    if found == "python" and is_triton_python(path):
        raise InvalidModel(
            f"{path.name} defines TritonPythonModel, the contract of Triton's Python backend, not mmcore's Python model"
        )
    return ModelSource(name, version, found, path, stated.settings(), folder=base)


def _stated_file(folder: Path, stated: Stated) -> tuple[str, Path]:
    assert stated.file is not None
    path = inside(folder, stated.file, "file")
    if not path.exists():
        raise InvalidModel(f"the settings name the file '{stated.file}', which is not there")
    found = stated.format or format_of(path)
    if found is not None:
        return found, path
    if path.is_dir():
        return _search(path, None)
    raise InvalidModel(f"the format of '{stated.file}' is not known; state it in mmcore.yaml (format)")


def _search(folder: Path, wanted: str | None) -> tuple[str, Path]:
    """The one model in a folder: format and path. ``wanted`` restricts it to a format."""
    if (folder / "saved_model.pb").is_file() and wanted in (None, "tensorflow"):
        return "tensorflow", folder
    entries = sorted(one for one in folder.iterdir() if not is_temporary(one.name) and one.name not in _NOT_MODELS)
    models = [(known, one) for one in entries if (known := format_of(one)) is not None and wanted in (None, known)]
    # A class uses the other files as it likes; else the well-known name goes before any other.
    for chosen in (
        [model for model in models if model[0] == "python"],
        [model for model in models if model[1].stem == "model"],
        models,
    ):
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            names = " and ".join(one.name for _, one in chosen[:_NAMED_IN_ERRORS])
            raise InvalidModel(f"{folder.name} holds {names}; name the model's file in mmcore.yaml (file)")
    files = [one for one in entries if one.is_file()]
    if wanted is not None and len(files) == 1:
        return wanted, files[0]
    folders = [one for one in entries if one.is_dir()]
    if not files and len(folders) == 1 and not _VERSION.fullmatch(folders[0].name):
        return _search(folders[0], wanted)
    raise InvalidModel(_nothing_found(folder, entries, wanted))


def _nothing_found(folder: Path, entries: list[Path], wanted: str | None) -> str:
    names = [one.name for one in entries[:_NAMED_IN_ERRORS]] + ["…"] * (len(entries) > _NAMED_IN_ERRORS)
    held = f"it holds {', '.join(names)}" if names else "it holds nothing"
    unknown = [one.name for one in entries if one.suffix in BY_CONTENT and one.name not in _NOT_MODELS]
    if unknown:
        held += f"; by its content {unknown[0]} is no model of XGBoost or LightGBM"
    return f"no model file{f' of format {wanted}' if wanted else ''} in {folder.name}; {held}"
