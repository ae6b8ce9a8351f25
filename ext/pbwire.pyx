"""Protobuf wire scanning and splicing: find or replace a string in a message without decoding the rest.

A path is a tuple of field numbers; all but the last name submessages. The protobuf rules hold: the last occurrence
of a singular field wins, several occurrences of a submessage are merged, unknown fields and groups are skipped.
Reads borrow the caller's bytes for the time of the call; splices return new bytes.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from mmcore.errors import InvalidRequest

cdef enum:
    MAX_DEPTH = 8
    MAX_FIELD = 536870911    # 2**29 - 1


cdef bint skip_group(Cursor* cursor, uint32_t field, int depth) noexcept nogil:
    """Step past the group's end tag; False when it is missing, of another field, or nested too deeply."""
    cdef uint32_t inner, wire
    if depth <= 0:
        return False
    while cursor.at < cursor.end:
        if not read_tag(cursor, &inner, &wire):
            return False
        if wire == END_GROUP:
            return inner == field
        if wire == START_GROUP:
            if not skip_group(cursor, inner, depth - 1):
                return False
        elif not skip_value(cursor, inner, wire):
            return False
    return False


cdef bint valid_utf8(const uint8_t* at, Py_ssize_t size) noexcept nogil:
    """RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF."""
    cdef const uint8_t* end = at + size
    cdef uint64_t eight
    cdef uint8_t lead, low, high
    cdef int more
    while at < end:
        if end - at >= 8:
            memcpy(&eight, at, 8)
            if not eight & 0x8080808080808080ULL:
                at += 8
                continue
        lead = at[0]
        at += 1
        if lead < 0x80:
            continue
        low, high = 0x80, 0xBF
        if 0xC2 <= lead <= 0xDF:
            more = 1
        elif 0xE0 <= lead <= 0xEF:
            more = 2
            if lead == 0xE0:
                low = 0xA0
            elif lead == 0xED:
                high = 0x9F
        elif 0xF0 <= lead <= 0xF4:
            more = 3
            if lead == 0xF0:
                low = 0x90
            elif lead == 0xF4:
                high = 0x8F
        else:
            return False
        if end - at < more or not low <= at[0] <= high:
            return False
        at += 1
        more -= 1
        while more:
            if at[0] & 0xC0 != 0x80:
                return False
            at += 1
            more -= 1
    return True


cdef struct Place:
    # Where the last occurrence of a path lies; parents are the submessages around it, outermost first.
    Span parents[MAX_DEPTH]
    Span value
    int depth          # parents known: the path's length less one when all exist
    bint found


cdef int read_path(tuple path, uint32_t* fields) except -1:
    """The path as C; its length."""
    cdef Py_ssize_t i, depth = len(path)
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"a path has 1 to {MAX_DEPTH} field numbers, got {depth}")
    for i in range(depth):
        number = path[i]
        if not 1 <= number <= MAX_FIELD:
            raise ValueError(f"field numbers lie between 1 and {MAX_FIELD}, got {number}")
        fields[i] = number
    return <int>depth


cdef bint scan(const uint8_t* base, Cursor cursor, const uint32_t* fields, int level, int depth, Span* parents,
               Place* place) noexcept nogil:
    """Walk one message; False when it or a submessage on the path is malformed."""
    cdef uint32_t field, wire
    cdef Cursor inner
    cdef Span span
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return False
        if field != fields[level] or wire != LENGTH:
            if not skip_value(&cursor, field, wire):
                return False
            continue
        if not read_length(&cursor, &inner):
            return False
        span = Span(<uint32_t>(inner.at - base), <uint32_t>(inner.end - inner.at))
        if level == depth - 1:
            place.value = span
            place.found = True
            place.depth = level
            memcpy(place.parents, parents, sizeof(Span) * MAX_DEPTH)
            continue
        parents[level] = span
        if not place.found and place.depth <= level + 1:
            place.depth = level + 1
            memcpy(place.parents, parents, sizeof(Span) * MAX_DEPTH)
        if not scan(base, inner, fields, level + 1, depth, parents, place):
            return False
    return True


