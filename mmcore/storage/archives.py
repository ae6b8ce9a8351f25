"""Archives that a model may come as, unpacked without trust: nothing is written outside of the folder.

Only files, folders, and links that stay inside are taken. An archive that would become very much larger than it is, or
very many files, is refused before it has.
"""

from __future__ import annotations

import errno
import gzip
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Final, Protocol, cast

from mmcore.errors import LoadFailed

MAX_FILES: Final = 100_000
#: Bytes that one byte of an archive may become, and what any archive may.
MAX_RATIO: Final = 100
FREE_BYTES: Final = 64 * 2**20
_CHUNK: Final = 2**20
#: Errors of the system that an archive causes: a place before its beginning, names that no file can have.
_ITS_OWN_FAULT: Final = (errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ)
_TARS: Final = (".tar", ".tar.gz", ".tgz")
_SUFFIXES: Final = (*_TARS, ".zip", ".gz")


def is_archive(name: str) -> bool:
    """Whether a file of that name is unpacked."""
    return name.lower().endswith(_SUFFIXES)


def unpack(archive: Path, folder: Path, take: Callable[[int], None]) -> None:
    """Unpack ``archive`` into ``folder``, which is there; ``take`` is called with each number of bytes beforehand.

    Raises:
        LoadFailed: it is damaged, or holds what could do harm; ``folder`` is to be thrown away then.
    """
    name = archive.name.lower()
    unpacked = _Unpacked(archive, folder, take)
    try:
        if name.endswith(_TARS):
            _unpack_tar(archive, unpacked)
        elif name.endswith(".zip"):
            _unpack_zip(archive, unpacked)
        else:
            with gzip.open(archive) as content:
                unpacked.write(archive.name[: -len(".gz")], _Counted(content, unpacked))
        unpacked.link()
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise LoadFailed(f"{archive.name} is damaged: {error}") from None
    except (ValueError, LookupError, OverflowError, struct.error) as error:
        # What the two modules let through of headers that cannot be.
        raise LoadFailed(f"{archive.name} is damaged: {error!r}") from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise LoadFailed(f"{archive.name} holds '{Path(error.filename).name}' twice, or as file and folder") from None
    except OSError as error:
        if error.errno not in _ITS_OWN_FAULT:
            raise
        raise LoadFailed(f"{archive.name} is damaged: {error}") from None
    except (RuntimeError, NotImplementedError) as error:
        # What zipfile says of passwords and of methods that it does not know.
        raise LoadFailed(f"{archive.name} cannot be unpacked: {error}") from None


class _Readable(Protocol):
    """A file that is read once."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, empty at the end."""


class _Unpacked:
    """What has come out of an archive so far. Links are made last: nothing is written through one."""

    def __init__(self, archive: Path, folder: Path, take: Callable[[int], None]) -> None:
        self._archive = archive
        self._folder = folder
        self._take = take
        self._most = FREE_BYTES + archive.stat().st_size * MAX_RATIO
        self._bytes = 0
        self._entries = 0
        self._links: list[tuple[Path, str]] = []

    def folder(self, name: str) -> None:
        """A folder of the archive."""
        if PurePosixPath(name).parts:
            self._path(name).mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: _Readable) -> None:
        """A file of the archive."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            while chunk := content.read(_CHUNK):
                self._take(len(chunk))
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def later(self, name: str, target: str) -> None:
        """A link of the archive, as text relative to its own place."""
        self._links.append((self._path(name), target))

    def hard(self, name: str, target: str) -> None:
        """Another name of a file that came before."""
        path, origin = self._path(name), self._path(target)
        if not origin.is_file():
            raise LoadFailed(f"{self._archive.name}: '{name}' is a link to '{target}', which is no file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with origin.open("rb") as content:
            self.write(name, _Counted(content, self))

    def link(self) -> None:
        """Make the links, and look where each leads now that all are there."""
        root = os.path.realpath(self._folder)
        for path, target in self._links:
            lexical = os.path.normpath(path.parent.relative_to(self._folder) / target)
            through = any((self._folder / parent).is_symlink() for parent in path.relative_to(self._folder).parents)
            if through or lexical.startswith(("/", "..")):
                raise self._leaves(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)
        for path, _ in self._links:
            if not os.path.realpath(path).startswith(root + os.sep):
                raise self._leaves(path)

    def count(self, count: int) -> None:
        """So many bytes have been decompressed."""
        self._bytes += count
        if self._bytes > self._most:
            raise LoadFailed(f"{self._archive.name} would become more than {self._most} bytes; it is taken for a bomb")

    def _leaves(self, path: Path) -> LoadFailed:
        return LoadFailed(f"{self._archive.name}: '{path.relative_to(self._folder)}' is a link that leaves the archive")

    def _path(self, name: str) -> Path:
        self._entries += 1
        if self._entries > MAX_FILES:
            raise LoadFailed(f"{self._archive.name} has more than {MAX_FILES} entries; it is taken for a bomb")
        relative = PurePosixPath(name)
        if not relative.parts or relative.is_absolute() or ".." in relative.parts or "\0" in name or "\\" in name:
            raise LoadFailed(f"{self._archive.name}: '{name}' is no path inside the archive")
        return self._folder / relative


class _Counted:
    """Bytes as they are decompressed, and a tar's headers too: these can be bombs as well."""

    def __init__(self, content: _Readable, unpacked: _Unpacked) -> None:
        self._content = content
        self._unpacked = unpacked

    def read(self, size: int) -> bytes:
        """The next bytes."""
        chunk = self._content.read(size)
        self._unpacked.count(len(chunk))
        return chunk


def _unpack_tar(archive: Path, unpacked: _Unpacked) -> None:
    # Read as a stream: no header is followed to where it points.
    plain = archive.suffix.lower() == ".tar"
    with archive.open("rb") if plain else gzip.open(archive) as stored:
        counted = _Counted(stored, unpacked)
        with tarfile.open(fileobj=cast(IO[bytes], counted), mode="r|") as tar:
            _unpack_members(archive, tar, unpacked)
        # To the end, where the checksum is.
        while counted.read(_CHUNK):
            pass


def _unpack_members(archive: Path, tar: tarfile.TarFile, unpacked: _Unpacked) -> None:
    for member in tar:
        if member.isdir():
            unpacked.folder(member.name)
        elif member.isreg():
            content = tar.extractfile(member)
            assert content is not None
            unpacked.write(member.name, content)
        elif member.issym():
            unpacked.later(member.name, member.linkname)
        elif member.islnk():
            unpacked.hard(member.name, member.linkname)
        else:
            raise LoadFailed(f"{archive.name}: '{member.name}' is neither a file nor a folder")


def _unpack_zip(archive: Path, unpacked: _Unpacked) -> None:
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                unpacked.folder(member.filename)
            elif kind in (0, stat.S_IFREG):
                with zipped.open(member) as content:
                    unpacked.write(member.filename, _Counted(content, unpacked))
            else:
                raise LoadFailed(f"{archive.name}: '{member.filename}' is neither a file nor a folder")
