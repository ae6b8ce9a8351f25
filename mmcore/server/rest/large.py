"""Large JSON, read and written in a thread without keeping the event loop from its turn.

orjson holds the interpreter while it works: 16 MiB of numbers would stop every other request for a tenth of a second.
So the numbers of tensors are taken out of the text first and read piece by piece, and those of an answer written so,
each piece within some hundred microseconds and the interpreter given away in between. Nothing of the length of a body
is copied, or looked through, in one go.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from mmcore.errors import InvalidRequest
from mmcore.server.rest.tensors import elements_of, loads, numbers

#: Texts from this length on are read in a thread, and arrays from so many elements on are written in one.
LARGE_BYTES: Final = 128 * 1024
LARGE_ELEMENTS: Final = 16384
#: Bodies from this length on are put together in a thread too, whatever is in them.
LARGE_BODY_BYTES: Final = 2**20
_PIECE_BYTES: Final = 65536
#: What is looked through in one go.
_STEP_BYTES: Final = 2**20
#: Stands for a large array in a document; within JSON it is always escaped.
_GAP: Final = b"\x00"

#: More dimensions than any framework's tensors have are none.
_MOST_DIMENSIONS: Final = 64
#: Everything but the marks of nesting.
_ELEMENTS: Final = bytes(set(range(256)) - set(b"[],"))
#: Between elements, where brackets only nest.
_NESTING: Final = bytes.maketrans(b"[]", b"  ")


class Numbers:
    """The elements of one tensor, still as text: from ``start`` to ``end``, brackets included."""

    def __init__(self, text: bytes | bytearray, start: int, end: int) -> None:
        self._text = text
        self._start = start
        self._end = end

    def raw(self, where: str, datatype: str) -> tuple[bytes, int]:
        """Raw contents and the number of elements. Errors as :func:`mmcore.server.rest.tensors.numbers` has them."""
        pieces: list[bytes] = []
        count = 0
        for piece in self._pieces():
            values = loads(b"".join((b"[", piece.translate(_NESTING), b"]")))
            count += len(values)
            pieces.append(numbers(where, datatype, values))
            time.sleep(0)
        return b"".join(pieces), count

    def shape(self, where: str) -> list[int]:
        """The sizes of the nested arrays, told by nothing but their brackets and commas.

        Raises:
            InvalidRequest: arrays of one depth differ in length; begins with ``where``.
        """
        marks = b"".join(
            self._text[at : min(at + _STEP_BYTES, self._end)].translate(None, _ELEMENTS)
            for at in _steps(self._start, self._end)
        )
        depth = len(marks) - len(marks.lstrip(b"["))
        shape: list[int] = []
        one = b""  # what an element of the arrays of this level looks like
        for level in range(1, min(depth, _MOST_DIMENSIONS) + 1):
            length = marks.find(b"]" * level) + level - (depth - level)
            size = (length - 1) // (len(one) + 1)
            one = b"[" + ((one + b",") * size)[:-1] + b"]"
            shape.insert(0, size)
        if marks != one:
            raise InvalidRequest(f"{where}: expected arrays of one length at each depth")
        return shape

    def _pieces(self) -> Iterator[bytes | bytearray]:
        start = self._start
        while start + _PIECE_BYTES < self._end:
            end = self._text.find(b",", start + _PIECE_BYTES, self._end)
            if end < 0:
                break
            yield self._text[start:end]
            start = end + 1
        yield self._text[start : self._end]


def without_numbers(
    text: bytes | bytearray, keys: Iterable[str] = ("data",), stand_in: bytes = b"%d"
) -> tuple[bytes, list[Numbers]]:
    """The document with ``stand_in`` and an index in it in place of each tensor's numbers, and those.

    One of the keys whose value is an array without strings and objects holds a tensor's numbers. Text between quotes
    cannot look like one: its own quotes are escaped.
    """
    begin = re.compile(rb"(?:" + b"|".join(re.escape(orjson.dumps(key)) for key in keys) + rb")\s*:\s*\[")
    kept: list[bytes | bytearray] = []
    found: list[Numbers] = []
    at = search = 0
    while match := begin.search(text, search):
        start = match.end() - 1
        quote = _find(text, b'"', start, len(text))
        end = text.rfind(b"]", start, _find(text, b"}", start, quote)) + 1
        if end <= start or _count(text, b"[", start, end) != _count(text, b"]", start, end):
            # Strings, whose text may hold anything; orjson is quick with those.
            search = match.end()
            continue
        kept += (text[at:start], stand_in % len(found))
        found.append(Numbers(text, start, end))
        at = search = end
    return b"".join((*kept, text[at:])), found


def _find(text: bytes | bytearray, byte: bytes, start: int, end: int) -> int:
    """Where a byte is first between two places; the second of these if nowhere."""
    for at in _steps(start, end):
        found = text.find(byte, at, min(at + _STEP_BYTES, end))
        if found >= 0:
            return found
    return end


def _count(text: bytes | bytearray, byte: bytes, start: int, end: int) -> int:
    return sum(text.count(byte, at, min(at + _STEP_BYTES, end)) for at in _steps(start, end))


def _steps(start: int, end: int) -> Iterator[int]:
    """Where each step of a long look begins; others have their turns in between."""
    for at in range(start, end, _STEP_BYTES):
        if at > start:
            time.sleep(0)
        yield at


class Writing:
    """A JSON document with large arrays in it, as the pieces that go out one behind the other."""

    def __init__(self) -> None:
        self._large: list[list[bytes]] = []

    def elements(self, datatype: str, values: NDArray[Any]) -> orjson.Fragment:
        """What stands in the document for the elements of a flat array of numbers."""
        pieces: list[bytes] = []
        for start in range(0, len(values), LARGE_ELEMENTS):
            piece, _ = elements_of(datatype, np.ascontiguousarray(values[start : start + LARGE_ELEMENTS]))
            pieces += (b",", orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
            time.sleep(0)
        self._large.append([b"[", *pieces[1:], b"]"])
        return orjson.Fragment(_GAP)

    def pieces(self, document: object) -> list[bytes]:
        """The whole document."""
        text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
        if not self._large:
            return [text]
        first, *rest = text.split(_GAP)
        return [first, *(piece for large, part in zip(self._large, rest, strict=True) for piece in (*large, part))]