cdef Place locate(bytes message, const uint32_t* fields, int depth) except *:
    cdef Place place
    cdef Span parents[MAX_DEPTH]
    cdef Cursor cursor
    place.found = False
    place.depth = 0
    cursor.at = <const uint8_t*>PyBytes_AS_STRING(message)
    cursor.end = cursor.at + PyBytes_GET_SIZE(message)
    if PyBytes_GET_SIZE(message) > 0x7FFFFFFF:
        raise InvalidRequest(f"a protobuf message has at most 2147483647 bytes, got {PyBytes_GET_SIZE(message)}")
    if not scan(cursor.at, cursor, fields, 0, depth, parents, &place):
        raise InvalidRequest(f"malformed protobuf message of {PyBytes_GET_SIZE(message)} bytes")
    return place


def find_field(bytes message not None, tuple path not None):
    """The place ``(start, end)`` of the length-delimited value at ``path``, the one that counts; None when absent.

    Raises InvalidRequest when the message is malformed, ValueError for a path that cannot be.
    """
    cdef uint32_t fields[MAX_DEPTH]
    cdef int depth = read_path(path, fields)
    cdef Place place = locate(message, fields, depth)
    if not place.found:
        return None
    return place.value.at, place.value.at + place.value.size


def find_string(bytes message not None, tuple path not None):
    """The string at ``path``, ``""`` when absent; InvalidRequest when malformed or not UTF-8."""
    cdef uint32_t fields[MAX_DEPTH]
    cdef int depth = read_path(path, fields)
    cdef Place place = locate(message, fields, depth)
    cdef const char* value = PyBytes_AS_STRING(message) + place.value.at
    if not place.found:
        return ""
    if not valid_utf8(<const uint8_t*>value, place.value.size):
        raise InvalidRequest(f"the string at field {'.'.join(map(str, path))} is not valid UTF-8")
    return value[:place.value.size].decode("utf-8")


cdef bytes length_field(uint32_t field, bytes value):
    """Tag, length and contents of a field."""
    cdef uint8_t head[16]
    cdef uint8_t* at = write_varint(head, <uint64_t>field << 3 | LENGTH)
    at = write_varint(at, <uint64_t>PyBytes_GET_SIZE(value))
    return (<const char*>head)[:at - head] + value


cdef Py_ssize_t prefix_start(const uint8_t* base, Span span) noexcept:
    """Where the length prefix of a value begins: back over its varint, which may be overlong."""
    cdef Py_ssize_t at = <Py_ssize_t>span.at - 1
    while at > 0 and base[at - 1] & 0x80:
        at -= 1
    return at


def replace_string(bytes message not None, tuple path not None, str value not None):
    """``message`` with the string at ``path`` set to ``value``, all else byte for byte as it was.

    The occurrence that counts is replaced and the lengths around it are corrected; where it is absent it is appended
    to the innermost submessage of the path that exists, the missing ones around it.
    Raises InvalidRequest when the message is malformed or would pass 2 GiB.
    """
    cdef uint32_t fields[MAX_DEPTH]
    cdef int depth = read_path(path, fields)
    cdef Place place = locate(message, fields, depth)
    cdef const uint8_t* base = <const uint8_t*>PyBytes_AS_STRING(message)
    cdef bytes middle = value.encode("utf-8")
    cdef int level
    cdef Py_ssize_t start, end
    cdef Span parent
    if place.found:
        start, end = prefix_start(base, place.value), place.value.at + place.value.size
        middle = length_prefixed(middle)
    else:
        for level in range(depth - 1, place.depth - 1, -1):
            middle = length_field(fields[level], middle)
        start = end = len(message) if place.depth == 0 else (
            place.parents[place.depth - 1].at + place.parents[place.depth - 1].size
        )
    for level in range(place.depth - 1, -1, -1):    # grow each parent around what was put in
        parent = place.parents[level]
        middle = length_prefixed(message[parent.at:start] + middle + message[end:parent.at + parent.size])
        start, end = prefix_start(base, parent), parent.at + parent.size
    spliced = message[:start] + middle + message[end:]
    if len(spliced) > 0x7FFFFFFF:
        raise InvalidRequest(f"a protobuf message has at most 2147483647 bytes, got {len(spliced)}")
    return spliced


cdef bytes length_prefixed(bytes value):
    cdef uint8_t head[16]
    cdef uint8_t* at = write_varint(head, <uint64_t>PyBytes_GET_SIZE(value))
    return (<const char*>head)[:at - head] + value
