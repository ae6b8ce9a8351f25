"""Whether a file has changed, by what its folder tells of it: it need not be read for that."""

from __future__ import annotations

from pathlib import Path


def file_stamp(file: Path) -> tuple[int, int, int, int] | None:
    """What tells a file from another that took its place; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
