"""Compressed bodies: gzip and deflate, both ways, in a thread and bounded."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from mmcore.errors import InvalidRequest
from mmcore.server.rest.large import LARGE_BODY_BYTES
from mmcore.server.rest.request import Part, Request

#: Window sizes as zlib reads them: gzip's frame, zlib's, none.
_GZIP: Final = 31
_ZLIB: Final = 15
_BARE: Final = -15


class TooLong(Exception):
    """A body decompresses to more than may come."""


class Coding(NamedTuple):
    """One way to compress an answer."""

    name: bytes
    window: int

    def compress(self, parts: Sequence[Part]) -> bytes:
        """The parts as one compressed body; quick rather than small."""
        work = zlib.compressobj(1, zlib.DEFLATED, self.window)
        return b"".join([*map(work.compress, parts), work.flush()])


_CODINGS: Final = {b"gzip": Coding(b"gzip", _GZIP), b"deflate": Coding(b"deflate", _ZLIB)}


def encoded(request: Request) -> Coding | None:
    """How the answer is to be compressed: only for a client that names one coding and no other.

    The lists that HTTP libraries send by themselves leave it as it is: to compress a tensor takes longer than to send
    it.
    """
    accepted = request.headers.get(b"accept-encoding")
    return _CODINGS.get(accepted.strip().lower()) if accepted is not None else None


async def decoded(request: Request, limit: int) -> bytes | bytearray:
    """The body, decompressed.

    Raises:
        InvalidRequest: the coding is not known, or the body is not in it.
        TooLong: it would have more than ``limit`` bytes.
    """
    if request.length > LARGE_BODY_BYTES:
        await asyncio.to_thread(request.gather)
    coding = request.headers.get(b"content-encoding", b"identity").strip().lower()
    if coding in (b"identity", b""):
        return request.body
    if coding not in _CODINGS:
        raise InvalidRequest(f"content-encoding '{coding.decode('latin-1')}' is not served; gzip and deflate are")
    return await asyncio.to_thread(_decompressed, request.body, coding, limit)


def _decompressed(body: bytes | bytearray, coding: bytes, limit: int) -> bytes:
    # What HTTP calls deflate has zlib's frame; some send it bare.
    windows = (_GZIP,) if coding == b"gzip" else (_ZLIB, _BARE)
    for window in windows:
        work = zlib.decompressobj(window)
        try:
            found = work.decompress(body, limit + 1)
        except zlib.error as error:
            problem = str(error)
            continue
        if len(found) > limit:
            raise TooLong(f"the body decompresses to more than the limit of {limit} bytes")
        if not work.eof:
            problem = "it ends too early"
            continue
        return found
    raise InvalidRequest(f"the body is no {coding.decode()}: {problem}")
