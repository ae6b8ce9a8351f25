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
_SCALARS: Final = {
    code: struct.Struct(name) for code, name in zip(b"iUIlLdD", (">b", ">B", ">h", ">i", ">q", ">f", ">d"), strict=True)
}
_CONSTANTS: Final = {ord("Z"): None, ord("T"): True, ord("F"): False}
_LENGTH: Final = struct.Struct(">q")
_length_at: Final = _LENGTH.unpack_from
_TEXT: Final = ord("S")
_LONG: Final = ord("L")
_OBJECT, _OBJECT_END = b"{}"
_ARRAY, _ARRAY_END = b"[]"
_OF_KIND, _COUNTED = b"$#"


def read(content: bytes) -> Any:
    """The value that ``content`` encodes.

    Raises:
        ValueError: it is something that XGBoost does not write.
    """
    return _value(content, 1, content[0])[0]


def _value(content: bytes, at: int, kind: int) -> tuple[Any, int]:
    """The value of a kind that begins at ``at``, and where it ends."""
    if kind == _ARRAY:
        return _array(content, at)
    if kind == _TEXT:
        begin = at + 9
        end = begin + _length(content, at)
        return content[begin:end].decode(), end
    if kind == _OBJECT:
        return _object(content, at)
    scalar = _SCALARS.get(kind)
    if scalar is not None:
        return scalar.unpack_from(content, at)[0], at + scalar.size
    if kind in _CONSTANTS:
        return _CONSTANTS[kind], at
    raise ValueError(f"byte {at - 1}: {chr(kind)!r} is no kind of value that XGBoost writes")


def _object(content: bytes, at: int) -> tuple[dict[str, Any], int]:
    """Keys are texts without their kind: a length of eight bytes that follows its own kind."""
    found: dict[str, Any] = {}
    while content[at] != _OBJECT_END:
        begin = at + 9
        at = begin + _length(content, at)
        key = content[begin:at].decode()
        if content[at] == _ARRAY and content[at + 1] == _OF_KIND:
            # Most of what there is, without two calls.
            found[key], at = _numbers(content, at + 2)
        else:
            found[key], at = _value(content, at + 1, content[at])
    return found, at + 1


def _array(content: bytes, at: int) -> tuple[Any, int]:
    if content[at] == _OF_KIND:
        return _numbers(content, at + 1)
    if content[at] != _COUNTED:
        found = []
        while content[at] != _ARRAY_END:
            value, at = _value(content, at + 1, content[at])
            found.append(value)
        return found, at + 1
    length = _length(content, at + 1)
    at += 2 + _LENGTH.size
    values = []
    for _ in range(length):
        value, at = _value(content, at + 1, content[at])
        values.append(value)
    return values, at


def _numbers(content: bytes, at: int) -> tuple[Any, int]:
    """An array of the kind that stands at ``at``, and where it ends."""
    dtype = _NUMBERS[content[at]]
    if content[at + 1] != _COUNTED:
        raise ValueError(f"byte {at + 1}: an array of one kind has no length")
    length = _length(content, at + 2)
    at += 3 + _LENGTH.size
    return np.frombuffer(content, dtype, length, at), at + length * dtype.itemsize


def _length(content: bytes, at: int) -> int:
    """The length whose kind stands at ``at``."""
    length: int = _length_at(content, at + 1)[0]
    if content[at] != _LONG or length < 0:
        raise ValueError(f"byte {at}: no length as XGBoost writes it")
    return length
