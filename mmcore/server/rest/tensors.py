"""Tensors in JSON: their elements to raw contents and back.

Elements come flat or nested, row-major, and go out flat (Open Inference Protocol, tensor data). Numbers must fit the
datatype; those for floating point are rounded to it, and are out of range as Infinity. JSON has no word for what is not
finite: ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` stand for it in both directions, as in protobuf's JSON, and null
for NaN and Python's bare words are taken as well. BYTES are strings in UTF-8, or in base64 where the tensor's parameter
``content_type`` says ``base64``, or lists of byte values; they go out as UTF-8 if all of a tensor's elements are that,
otherwise all as base64.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from math import inf, nan, prod
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from mmcore._ext.tensor import array_to_raw
from mmcore.errors import InvalidRequest

#: V2 datatype to the type code of :mod:`array`, which takes no number that does not fit.
_CODES: Final = {
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "FP16": "d", "BF16": "f", "FP32": "f", "FP64": "d",
}  # fmt: skip
_FLOATS: Final = frozenset({"FP16", "BF16", "FP32", "FP64"})
_WORDS: Final[dict[Any, float]] = {None: nan, "NaN": nan, "Infinity": inf, "-Infinity": -inf}
BASE64: Final = frozenset({"base64", "b64"})


def loads(text: bytes | bytearray | memoryview) -> Any:
    """A JSON document.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        found = bytes(text)
        if b"NaN" in found or b"Infinity" in found:
            # Python's json and RapidJSON write these words without quotes.
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(found)
        raise InvalidRequest(f"malformed JSON: {error}") from None


def raw_of(where: str, datatype: str, shape: Sequence[int], data: object, *, encoded: bool = False) -> bytes:
    """The raw contents of a tensor whose elements came as JSON; ``encoded``: its BYTES are in base64.

    Raises:
        InvalidRequest: an element does not fit the datatype, or there are more or fewer than the shape says; begins
            with ``where``.
    """
    if not isinstance(data, list):
        raise InvalidRequest(f"{where}: expected data to be an array, got {_kind(data)}")
    if datatype == "BYTES":
        elements = list(_byte_elements(where, data, encoded=encoded))
        check_count(where, shape, len(elements))
        return b"".join([part for element in elements for part in (struct.pack("<I", len(element)), element)])
    values = flattened(where, data)
    check_count(where, shape, len(values))
    return numbers(where, datatype, values)


def check_count(where: str, shape: Sequence[int], got: int) -> None:
    """Raise InvalidRequest where a shape has another number of elements."""
    if got != prod(shape):
        raise InvalidRequest(f"{where}: expected {prod(shape)} elements for shape {list(shape)}, got {got}")


def flattened(where: str, data: list[Any]) -> list[Any]:
    """The elements of nested lists, row-major."""
    while data and isinstance(data[0], list):
        if not all(isinstance(one, list) for one in data):
            raise InvalidRequest(f"{where}: expected data nested to one depth, got arrays beside elements")
        data = list(chain.from_iterable(data))
    return data


def numbers(where: str, datatype: str, values: list[Any]) -> bytes:
    """The raw contents of flat elements, of any datatype but BYTES."""
    if datatype == "BOOL":
        return _bools(where, values)
    code = _CODES.get(datatype)
    if code is None:
        raise InvalidRequest(f"{where}: expected a V2 datatype, got '{datatype}'")
    try:
        found = array(code, values)
    except OverflowError:
        raise InvalidRequest(f"{where}: expected numbers that fit {datatype}, got one that does not") from None
    except TypeError:
        found = array(code, [_number(where, datatype, value) for value in values])
    if datatype == "FP16":
        with np.errstate(over="ignore"):
            return np.frombuffer(found, np.float64).astype(np.float16).tobytes() if found else b""
    if datatype == "BF16":
        return bytes(array_to_raw(datatype, np.frombuffer(found, np.float32))) if found else b""
    return found.tobytes()


def _number(where: str, datatype: str, value: object) -> float:
    """One of the words for what is not finite; an element of another kind is refused."""
    if datatype in _FLOATS:
        if isinstance(value, int | float):
            return value
        if value is None or isinstance(value, str):
            word = _WORDS.get(value)
            if word is not None:
                return word
    elif isinstance(value, int):
        return value
    raise InvalidRequest(f"{where}: expected numbers for {datatype}, got {_kind(value)}")


def _bools(where: str, values: list[Any]) -> bytes:
    for value in values:
        if not isinstance(value, int) or value not in (0, 1):
            raise InvalidRequest(f"{where}: expected true or false for BOOL, got {_kind(value)}")
    return bytes(values)


def _byte_elements(where: str, data: list[Any], *, encoded: bool) -> Iterable[bytes]:
    for element in data:
        if isinstance(element, str):
            try:
                yield base64.b64decode(element, validate=True) if encoded else element.encode()
            except ValueError as error:  # no base64, or half of a surrogate pair
                raise InvalidRequest(f"{where}: {error}") from None
        elif not isinstance(element, list):
            raise InvalidRequest(f"{where}: expected strings for BYTES, got {_kind(element)}")
        elif element and all(isinstance(value, int) for value in element):
            try:
                yield bytes(element)
            except ValueError:
                raise InvalidRequest(f"{where}: expected byte values from 0 to 255") from None
        else:
            yield from _byte_elements(where, element, encoded=encoded)


def _kind(value: object) -> str:
    """A value in an error's text: what it is, and itself where it is short."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    return f"{value!r}"[:64]


def elements_of(datatype: str, values: NDArray[Any]) -> tuple[list[Any] | NDArray[Any], bool]:
    """An output's elements as orjson takes them, flat, and whether they are BYTES in base64."""
    flat = values.reshape(-1)
    if datatype == "BYTES":
        elements = [one if isinstance(one, bytes) else str(one).encode() for one in flat.tolist()]
        try:
            return [element.decode() for element in elements], False
        except UnicodeDecodeError:
            return [base64.b64encode(element).decode("ascii") for element in elements], True
    if flat.dtype.kind == "f":
        finite = np.isfinite(flat)
        if not finite.all():
            # orjson writes the shortest number that is the same in the array's own precision.
            found = orjson.loads(orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY))
            for at in np.flatnonzero(~finite).tolist():
                found[at] = "NaN" if np.isnan(flat[at]) else "Infinity" if flat[at] > 0 else "-Infinity"
            return found, False
    return flat, False
