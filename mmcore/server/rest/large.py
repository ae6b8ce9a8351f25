"""Large JSON, read and written in a thread without keeping the event loop from its turn.

orjson holds the interpreter while it works: 16 MiB of numbers would stop every other request for a tenth of a second.
So the numbers of tensors are taken out of the text first and read piece by piece, and those of an answer written so,
each piece within some hundred microseconds and the interpreter given away in between.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from mmcore.server.rest.tensors import loads, numbers

#: Texts from this length on are read in a thread, and arrays from so many elements on are written in one.
LARGE_BYTES: Final = 128 * 1024
LARGE_ELEMENTS: Final = 16384
_PIECE_BYTES: Final = 65536

_DATA: Final = re.compile(rb'"data"\s*:\s*\[')
#: Between elements, where brackets only nest.
_NESTING: Final = bytes.maketrans(b"[]", b"  ")


class Numbers:
    """The elements of one tensor, still as text: from ``start`` to ``end``, brackets included."""

    def __init__(self, text: bytes, start: int, end: int) -> None:
        self._text = text
        self._start = start
        self._end = end

    def raw(self, where: str, datatype: str) -> tuple[bytes, int]:
        """Raw contents and the number of elements. Errors as :func:`mmcore.server.rest.tensors.numbers` has them."""
        pieces: list[bytes] = []
        count = 0
        for piece in self._pieces():
            values = loads(b"[%b]" % piece.translate(_NESTING))
            count += len(values)
            pieces.append(numbers(where, datatype, values))
            time.sleep(0)
        return b"".join(pieces), count

    def _pieces(self) -> Iterator[bytes]:
        start = self._start
        while start + _PIECE_BYTES < self._end:
            end = self._text.find(b",", start + _PIECE_BYTES, self._end)
            if end < 0:
                break
            yield self._text[start:end]
            start = end + 1
        yield self._text[start : self._end]


def without_numbers(text: bytes) -> tuple[bytes, list[Numbers]]:
    """The document with an index in place of each tensor's numbers, and those.

    A key ``"data"`` whose value is an array without strings and objects holds a tensor's numbers. Text between quotes
    cannot look like one: its own quotes are escaped.
    """
    kept: list[bytes] = []
    found: list[Numbers] = []
    at = search = 0
    while match := _DATA.search(text, search):
        start = match.end() - 1
        brace = text.find(b"}", start)
        quote = text.find(b'"', start, brace)
        end = text.rfind(b"]", start, quote if quote >= 0 else brace) + 1
        if end <= start or text.count(b"[", start, end) != text.count(b"]", start, end):
            # Strings, whose text may hold anything; orjson is quick with those.
            search = match.end()
            continue
        kept += (text[at:start], b"%d" % len(found))
        found.append(Numbers(text, start, end))
        at = search = end
    return b"".join((*kept, text[at:])), found


def written(values: NDArray[Any]) -> orjson.Fragment:
    """The JSON array of a flat array's elements, all finite."""
    pieces = []
    for start in range(0, len(values), LARGE_ELEMENTS):
        piece = np.ascontiguousarray(values[start : start + LARGE_ELEMENTS])
        pieces.append(orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
        time.sleep(0)
    return orjson.Fragment(b"[%b]" % b",".join(pieces))
