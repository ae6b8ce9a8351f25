"""Digests that stores tell of their objects, and how what comes is summed up beside them.

CRCs cost a hundredth of what MD5 does, which takes as long as downloading on one core; that an object is the one it was
is told by its tag, so it is faults that a digest has to find. S3's are in
https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Protocol

#: CRCs by the name that the library has for them.
_CRCS: Final = {"crc64nvme": "CRC64-NVME", "crc32c": "CRC32C", "crc32": "CRC32"}
#: All that can be checked, the cheapest first.
ALGORITHMS: Final = (*_CRCS, "sha1", "sha256", "md5")


@dataclass(frozen=True, slots=True)
class Digest:
    """What a store says of an object's bytes.

    Attributes:
        algorithm: one of :data:`ALGORITHMS`.
        value: in hex; with ``-N`` behind it, it is the digest of the digests of N pieces.
        piece_bytes: the size of each piece but the last; 0 where it is not known.
    """

    algorithm: str
    value: str
    piece_bytes: int = 0

    @property
    def pieces(self) -> int:
        """How many pieces it was made from; 0 where it is one of all bytes."""
        return int(self.value.partition("-")[2] or 0)

    @property
    def joins(self) -> bool:
        """Whether it can be told from sums of parts that were made apart."""
        return self.algorithm in _CRCS and not self.pieces


class Sum(Protocol):
    """Bytes summed up in their order."""

    def update(self, data: bytes | memoryview, /) -> None:
        """The next bytes."""

    def digest(self) -> bytes:
        """The digest of those so far."""


class _Crc:
    """The CRC of bytes, and of others that are joined to them."""

    def __init__(self, algorithm: str) -> None:
        self._model = _model(algorithm)
        self._bytes = 8 if algorithm == "crc64nvme" else 4
        self.value: int = self._model.calc(b"")

    def update(self, data: bytes | memoryview, /) -> None:
        self.value = self._model.calc(data, self.value)

    def join(self, other: _Crc, count: int) -> None:
        """Take the ``count`` bytes that another has summed up for those that come next."""
        self.value = self._model.combine(self.value, other.value, count)

    def digest(self) -> bytes:
        return self.value.to_bytes(self._bytes, "big")


def begin(algorithm: str) -> Sum:
    """The sum of no bytes."""
    return _Crc(algorithm) if algorithm in _CRCS else hashlib.new(algorithm, usedforsecurity=False)


def joined(algorithm: str, parts: Iterable[tuple[Sum, int]]) -> str:
    """The CRC of parts that come one after the other, in hex, from the sum and number of bytes of each."""
    whole = _Crc(algorithm)
    for part, count in parts:
        assert isinstance(part, _Crc)
        whole.join(part, count)
    return whole.digest().hex()


def of_pieces(algorithm: str, pieces: Iterable[bytes]) -> str:
    """The digest of pieces' digests, as :attr:`Digest.value` tells it."""
    told = list(pieces)
    whole = begin(algorithm)
    whole.update(b"".join(told))
    return f"{whole.digest().hex()}-{len(told)}"


@cache
def _model(algorithm: str) -> Any:
    import anycrc

    return anycrc.Model(_CRCS[algorithm])
