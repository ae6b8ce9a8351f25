"""Where everything lies in a ModelInferRequest or ModelInferResponse.

A message is checked once as a whole (wire format, UTF-8, nesting) and noted down as places in its bytes; nothing
becomes a Python object here but names and parameters that are asked for. The protobuf rules hold: the last
occurrence of a singular field wins, submessages are merged, unknown fields are skipped.
"""

from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from mmcore._ext.pbwire cimport (
    FIXED64, LENGTH, VARINT, Cursor, Span, read_length, read_tag, read_varint, skip_value, valid_utf8,
)
from mmcore._ext.tensor cimport MAX_RANK, datatype_code, scan_contents

cdef extern from "Python.h":
    object PyUnicode_DecodeUTF8(const char* text, Py_ssize_t size, const char* errors)
    bint PyUnicode_IS_ASCII(object text)
    void* PyUnicode_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)

cdef enum:
    MAX_TENSORS = 16384     # a message of empty ones would otherwise take thirty times its size
    CACHED_NAMES = 1024
    CACHED_NAME_BYTES = 64


ctypedef PyObject* Borrowed
cdef Borrowed[CACHED_NAMES] names_seen


cdef object text(const uint8_t* at, Py_ssize_t size):
    """A str of bytes known to be UTF-8."""
    if size == 0:
        return ""
    return PyUnicode_DecodeUTF8(<const char*>at, size, NULL)


cdef object cached_text(const uint8_t* at, Py_ssize_t size):
    """As text, for names that come again: the same object each time, its hash already computed."""
    cdef uint64_t head = 0, tail = 0
    cdef uint32_t slot
    cdef PyObject* seen
    if not 0 < size <= CACHED_NAME_BYTES:
        return text(at, size)
    memcpy(&head, at, <size_t>(size if size < 8 else 8))
    if size > 8:
        memcpy(&tail, at + size - 8, 8)
    slot = <uint32_t>((head * 0x9E3779B97F4A7C15ULL + tail * 0xC2B2AE3D27D4EB4FULL + <uint64_t>size) >> 54)
    seen = names_seen[slot]
    if (
        seen != NULL and PyUnicode_GET_LENGTH(<object>seen) == size
        and memcmp(PyUnicode_DATA(<object>seen), at, <size_t>size) == 0
    ):
        return <object>seen
    name = text(at, size)
    if PyUnicode_IS_ASCII(name):
        hash(name)
        Py_INCREF(name)
        names_seen[slot] = <PyObject*>name
        if seen != NULL:
            Py_DECREF(<object>seen)
    return name


cdef void clear(Layout* layout) noexcept:
    """Make a zeroed layout ready to be read into."""
    layout.tensors = layout.inline_tensors
    layout.raws = layout.inline_raws
    layout.dims = layout.inline_dims
    layout.tensor_room = INLINE_TENSORS
    layout.raw_room = INLINE_TENSORS
    layout.dim_room = INLINE_DIMS
    layout.plain = True


cdef void release(Layout* layout) noexcept:
    """Free what outgrew the layout."""
    if layout.tensors != layout.inline_tensors:
        PyMem_Free(layout.tensors)
    if layout.raws != layout.inline_raws:
        PyMem_Free(layout.raws)
    if layout.dims != layout.inline_dims:
        PyMem_Free(layout.dims)


cdef int grow(void** items, void* inlined, int* room, size_t size) except -1:
    """Double an array that starts inside its object."""
    cdef void* grown
    if items[0] == inlined:
        grown = PyMem_Malloc(<size_t>room[0] * 2 * size)
        if grown != NULL:
            memcpy(grown, inlined, <size_t>room[0] * size)
    else:
        grown = PyMem_Realloc(items[0], <size_t>room[0] * 2 * size)
    if grown == NULL:
        raise MemoryError
    items[0] = grown
    room[0] *= 2
    return 0


cdef bint scan_parameter(Cursor cursor, const char** wrong) noexcept:
    """Check an InferParameter."""
    cdef uint32_t field, wire
    cdef Cursor inner
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return False
        if field == STRING_PARAM and wire == LENGTH:
            if not read_length(&cursor, &inner):
                return False
            if not valid_utf8(inner.at, inner.end - inner.at):
                wrong[0] = "a string parameter is not valid UTF-8"
                return False
        elif not skip_value(&cursor, field, wire):
            return False
    return True


cdef bint scan_entry(Cursor cursor, bint* in_shared_memory, const char** wrong) noexcept:
    """Check an entry of a parameters map; note the one which says that a tensor's data lies in shared memory."""
    cdef uint32_t field, wire
    cdef Cursor inner
    cdef bint region = False
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return False
        if field > ENTRY_VALUE or wire != LENGTH:
            if not skip_value(&cursor, field, wire):
                return False
            continue
        if not read_length(&cursor, &inner):
            return False
        if field == ENTRY_VALUE:
            if not scan_parameter(inner, wrong):
                return False
            continue
        if not valid_utf8(inner.at, inner.end - inner.at):
            wrong[0] = "a parameter's name is not valid UTF-8"
            return False
        region = inner.end - inner.at == 20 and memcmp(inner.at, b"shared_memory_region", 20) == 0
    if region:
        in_shared_memory[0] = True
    return True


