"""gRPC's own notation on top of HTTP/2: timeouts, percent-encoded messages, binary metadata.

Rules: the gRPC project's document "gRPC over HTTP2". Pure functions; no state, any thread.
"""

import binascii
import zlib

from mmcore.errors import MessageTooLong

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t
from libc.string cimport memchr

cdef int64_t[128] UNIT_NS
for _unit, _ns in (
    (b"H", 3600_000_000_000), (b"M", 60_000_000_000), (b"S", 1_000_000_000),
    (b"m", 1_000_000), (b"u", 1_000), (b"n", 1),
):
    UNIT_NS[_unit[0]] = _ns


cdef const unsigned char *UNITS_UPWARDS = b"numSMH"


cdef int64_t timeout_ns(const char *text, size_t length) noexcept:
    """Nanoseconds of a ``grpc-timeout`` value (1 to 8 digits and a unit), -1 when malformed."""
    cdef int64_t value = 0
    cdef size_t i
    cdef unsigned char c
    if length < 2 or length > 9:
        return -1
    for i in range(length - 1):
        c = text[i]
        if c < c"0" or c > c"9":
            return -1
        value = value * 10 + (c - c"0")
    c = text[length - 1]
    if c >= 128 or UNIT_NS[c] == 0:
        return -1
    # 99,999,999 hours do not fit 63 bits of nanoseconds; such a deadline is no deadline.
    if value > 0x7FFFFFFFFFFFFFFF // UNIT_NS[c]:
        return 0x7FFFFFFFFFFFFFFF
    return value * UNIT_NS[c]


def parse_timeout(bytes text not None):
    """Nanoseconds of a ``grpc-timeout`` value, None when it is malformed."""
    cdef int64_t value = timeout_ns(PyBytes_AS_STRING(text), len(text))
    return None if value < 0 else value


def format_timeout(double seconds):
    """``grpc-timeout`` for a duration: rounded up to the finest unit that 8 digits hold."""
    cdef int64_t ns, size, count
    cdef int i
    if seconds <= 0:
        return b"0n"
    if seconds >= 99_999_999 * 3600.0:
        return b"99999999H"
    if seconds >= 9_000_000_000:
        return b"%dH" % (<int64_t>(seconds / 3600) + 1)
    ns = <int64_t>(seconds * 1e9)
    for i in range(6):
        size = UNIT_NS[UNITS_UPWARDS[i]]
        count = (ns + size - 1) // size
        if count <= 99_999_999:
            return b"%d%c" % (count, UNITS_UPWARDS[i])
    return b"99999999H"


cdef bytes percent_encode(str text):
    """``grpc-message`` for a text: UTF-8, bytes outside 0x20–0x7E and ``%`` as ``%XX``."""
    cdef bytes raw = text.encode("utf-8", "replace")
    cdef const unsigned char *source = <const unsigned char *>PyBytes_AS_STRING(raw)
    cdef Py_ssize_t size = len(raw), i, escaped = 0
    cdef unsigned char *out
    cdef unsigned char c
    for i in range(size):
        c = source[i]
        if c < 0x20 or c > 0x7E or c == c"%":
            escaped += 1
    if escaped == 0:
        return raw
    encoded = PyBytes_FromStringAndSize(NULL, size + 2 * escaped)
    out = <unsigned char *>PyBytes_AS_STRING(encoded)
    for i in range(size):
        c = source[i]
        if c < 0x20 or c > 0x7E or c == c"%":
            out[0] = c"%"
            out[1] = b"0123456789ABCDEF"[c >> 4]
            out[2] = b"0123456789ABCDEF"[c & 15]
            out += 3
        else:
            out[0] = c
            out += 1
    return encoded


cdef str percent_cut(str text, Py_ssize_t limit):
    """A text whose percent-encoded form is not above the limit in bytes: cut off, with an ellipsis, where it is."""
    cdef bytes encoded = percent_encode(text)
    cdef Py_ssize_t size = limit - 9
    cdef Py_ssize_t escape
    if len(encoded) <= limit:
        return text
    escape = encoded.rfind(b"%", size - 2, size)
    kept = percent_decode(PyBytes_AS_STRING(encoded), escape if escape >= 0 else size)
    return kept.rstrip("\N{REPLACEMENT CHARACTER}") + "\N{HORIZONTAL ELLIPSIS}"


cdef int hex_digit(unsigned char c) noexcept:
    if c"0" <= c <= c"9":
        return c - c"0"
    c |= 0x20
    if c"a" <= c <= c"f":
        return c - c"a" + 10
    return -1


cdef str percent_decode(const char *text, size_t length):
    """The text of a ``grpc-message``; escapes that are none stay as they are, as the protocol asks."""
    cdef bytes decoded
    cdef unsigned char *out
    cdef size_t i = 0, n = 0
    cdef int high, low
    if length == 0 or memchr(text, c"%", length) == NULL:
        return text[:length].decode("utf-8", "replace")
    decoded = PyBytes_FromStringAndSize(NULL, length)
    out = <unsigned char *>PyBytes_AS_STRING(decoded)
    while i < length:
        if text[i] == c"%" and length - i > 2:
            high = hex_digit(text[i + 1])
            low = hex_digit(text[i + 2])
            if high >= 0 and low >= 0:
                out[n] = <unsigned char>(high * 16 + low)
                n += 1
                i += 3
                continue
        out[n] = text[i]
        n += 1
        i += 1
    return decoded[:n].decode("utf-8", "replace")


def encode_message(str text not None):
    """``grpc-message`` for a text, as bytes."""
    return percent_encode(text)


def decode_message(bytes text not None):
    """The text of a ``grpc-message``."""
    return percent_decode(PyBytes_AS_STRING(text), len(text))


cdef bytes encode_binary(object value):
    """Base64 of a ``-bin`` value, unpadded as the protocol prefers."""
    return binascii.b2a_base64(value, newline=False).rstrip(b"=")


cdef bytes decode_binary(bytes value):
    """Bytes of one ``-bin`` value, padded or not.

    Raises:
        ValueError: it is not base64.
    """
    # Written so because C's remainder of a negative number is negative.
    return binascii.a2b_base64(value + b"=" * ((4 - len(value) % 4) % 4), strict_mode=True)


#: Message encodings taken and given ("gRPC over HTTP2", Message-Encoding); deflate is zlib's format there.
ENCODINGS = frozenset(("identity", "gzip", "deflate"))
cdef dict WINDOW_BITS = {"gzip": 31, "deflate": 15}


def decompress(str encoding not None, bytes data not None, Py_ssize_t limit):
    """A message without its compression.

    Args:
        encoding: ``gzip`` or ``deflate``.
        limit: longest result in bytes; a longer one is not built.

    Raises:
        MessageTooLong: the result is above the limit.
        ValueError: the data are not whole and valid, or something follows them.
    """
    unpacker = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        message = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(message) > limit:
        raise MessageTooLong(f"message is above the limit of {limit} bytes")
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("the compressed data are cut off or have something behind them")
    return message


def compress(str encoding not None, message not None):
    """A message, bytes-like or a list of such, compressed."""
    packer = zlib.compressobj(wbits=WINDOW_BITS[encoding])
    pieces = message if isinstance(message, list) else [message]
    packed = [packer.compress(piece) for piece in pieces]
    packed.append(packer.flush())
    return b"".join(packed)
