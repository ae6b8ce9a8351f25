"""How much memory a version will take, told before it is loaded: as equal files did, else by their length and format.

Equal files are told by a digest of their lengths and of the first and last bytes of each: cheap to take, the same for
copies of a model, and wherever it does not tell two apart they are of the same size in memory. What is learned can be
kept in a file from one start to the next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Final

from mmcore.model import ModelSource
from mmcore.runtimes.size import files_of

log = logging.getLogger(__name__)

#: Sizes remembered; the least recently needed is forgotten.
MOST: Final = 100_000
_SAMPLE_BYTES: Final = 4096
_DIGEST_BYTES: Final = 12
#: What a new size counts for in a format's overhead.
_WEIGHT: Final = 1 / 8


class Files:
    """A version's files as far as their size in memory goes. Blocking to make.

    Attributes:
        length: their bytes together.
        digest: equal for equal files.
        predicted: what a runtime says that they will take; None where none says anything.
    """

    __slots__ = ("digest", "length", "predicted")

    def __init__(self, source: ModelSource) -> None:
        digest = hashlib.blake2b(source.format.encode(), digest_size=_DIGEST_BYTES)
        self.length = 0
        self.predicted: int | None = None
        for file in files_of(source.path):
            with file.open("rb") as content:
                length = os.fstat(content.fileno()).st_size
                digest.update(b"%d:" % length + content.read(_SAMPLE_BYTES))
                if length > 2 * _SAMPLE_BYTES:
                    content.seek(-_SAMPLE_BYTES, os.SEEK_END)
                    digest.update(content.read(_SAMPLE_BYTES))
            self.length += length
        self.digest = digest.hexdigest()


class Sizes:
    """The sizes of versions loaded before, by digest, and what those of each format take beyond their files.

    ``path`` is the file that keeps them; None keeps nothing. Called on the loop, but for :meth:`save`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: OrderedDict[str, int] = OrderedDict()
        #: By format: bytes in memory beyond those on disk.
        self._overhead: dict[str, float] = {}
        if path is not None and path.exists():
            self._read(path)

    def predict(self, source: ModelSource, files: Files) -> int:
        """Bytes that it will take: stated, or measured before, or its length and what its format takes beyond that."""
        stated = source.settings.size_bytes
        if stated is not None:
            return stated
        known = self._known.get(files.digest)
        if known is not None:
            self._known.move_to_end(files.digest)
            return known
        if files.predicted is not None:
            return files.predicted
        return max(0, int(files.length + self._overhead.get(source.format, 0.0)))

    def learn(self, source: ModelSource, files: Files, size: int) -> None:
        """It took so much."""
        if source.settings.size_bytes is not None:
            return
        new = files.digest not in self._known
        self._known[files.digest] = size
        self._known.move_to_end(files.digest)
        if len(self._known) > MOST:
            self._known.popitem(last=False)
        if new:
            before = self._overhead.get(source.format)
            now = float(size - files.length)
            self._overhead[source.format] = now if before is None else before + (now - before) * _WEIGHT

    def save(self) -> None:
        """Write them to the file, whole or not at all; what goes wrong is logged. Blocking."""
        if self._path is None:
            return
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps({"overhead": self._overhead, "sizes": self._known}), encoding="utf-8")
            partial.replace(self._path)
        except OSError as error:
            log.warning("the sizes of models were not kept in %s: %s", self._path, error.strerror)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self._known.update((str(digest), int(size)) for digest, size in content["sizes"].items())
            self._overhead.update((str(name), float(more)) for name, more in content["overhead"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("the sizes of models in %s were not read: %s", path, error)