cdef int read_shape(Layout* layout, TensorPlace* place, Cursor* cursor, uint32_t wire) except -1:
    """Dimensions, packed or one at a time; 0 when malformed."""
    cdef Cursor inner
    cdef uint64_t value
    if wire == LENGTH:
        if not read_length(cursor, &inner):
            return 0
    while wire == VARINT or inner.at < inner.end:
        if not read_varint(cursor if wire == VARINT else &inner, &value):
            return 0
        if place.rank == MAX_RANK:
            layout.wrong = "a tensor has more than 32 dimensions"
            return 0
        if layout.dim_count == layout.dim_room:
            grow(<void**>&layout.dims, layout.inline_dims, &layout.dim_room, sizeof(int64_t))
        layout.dims[layout.dim_count] = <int64_t>value
        layout.dim_count += 1
        place.rank += 1
        if wire == VARINT:
            break
    return 1


cdef int read_tensor(Layout* layout, const uint8_t* base, Cursor cursor) except -1:
    """Note one input or output; 0 when malformed."""
    cdef TensorPlace* place
    cdef uint32_t field, wire
    cdef Cursor inner
    cdef bint in_shared_memory = False
    if layout.tensor_count == MAX_TENSORS:
        layout.wrong = "more than 16384 tensors"
        return 0
    if layout.tensor_count == layout.tensor_room:
        grow(<void**>&layout.tensors, layout.inline_tensors, &layout.tensor_room, sizeof(TensorPlace))
    place = &layout.tensors[layout.tensor_count]
    memset(place, 0, sizeof(TensorPlace))
    layout.tensor_count += 1
    place.message = span_of(base, &cursor)
    place.dims = <uint32_t>layout.dim_count
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return 0
        if field == TENSOR_SHAPE and (wire == LENGTH or wire == VARINT):
            if not read_shape(layout, place, &cursor, wire):
                return 0
            continue
        if field > TENSOR_CONTENTS or wire != LENGTH:
            if not skip_value(&cursor, field, wire):
                return 0
            continue
        if not read_length(&cursor, &inner):
            return 0
        if field == TENSOR_CONTENTS:
            place.flags |= HAS_CONTENTS
            if not scan_contents(inner.at, inner.end - inner.at, &place.kinds, &place.count):
                return 0
        elif field == TENSOR_PARAMETERS:
            place.flags |= HAS_PARAMETERS
            if not scan_entry(inner, &in_shared_memory, &layout.wrong):
                return 0
        elif not valid_utf8(inner.at, inner.end - inner.at):
            layout.wrong = "a tensor's name or datatype is not valid UTF-8"
            return 0
        elif field == TENSOR_NAME:
            place.name = span_of(base, &inner)
        else:
            place.datatype = span_of(base, &inner)
    place.code = datatype_code(<const char*>base + place.datatype.at, place.datatype.size)
    if in_shared_memory:
        place.flags |= IN_SHARED_MEMORY
        layout.shared_memory = True
    if place.flags & HAS_PARAMETERS:
        layout.plain = False
    if place.flags & HAS_CONTENTS:
        layout.typed = True
    return 1


cdef bint scan_requested(Layout* layout, Cursor cursor) noexcept:
    """Check an InferRequestedOutputTensor."""
    cdef uint32_t field, wire
    cdef Cursor inner
    cdef bint ignored = False
    layout.requested_count += 1
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return False
        if field > REQUESTED_PARAMETERS or wire != LENGTH:
            if not skip_value(&cursor, field, wire):
                return False
            continue
        if not read_length(&cursor, &inner):
            return False
        if field == REQUESTED_PARAMETERS:
            layout.plain = False
            if not scan_entry(inner, &ignored, &layout.wrong):
                return False
        elif not valid_utf8(inner.at, inner.end - inner.at):
            layout.wrong = "a requested output's name is not valid UTF-8"
            return False
    return True


