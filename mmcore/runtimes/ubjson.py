"""Reads the UBJSON that XGBoost writes of its own models: typed arrays of numbers come as numpy arrays.

Only what the library writes is known (Universal Binary JSON, draft 12, of which it uses objects without counts, counted
and typed arrays, strings, numbers and constants). It is no reader for files of others.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np

_NUMBERS: Final = {
    code: np.dtype(name)
    for code, name in zip(b"iUIlLdD", (">i1", ">u1", ">i2", ">i4", ">i8", ">f4", ">f8"), strict=True)
}
_CONSTANTS: Final = {ord("Z"): None, ord("T"): True, ord("F"): False}
_LENGTH: Final = struct.Struct(">q")


def read(content: bytes) -> Any:
    """The value that ``content`` encodes.

    Raises:
        ValueError: it is something that XGBoost does not write.
    """
    return _value(content, 1, content[0])[0]


def _value(content: bytes, at: int, kind: int) -> tuple[Any, int]:
    """The value of a kind that begins at ``at``, and where it ends."""
    if kind in _NUMBERS:
        dtype = _NUMBERS[kind]
        return np.frombuffer(content, dtype, 1, at)[0].item(), at + dtype.itemsize
    if kind == ord("S"):
        return _text(content, at + 1)
    if kind == ord("{"):
        return _object(content, at)
    if kind == ord("["):
        return _array(content, at)
    if kind in _CONSTANTS:
        return _CONSTANTS[kind], at
    raise ValueError(f"byte {at - 1}: {chr(kind)!r} is no kind of value that XGBoost writes")


def _text(content: bytes, at: int) -> tuple[str, int]:
    """A text whose length, of eight bytes, begins at ``at``."""
    begin = at + _LENGTH.size
    end = begin + _LENGTH.unpack_from(content, at)[0]
    return content[begin:end].decode(), end


def _object(content: bytes, at: int) -> tuple[dict[str, Any], int]:
    found = {}
    while content[at] != ord("}"):
        key, at = _text(content, at + 1)
        found[key], at = _value(content, at + 1, content[at])
    return found, at + 1


def _array(content: bytes, at: int) -> tuple[Any, int]:
    dtype = None
    if content[at] == ord("$"):
        dtype = _NUMBERS[content[at + 1]]
        at += 2
    if content[at] != ord("#"):
        found = []
        while content[at] != ord("]"):
            value, at = _value(content, at + 1, content[at])
            found.append(value)
        return found, at + 1
    length = _LENGTH.unpack_from(content, at + 2)[0]
    at += 2 + _LENGTH.size
    if dtype is not None:
        return np.frombuffer(content, dtype, length, at), at + length * dtype.itemsize
    values = []
    for _ in range(length):
        value, at = _value(content, at + 1, content[at])
        values.append(value)
    return values, at
