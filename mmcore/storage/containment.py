"""Keeps every path of a model inside the model's own folder, links followed.

The folder itself may be a link, and links within it may point anywhere below it: that is how mounted ConfigMaps and
atomically switched checkouts look. It knows paths alone and nothing of formats.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from mmcore.errors import InvalidModel


def inside(base: Path, stated: str, where: str) -> Path:
    """The path below ``base`` that ``stated``, a relative path from a settings file, means.

    ``where`` names the file and field that stated it. The path need not exist.

    Raises:
        InvalidModel: it is empty or absolute, has ``..`` in it, or is a link out of ``base``.
    """
    relative = PurePosixPath(stated)
    if not stated or "\0" in stated or relative.is_absolute() or ".." in relative.parts:
        raise InvalidModel(f"{where}: '{stated}' is not a path inside the model's folder")
    path = base / relative
    if not _below(os.path.realpath(path), os.path.realpath(base)):
        raise InvalidModel(f"{where}: '{stated}' is a link that leaves the model's folder")
    return path


def refuse_links_out(base: Path, folder: Path) -> None:
    """Check every link in ``folder``, which is ``base`` or a folder in it.

    Raises:
        InvalidModel: a link leads out of ``base``, or nowhere.
    """
    root = os.path.realpath(base)
    if not _below(os.path.realpath(folder), root):
        raise InvalidModel(f"{folder.name} is a link that leaves the model's folder")
    pending = [os.path.realpath(folder)]
    while pending:
        here = pending.pop()
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    name = os.path.relpath(entry.path, root)
                    if not _below(target, root):
                        raise InvalidModel(f"{name} is a link that leaves the model's folder")
                    if not os.path.exists(target):  # noqa: PTH110  # a Path made for each link would cost more
                        raise InvalidModel(f"{name} is a link to nothing")
                elif entry.is_dir():
                    pending.append(entry.path)


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
