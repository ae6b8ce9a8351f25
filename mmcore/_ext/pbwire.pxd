# Protobuf wire format (protobuf.dev/programming-guides/encoding), as inline C for the codec.
# Readers move a Cursor and answer False on malformed input, the cursor's place then being undefined; they never
# read at or past `end`. They accept what the protobuf runtime accepts, overlong varints included.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    VARINT = 0
    FIXED64 = 1
    LENGTH = 2
    START_GROUP = 3
    END_GROUP = 4
    FIXED32 = 5

cdef struct Cursor:
    const uint8_t* at
    const uint8_t* end

cdef struct Span:      # a place in a message; 32 bits, as no protobuf message exceeds 2 GiB
    uint32_t at
    uint32_t size

cdef bint skip_group(Cursor* cursor, uint32_t field, int depth) noexcept nogil
cdef bint valid_utf8(const uint8_t* at, Py_ssize_t size) noexcept nogil
cdef bytes length_field(uint32_t field, bytes value)
cdef Py_ssize_t prefix_start(const uint8_t* base, Span span) noexcept


cdef inline bint read_varint(Cursor* cursor, uint64_t* value) noexcept nogil:
    cdef uint64_t result = 0
    cdef uint32_t shift = 0
    cdef uint8_t byte
    value[0] = 0
    if cursor.at < cursor.end and cursor.at[0] < 0x80:
        value[0] = cursor.at[0]
        cursor.at += 1
        return True
    while cursor.at < cursor.end and shift < 70:
        byte = cursor.at[0]
        cursor.at += 1
        result |= <uint64_t>(byte & 0x7F) << shift    # the tenth byte's upper bits fall off, as in the runtime
        if byte < 0x80:
            value[0] = result
            return True
        shift += 7
    return False


cdef inline bint read_short_varint(Cursor* cursor, uint64_t limit, uint32_t* value) noexcept nogil:
    # Tags and lengths: five bytes at most, and no more than `limit`.
    cdef uint64_t result = 0
    cdef uint32_t shift = 0
    cdef uint8_t byte
    while cursor.at < cursor.end and shift < 35:
        byte = cursor.at[0]
        cursor.at += 1
        result |= <uint64_t>(byte & 0x7F) << shift
        if byte < 0x80:
            value[0] = <uint32_t>result
            return result <= limit
        shift += 7
    return False


cdef inline bint read_tag(Cursor* cursor, uint32_t* field, uint32_t* wire) noexcept nogil:
    cdef uint32_t tag
    if not read_short_varint(cursor, 0xFFFFFFFF, &tag):
        return False
    field[0] = tag >> 3
    wire[0] = tag & 7
    return field[0] != 0


cdef inline bint read_length(Cursor* cursor, Cursor* inner) noexcept nogil:
    # Set `inner` to the length-delimited value and move past it.
    cdef uint32_t size
    inner.at = inner.end = cursor.end
    if not read_short_varint(cursor, 0x7FFFFFFF, &size) or size > <size_t>(cursor.end - cursor.at):
        return False
    inner.at = cursor.at
    inner.end = cursor.at + size
    cursor.at += size
    return True


cdef inline bint skip_value(Cursor* cursor, uint32_t field, uint32_t wire) noexcept nogil:
    # Step over an unknown field's value.
    cdef uint64_t ignored
    cdef Cursor inner
    if wire == LENGTH:
        return read_length(cursor, &inner)
    if wire == VARINT:
        return read_varint(cursor, &ignored)
    if wire == FIXED32:
        if cursor.end - cursor.at < 4:
            return False
        cursor.at += 4
        return True
    if wire == FIXED64:
        if cursor.end - cursor.at < 8:
            return False
        cursor.at += 8
        return True
    return wire == START_GROUP and skip_group(cursor, field, 100)


cdef inline Py_ssize_t varint_size(uint64_t value) noexcept nogil:
    cdef Py_ssize_t size = 1
    while value >= 0x80:
        value >>= 7
        size += 1
    return size


cdef inline uint8_t* write_varint(uint8_t* at, uint64_t value) noexcept nogil:
    while value >= 0x80:
        at[0] = <uint8_t>(value | 0x80)
        at += 1
        value >>= 7
    at[0] = <uint8_t>value
    return at + 1


cdef inline Py_ssize_t field_size(Py_ssize_t size) noexcept nogil:
    # Of a length-delimited field numbered below 16: tag, length, contents.
    return 1 + varint_size(<uint64_t>size) + size


cdef inline uint8_t* write_bytes(uint8_t* at, uint32_t field, const void* data, Py_ssize_t size) noexcept nogil:
    # A length-delimited field numbered below 16.
    at[0] = <uint8_t>(field << 3 | LENGTH)
    at = write_varint(at + 1, <uint64_t>size)
    memcpy(at, data, <size_t>size)
    return at + size
