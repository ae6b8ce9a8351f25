"""A first idea of how much memory a model takes, before anything is measured.

The seam for a measuring cache: it may ignore ``LoadedModel.size_bytes`` once it has seen the load, and use this for
the prediction before the first one.
"""

from __future__ import annotations

from pathlib import Path

from mmcore.model import ModelSource


def estimated_size(source: ModelSource, path: Path, *, factor: float, base: int) -> int:
    """Bytes a loaded model takes: what its owner states, else ``factor`` × the bytes on disk at ``path`` + ``base``.

    ``factor`` and ``base`` belong to the format (how far its file expands; what an empty model costs).
    """
    if source.settings.size_bytes is not None:
        return source.settings.size_bytes
    return int(factor * disk_size(path)) + base


def disk_size(path: Path) -> int:
    """Bytes of a file, of its companions (``model.onnx.data``, ``model.onnx_data``), or of a folder's regular files."""
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink())
    return sum(
        entry.stat().st_size for entry in path.parent.iterdir() if entry.name.startswith(path.name) and entry.is_file()
    )