cdef int scan_message(Layout* layout, const uint8_t* base, Py_ssize_t size, bint response) except -1:
    cdef Cursor cursor = Cursor(base, base + size)
    cdef Cursor inner
    cdef uint32_t field, wire
    cdef bint ignored = False
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return 0
        if field > <uint32_t>(RESPONSE_RAW if response else REQUEST_RAW) or wire != LENGTH:
            if not skip_value(&cursor, field, wire):
                return 0
            continue
        if not read_length(&cursor, &inner):
            return 0
        if field == TENSORS:
            if not read_tensor(layout, base, inner):
                return 0
        elif field == PARAMETERS:
            layout.has_parameters = True
            if not scan_entry(inner, &ignored, &layout.wrong):
                return 0
        elif field <= MESSAGE_ID:
            if not valid_utf8(inner.at, inner.end - inner.at):
                layout.wrong = "model_name, model_version or id is not valid UTF-8"
                return 0
            if field == MODEL_NAME:
                layout.model_name = span_of(base, &inner)
            elif field == MODEL_VERSION:
                layout.model_version = span_of(base, &inner)
            else:
                layout.id = span_of(base, &inner)
        elif field == REQUESTED and not response:
            if not scan_requested(layout, inner):
                return 0
        else:
            if layout.raw_count == MAX_TENSORS:
                layout.wrong = "more than 16384 raw contents"
                return 0
            if layout.raw_count == layout.raw_room:
                grow(<void**>&layout.raws, layout.inline_raws, &layout.raw_room, sizeof(Span))
            layout.raws[layout.raw_count] = span_of(base, &inner)
            layout.raw_count += 1
    return 1


cdef void align_raw(Layout* layout, bint response) noexcept:
    """Give each tensor that carries its data in the message its raw contents, in order.

    In a response a tensor in shared memory has raw contents too, empty ones, and one with raw contents may have others
    without elements, which MLServer sends.
    """
    cdef TensorPlace* place
    cdef int i, used = 0
    cdef bint placeholders = response and layout.raw_count == layout.tensor_count
    if layout.raw_count == 0:
        return
    for i in range(layout.tensor_count):
        place = &layout.tensors[i]
        if place.flags & IN_SHARED_MEMORY:
            used += placeholders
            continue
        if place.flags & HAS_CONTENTS and (place.kinds or not response):
            layout.problem = MIXED_CONTENTS
            layout.culprit = i
            return
        if used < layout.raw_count:
            place.raw = layout.raws[used]
            place.flags |= HAS_RAW
        used += 1
    if used != layout.raw_count:
        layout.problem = RAW_COUNT
        layout.culprit = used


cdef int read_message(Layout* layout, const uint8_t* base, Py_ssize_t size, bint response) except -1:
    """Note where everything lies; 0 when malformed, ``layout.wrong`` telling what when it is known."""
    if not scan_message(layout, base, size, response):
        return 0
    align_raw(layout, response)
    return 1


cdef Span value_span(const uint8_t* base, Cursor* cursor) noexcept:
    """The length-delimited value at the cursor of a message already checked."""
    cdef Cursor inner
    read_length(cursor, &inner)
    return span_of(base, &inner)


cdef dict read_parameters(const uint8_t* base, Span message, uint32_t number):
    """The map<string, InferParameter> in field ``number`` of a message already checked.

    Entries without a value are left out.
    """
    cdef Cursor cursor = Cursor(base + message.at, base + message.at + message.size)
    cdef Cursor entry, value
    cdef uint32_t field, wire
    cdef Span key, string
    cdef int choice
    cdef uint64_t bits
    cdef double real
    cdef dict found = {}
    while cursor.at < cursor.end and read_tag(&cursor, &field, &wire):
        if field != number or wire != LENGTH:
            skip_value(&cursor, field, wire)
            continue
        read_length(&cursor, &entry)
        key, string = Span(0, 0), Span(0, 0)
        choice, bits = 0, 0
        while entry.at < entry.end and read_tag(&entry, &field, &wire):
            if field == ENTRY_KEY and wire == LENGTH:
                key = value_span(base, &entry)
            elif field == ENTRY_VALUE and wire == LENGTH:
                read_length(&entry, &value)
                while value.at < value.end and read_tag(&value, &field, &wire):
                    if wire == VARINT and (field == BOOL_PARAM or field == INT64_PARAM or field == UINT64_PARAM):
                        read_varint(&value, &bits)
                        choice = <int>field
                    elif wire == FIXED64 and field == DOUBLE_PARAM:
                        memcpy(&bits, value.at, 8)
                        value.at += 8
                        choice = DOUBLE_PARAM
                    elif wire == LENGTH and field == STRING_PARAM:
                        string = value_span(base, &value)
                        choice = STRING_PARAM
                    else:
                        skip_value(&value, field, wire)
            else:
                skip_value(&entry, field, wire)
        name = cached_text(base + key.at, key.size)
        if choice == 0:
            found.pop(name, None)
        elif choice == STRING_PARAM:
            found[name] = text(base + string.at, string.size)
        elif choice == BOOL_PARAM:
            found[name] = bits != 0
        elif choice == INT64_PARAM:
            found[name] = <int64_t>bits
        elif choice == UINT64_PARAM:
            found[name] = bits
        else:
            memcpy(&real, &bits, 8)
            found[name] = real
    return found
