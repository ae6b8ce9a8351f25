"""A fingerprint of a model's files by name, size, time of change and inode: equal as long as nobody touched them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final, NamedTuple

_DIGEST_BYTES: Final = 16
#: Written by the interpreter beside a model.py when it is imported.
_BYTECODE: Final = "__pycache__"


class Signature(NamedTuple):
    """The digest, the sum of the files' sizes, and the latest change of any file's inode (nanoseconds of the clock)."""

    digest: bytes
    size_bytes: int
    changed_ns: int


def signature(path: Path) -> Signature:
    """The fingerprint of a file, or of all files in a folder. Blocking.

    Links are followed at the top, and recorded inside: what they lead to is in the folder too, or is refused later.

    Raises:
        OSError: there is no such file or folder, or the top of it cannot be read.
    """
    top = os.path.realpath(path)
    pending = [""]
    records: list[tuple[str, ...]] = [(top,)]
    size = changed = 0
    if not os.path.isdir(top):  # noqa: PTH112  # text paths throughout: a Path for each file would cost more
        status = os.stat(top)  # noqa: PTH116
        records.append(_record("", status))
        size, changed, pending = status.st_size, status.st_ctime_ns, []
    while pending:
        here = pending.pop()
        try:
            entries = list(os.scandir(os.path.join(top, here)))  # noqa: PTH118
        except OSError as error:
            if not here:
                raise
            # Gone since its parent was read, or closed to us: either way different from what can be read.
            records.append((here, type(error).__name__))
            continue
        for entry in entries:
            relative = f"{here}/{entry.name}" if here else entry.name
            try:
                if entry.is_symlink():
                    records.append((relative, os.readlink(entry.path)))  # noqa: PTH115
                elif entry.is_dir():
                    if entry.name != _BYTECODE:
                        pending.append(relative)
                else:
                    status = entry.stat()
                    records.append(_record(relative, status))
                    size += status.st_size
                    changed = max(changed, status.st_ctime_ns)
            except OSError as error:
                records.append((relative, type(error).__name__))
    digest = hashlib.blake2b(repr(sorted(records)).encode("utf-8", "surrogateescape"), digest_size=_DIGEST_BYTES)
    return Signature(digest.digest(), size, changed)


def _record(name: str, status: os.stat_result) -> tuple[str, ...]:
    return name, str(status.st_size), str(status.st_mtime_ns), str(status.st_ino)
