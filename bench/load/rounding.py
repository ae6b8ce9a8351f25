"""An expected answer whose last values may be rounded in another way: a network's, computed in batches of any size."""

from __future__ import annotations

import struct
from math import isclose
from typing import Final, Self

RELATIVE: Final = 1e-5
ABSOLUTE: Final = 1e-6


class RoundedAnswer(bytes):
    """An answer ending in ``values`` floats (little endian); equal to those that differ from it by rounding alone.

    ``code`` is struct's: ``f`` for FP32, ``d`` for FP64.

    An answer found equal is remembered, and a matrix product rounds in a few ways only: nearly every comparison is a
    look into a set.
    """

    _values: struct.Struct
    _accepted: set[bytes]

    def __new__(cls, answer: bytes, values: int, code: str = "f") -> Self:
        """Of an answer that is right."""
        self = super().__new__(cls, answer)
        self._values = struct.Struct(f"<{values}{code}")
        self._accepted = {bytes(answer)}
        return self

    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        return not self != other

    def __ne__(self, other: object) -> bool:
        """What the loops ask; as this is a subclass, it is asked whichever side of the operator it stands on."""
        if not isinstance(other, bytes):
            return True
        if other in self._accepted:
            return False
        head = len(self) - self._values.size
        if len(other) != len(self) or other[:head] != self[:head]:
            return True
        pairs = zip(self._values.unpack(other[head:]), self._values.unpack(self[head:]), strict=True)
        if not all(isclose(found, right, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for found, right in pairs):
            return True
        self._accepted.add(other)
        return False


def rounded(answer: bytes, values: int, code: str = "f") -> bytes:
    """The answer, the last ``values`` floats of which may be rounded in another way; 0: it must come as it is."""
    return RoundedAnswer(answer, values, code) if values else answer
