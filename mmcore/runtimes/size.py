"""A first idea of how much memory a model takes, before anything is measured.

The seam for a measuring cache: it may ignore ``LoadedModel.size_bytes`` once it has seen the load, and use this for
the prediction before the first one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mmcore.model import ModelSource

#: What exporters append to an ONNX file's name for its external data (``model.onnx.data``, ``model.onnx_data``).
_WEIGHTS_SUFFIXES: Final = (".data", "_data")


def estimated_size(source: ModelSource, path: Path, *, factor: float, base: int) -> int:
    """Bytes a loaded model takes: what its owner states, else ``factor`` × the bytes on disk at ``path`` + ``base``.

    ``factor`` and ``base`` belong to the format (how far its file expands; what an empty model costs).
    """
    if source.settings.size_bytes is not None:
        return source.settings.size_bytes
    return int(factor * disk_size(path)) + base


def disk_size(path: Path) -> int:
    """Bytes of a file and of the weights kept beside it, or of a folder's regular files."""
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink())
    companions = [path.with_name(f"{path.name}{suffix}") for suffix in _WEIGHTS_SUFFIXES]
    if path.suffix == ".xml":  # OpenVINO
        companions.append(path.with_suffix(".bin"))
    return path.stat().st_size + sum(file.stat().st_size for file in companions if file.is_file())
