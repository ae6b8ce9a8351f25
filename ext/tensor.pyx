"""V2 tensors on the wire and as numpy arrays: raw contents, typed contents, BYTES, FP16 and BF16.

Raw contents are little-endian, row-major, without padding (Open Inference Protocol, "Tensor Data"); BYTES elements
are each a uint32 length and that many bytes (Triton's binary data extension); BF16 is widened to float32 exactly
and rounded from it to nearest even. Arrays are read-only: views which keep the buffer alive where that can be,
copies where the buffer is misaligned for the element or holds it differently.
"""

import sys

import numpy as np

cimport numpy as cnp
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromObject, PyMemoryView_GET_BUFFER
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.unicode cimport PyUnicode_Check
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from mmcore._ext.pbwire cimport (
    FIXED32, FIXED64, LENGTH, VARINT, Cursor, field_size, read_length, read_tag, read_varint, skip_value, varint_size,
    write_bytes, write_varint,
)

from mmcore.errors import InvalidRequest

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL

cnp.import_array()
if sys.byteorder != "little":
    raise ImportError("mmcore's tensor codec is written for little-endian machines")

ctypedef fused integer:
    int8_t
    int16_t
    int32_t
    int64_t
    uint8_t
    uint16_t
    uint32_t
    uint64_t

cdef enum:
    GIL_FREE_BYTES = 1 << 19    # copying less takes under about 50 us
    VIEW = 0x0001 | 0x0100      # NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED: a view that refuses writes

# Fields of InferTensorContents (Open Inference Protocol).
cdef enum:
    BOOL_CONTENTS = 1
    INT_CONTENTS = 2
    INT64_CONTENTS = 3
    UINT_CONTENTS = 4
    UINT64_CONTENTS = 5
    FP32_CONTENTS = 6
    FP64_CONTENTS = 7
    BYTES_CONTENTS = 8
    CONTENTS_IN_TENSOR = 5      # the number of `contents` in a tensor message

cdef tuple NAMES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64",
    "BYTES",
)
cdef tuple CONTENTS_NAMES = (
    "", "bool_contents", "int_contents", "int64_contents", "uint_contents", "uint64_contents", "fp32_contents",
    "fp64_contents", "bytes_contents",
)
cdef uint64_t[DATATYPES] KEYS        # the names' bytes as numbers, to compare in one step
# By datatype: numpy's type number, and the contents field, 0 where the datatype is raw only.
cdef int[DATATYPES] TYPES = [
    cnp.NPY_BOOL, cnp.NPY_UINT8, cnp.NPY_UINT16, cnp.NPY_UINT32, cnp.NPY_UINT64, cnp.NPY_INT8, cnp.NPY_INT16,
    cnp.NPY_INT32, cnp.NPY_INT64, cnp.NPY_FLOAT16, cnp.NPY_FLOAT32, cnp.NPY_FLOAT32, cnp.NPY_FLOAT64, cnp.NPY_OBJECT,
]
cdef int[DATATYPES] FIELDS = [
    BOOL_CONTENTS, UINT_CONTENTS, UINT_CONTENTS, UINT_CONTENTS, UINT64_CONTENTS, INT_CONTENTS, INT_CONTENTS,
    INT_CONTENTS, INT64_CONTENTS, 0, 0, FP32_CONTENTS, FP64_CONTENTS, BYTES_CONTENTS,
]


cdef uint64_t name_key(const char* name, Py_ssize_t size) noexcept nogil:
    """A name of up to eight bytes as a number."""
    cdef uint64_t key = 0
    memcpy(&key, name, <size_t>size)
    return key


cdef int fill_keys() except -1:
    cdef Py_ssize_t size
    cdef const char* name
    for code in range(DATATYPES):
        name = PyUnicode_AsUTF8AndSize(NAMES[code], &size)
        KEYS[code] = name_key(name, size)
    return 0


fill_keys()


cdef int datatype_code(const char* name, Py_ssize_t size) noexcept nogil:
    """The Datatype of a name, UNKNOWN for any other."""
    cdef uint64_t key
    cdef int code
    if not 4 <= size <= 6:
        return UNKNOWN
    key = name_key(name, size)
    if key == KEYS[FP32]:
        return FP32
    for code in range(DATATYPES):
        if KEYS[code] == key:
            return code
    return UNKNOWN


cdef str datatype_name(int code):
    return NAMES[code]


cdef str shape_text(const int64_t* shape, int rank):
    """A shape as messages show it: ``[1,4]``."""
    cdef int i
    return "[" + ",".join([str(shape[i]) for i in range(rank)]) + "]"


cdef bint count_elements(const int64_t* shape, int rank, Py_ssize_t* count) noexcept nogil:
    """The product of the dimensions; False for a negative one, too many, or more bytes than memory can address."""
    cdef int64_t room = <int64_t>1 << 59    # of the widest elements, whose bytes then fit 63 bits
    cdef int64_t product = 1
    cdef bint empty = False
    cdef int i
    if rank > MAX_RANK:
        return False
    for i in range(rank):
        if shape[i] <= 0:
            if shape[i] < 0:
                return False
            empty = True
        elif shape[i] > room / product:
            return False    # numpy refuses such strides even when another dimension is 0
        else:
            product *= shape[i]
    count[0] = 0 if empty else product
    return True


cdef object new_array(int code, const int64_t* shape, int rank):
    """An uninitialised array of the datatype; of BYTES with empty slots."""
    return cnp.PyArray_New(cnp.ndarray, rank, <cnp.npy_intp*>shape, TYPES[code], NULL, NULL, 0, 0, None)


cdef str size_text(int code, const int64_t* shape, int rank, object expected, object got):
    return f"expected {expected} bytes for {NAMES[code]} {shape_text(shape, rank)}, got {got}"


cdef object array_over(int code, const int64_t* shape, int rank, const uint8_t* data, Py_ssize_t size, object owner):
    """Raw contents as an array; InvalidRequest tells what was expected and what came."""
    cdef Py_ssize_t count, item = item_size(code)
    cdef object array
    if not count_elements(shape, rank, &count):
        raise InvalidRequest(f"no tensor can have the shape {shape_text(shape, rank)}")
    if code == BYTES:
        return bytes_array(shape, rank, count, data, size)
    if count * item != size:
        raise InvalidRequest(size_text(code, shape, rank, count * item, size))
    if code == BF16:
        array = new_array(code, shape, rank)
        widen(<uint32_t*>cnp.PyArray_DATA(array), data, count)
        return read_only(array)
    if (<uintptr_t>data & <uintptr_t>(item - 1)) or code == BOOL and not plain_bools(data, size):
        # Not an array with memory of its own, which numpy takes twice as long to make.
        owner = PyBytes_FromStringAndSize(NULL, size)
        if code == BOOL:
            copy_bools(<uint8_t*>PyBytes_AS_STRING(owner), data, size)
        else:
            copy(<uint8_t*>PyBytes_AS_STRING(owner), data, size)
        data = <const uint8_t*>PyBytes_AS_STRING(owner)
    return view_over(code, shape, rank, data, owner)


cdef object view_over(int code, const int64_t* shape, int rank, const uint8_t* data, object owner):
    """A read-only array over aligned data of the right size, with a reference to what holds it."""
    if data == NULL:    # of an empty buffer
        return read_only(new_array(code, shape, rank))
    array = cnp.PyArray_New(cnp.ndarray, rank, <cnp.npy_intp*>shape, TYPES[code], NULL, <void*>data, 0, VIEW, None)
    Py_INCREF(owner)
    cnp.PyArray_SetBaseObject(array, owner)
    return array


cdef object read_only(object array):
    """The same for arrays of their own memory: whether a model may write to its input must not hang on the request."""
    cnp.PyArray_CLEARFLAGS(array, cnp.NPY_ARRAY_WRITEABLE)
    return array


cdef void copy(uint8_t* target, const uint8_t* data, Py_ssize_t size) noexcept:
    if size == 0:
        return    # data may be NULL
    if size < GIL_FREE_BYTES:
        memcpy(target, data, <size_t>size)
    else:
        with nogil:
            memcpy(target, data, <size_t>size)


cdef bint plain_bools(const uint8_t* data, Py_ssize_t size) noexcept nogil:
    """Whether every byte is 0 or 1, which is all that numpy's bool may hold."""
    cdef uint8_t seen = 0
    cdef Py_ssize_t i
    for i in range(size):
        seen |= data[i]
    return seen <= 1


cdef void copy_bools(uint8_t* target, const uint8_t* data, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(size):
        target[i] = data[i] != 0


cdef void widen(uint32_t* target, const uint8_t* data, Py_ssize_t count) noexcept nogil:
    """BF16 is the upper half of a float32."""
    cdef Py_ssize_t i
    for i in range(count):
        target[i] = <uint32_t>data[2 * i] << 16 | <uint32_t>data[2 * i + 1] << 24


cdef void narrow(uint8_t* target, const uint32_t* data, Py_ssize_t count) noexcept nogil:
    """float32 to BF16, to nearest and halves to even; a NaN stays one."""
    cdef uint32_t bits
    cdef Py_ssize_t i
    for i in range(count):
        bits = data[i]
        if bits & 0x7FFFFFFF > 0x7F800000:
            bits = bits >> 16 | 0x40
        else:
            bits = bits + 0x7FFF + (bits >> 16 & 1) >> 16
        target[2 * i] = <uint8_t>bits
        target[2 * i + 1] = <uint8_t>(bits >> 8)


cdef object bytes_array(const int64_t* shape, int rank, Py_ssize_t count, const uint8_t* data, Py_ssize_t size):
    """BYTES framing, wholly checked before the array is made, so that a shape alone cannot take memory."""
    cdef Py_ssize_t at = 0, found = 0
    cdef uint32_t length
    cdef PyObject** slots
    while at < size:
        if size - at < 4:
            raise InvalidRequest(f"BYTES element {found} needs a length of 4 bytes, {size - at} are left")
        memcpy(&length, data + at, 4)
        if length > <size_t>(size - at - 4):
            raise InvalidRequest(f"BYTES element {found} is said to have {length} bytes, {size - at - 4} are left")
        at += 4 + <Py_ssize_t>length
        found += 1
    if found != count:
        raise InvalidRequest(f"expected {count} elements for BYTES {shape_text(shape, rank)}, got {found}")
    array = new_array(BYTES, shape, rank)
    slots = <PyObject**>cnp.PyArray_DATA(array)
    at = 0
    for found in range(count):
        memcpy(&length, data + at, 4)
        put(slots + found, PyBytes_FromStringAndSize(<const char*>data + at + 4, length))
        at += 4 + <Py_ssize_t>length
    return read_only(array)


cdef void put(PyObject** slot, object element) noexcept:
    """Fill an empty slot of an object array."""
    Py_INCREF(element)
    slot[0] = <PyObject*>element


# ---- typed contents in


cdef bint scan_contents(const uint8_t* data, Py_ssize_t size, uint32_t* kinds, Py_ssize_t* count) noexcept nogil:
    """Check one InferTensorContents; add its elements to ``count`` and set a bit per field seen in ``kinds``."""
    cdef Cursor cursor = Cursor(data, data + size)
    cdef Cursor inner
    cdef uint32_t field, wire
    cdef uint64_t value
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return False
        if field == BYTES_CONTENTS and wire == LENGTH:
            if not read_length(&cursor, &inner):
                return False
            count[0] += 1
        elif field < BYTES_CONTENTS and wire == LENGTH:
            if not read_length(&cursor, &inner):
                return False
            if inner.at == inner.end:
                continue
            if field == FP32_CONTENTS or field == FP64_CONTENTS:
                if (inner.end - inner.at) & (3 if field == FP32_CONTENTS else 7):
                    return False
                count[0] += (inner.end - inner.at) >> (2 if field == FP32_CONTENTS else 3)
            else:
                while inner.at < inner.end:
                    if not read_varint(&inner, &value):
                        return False
                    count[0] += 1
        else:
            if not skip_value(&cursor, field, wire):
                return False
            if not (
                field <= UINT64_CONTENTS and wire == VARINT
                or field == FP32_CONTENTS and wire == FIXED32
                or field == FP64_CONTENTS and wire == FIXED64
            ):
                continue
            count[0] += 1
        kinds[0] |= <uint32_t>1 << field
    return True


cdef bint store(uint8_t* target, int code, uint64_t value) noexcept nogil:
    """Write one varint element; False when it does not fit. Wider bits fall off as protobuf lets them."""
    cdef int32_t small = <int32_t>value
    cdef uint32_t natural = <uint32_t>value
    if code == INT64 or code == UINT64:
        memcpy(target, &value, 8)
    elif code == INT32 or code == UINT32:
        memcpy(target, &natural, 4)
    elif code == BOOL:
        target[0] = value != 0
    elif code == INT8:
        target[0] = <uint8_t>small
        return -128 <= small <= 127
    elif code == UINT8:
        target[0] = <uint8_t>natural
        return natural <= 255
    elif code == INT16:
        memcpy(target, &small, 2)
        return -32768 <= small <= 32767
    else:
        memcpy(target, &natural, 2)
        return natural <= 65535
    return True


cdef Py_ssize_t fill(uint8_t* target, int code, const uint8_t* tensor, Py_ssize_t size) except -2:
    """Copy a tensor message's elements, already checked and counted; -1, or the place of the first that overflows."""
    cdef Cursor cursor = Cursor(tensor, tensor + size)
    cdef Cursor contents, inner
    cdef uint32_t field, wire, inner_wire, wanted = <uint32_t>FIELDS[code]
    cdef Py_ssize_t item = sizeof(PyObject*) if code == BYTES else item_size(code)
    cdef Py_ssize_t done = 0, misfit = -1
    cdef uint64_t value
    while cursor.at < cursor.end and read_tag(&cursor, &field, &wire):
        if field != CONTENTS_IN_TENSOR or wire != LENGTH:
            skip_value(&cursor, field, wire)
            continue
        read_length(&cursor, &contents)
        while contents.at < contents.end and read_tag(&contents, &field, &inner_wire):
            if field != wanted:
                skip_value(&contents, field, inner_wire)
            elif inner_wire == LENGTH:
                read_length(&contents, &inner)
                if code == BYTES:
                    put(
                        <PyObject**>(target + done * item),
                        PyBytes_FromStringAndSize(<const char*>inner.at, inner.end - inner.at),
                    )
                    done += 1
                elif code == FP32 or code == FP64:
                    memcpy(target + done * item, inner.at, <size_t>(inner.end - inner.at))
                    done += (inner.end - inner.at) // item
                else:
                    while inner.at < inner.end and read_varint(&inner, &value):
                        if not store(target + done * item, code, value) and misfit < 0:
                            misfit = done
                        done += 1
            elif inner_wire == VARINT and wanted <= UINT64_CONTENTS:
                read_varint(&contents, &value)
                if not store(target + done * item, code, value) and misfit < 0:
                    misfit = done
                done += 1
            elif (code == FP32 and inner_wire == FIXED32) or (code == FP64 and inner_wire == FIXED64):
                memcpy(target + done * item, contents.at, <size_t>item)
                contents.at += item
                done += 1
            else:
                skip_value(&contents, field, inner_wire)
    return misfit


cdef object array_from_contents(int code, const int64_t* shape, int rank, const uint8_t* tensor, Py_ssize_t size,
                                uint32_t kinds, Py_ssize_t count):
    """The elements of a tensor message's contents; ``kinds`` and ``count`` come from scan_contents.

    InvalidRequest when the datatype has no typed contents, another field was filled, the number of elements differs
    from the shape's, or one does not fit the datatype.
    """
    cdef Py_ssize_t expected, misfit
    cdef object array
    if not count_elements(shape, rank, &expected):
        raise InvalidRequest(f"no tensor can have the shape {shape_text(shape, rank)}")
    if not FIELDS[code]:
        raise InvalidRequest(f"expected raw contents, as {NAMES[code]} has no typed ones")
    if kinds & ~(<uint32_t>1 << FIELDS[code]):
        got = [name for field, name in enumerate(CONTENTS_NAMES) if kinds >> field & 1]
        raise InvalidRequest(f"expected {CONTENTS_NAMES[FIELDS[code]]} for {NAMES[code]}, got {', '.join(got)}")
    if count != expected:
        raise InvalidRequest(
            f"expected {expected} elements for {NAMES[code]} {shape_text(shape, rank)}, got {count}"
        )
    array = new_array(code, shape, rank)
    misfit = fill(<uint8_t*>cnp.PyArray_DATA(array), code, tensor, size)
    if misfit >= 0:
        raise InvalidRequest(f"expected elements that fit {NAMES[code]}, got a wider one at index {misfit}")
    return read_only(array)


# ---- out


cdef object checked_array(int code, object array):
    """``array`` as C-contiguous and in native order; TypeError when its dtype is not the datatype's."""
    if not cnp.PyArray_Check(array):
        raise TypeError(f"{NAMES[code]} is made from a numpy array, got {type(array).__name__}")
    if cnp.PyArray_TYPE(array) == TYPES[code] and cnp.PyArray_ISCARRAY_RO(array):
        return array
    if code == BYTES and (array.dtype.kind == "S" or array.dtype.kind == "U"):
        return np.ascontiguousarray(array.astype(object)).reshape(array.shape)
    dtype = cnp.PyArray_DescrFromType(TYPES[code])
    if not np.can_cast(array.dtype, dtype, "equiv"):
        raise TypeError(f"{NAMES[code]} is made from {dtype}, got {array.dtype}")
    return np.require(array, dtype, ("C", "A"))    # keeps rank 0, which ascontiguousarray would not


cdef const char* element_bytes(PyObject* element, Py_ssize_t* size) except NULL:
    """The bytes of a BYTES element; str becomes UTF-8."""
    if element != NULL and PyBytes_Check(<object>element):
        size[0] = PyBytes_GET_SIZE(<object>element)
        return PyBytes_AS_STRING(<object>element)
    if element != NULL and PyUnicode_Check(<object>element):
        return PyUnicode_AsUTF8AndSize(<object>element, size)
    name = "nothing" if element == NULL else type(<object>element).__name__
    raise TypeError(f"BYTES elements are bytes or str, got {name}")


cdef Py_ssize_t raw_size(int code, object array) except -1:
    cdef Py_ssize_t i, size, total = 0
    cdef Py_ssize_t count = cnp.PyArray_SIZE(array)
    cdef PyObject** slots
    if code != BYTES:
        return count * item_size(code)
    slots = <PyObject**>cnp.PyArray_DATA(array)
    for i in range(count):
        element_bytes(slots[i], &size)
        if size > 0x7FFFFFFF:
            raise ValueError(f"a BYTES element has at most 2147483647 bytes, got {size}")
        total += 4 + size
    return total


cdef uint8_t* write_raw(uint8_t* at, int code, object array) except NULL:
    cdef Py_ssize_t i, size
    cdef Py_ssize_t count = cnp.PyArray_SIZE(array)
    cdef PyObject** slots
    cdef const char* data
    cdef uint32_t length
    if code == BF16:
        narrow(at, <const uint32_t*>cnp.PyArray_DATA(array), count)
        return at + count * 2
    if code != BYTES:
        copy(at, <const uint8_t*>cnp.PyArray_DATA(array), count * item_size(code))
        return at + count * item_size(code)
    slots = <PyObject**>cnp.PyArray_DATA(array)
    for i in range(count):
        data = element_bytes(slots[i], &size)
        length = <uint32_t>size
        memcpy(at, &length, 4)
        memcpy(at + 4, data, <size_t>size)
        at += 4 + size
    return at


cdef bint has_contents_field(int code) noexcept nogil:
    """Whether the datatype can be sent as typed contents."""
    return FIELDS[code] != 0


cdef Py_ssize_t varints_size(const integer* values, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t i, total = 0
    for i in range(count):
        total += varint_size(<uint64_t>values[i])
    return total


cdef uint8_t* write_varints(uint8_t* at, const integer* values, Py_ssize_t count, Py_ssize_t room) noexcept nogil:
    """NULL when the elements need more than ``room``: another thread has changed them since they were sized."""
    cdef uint8_t* end = at + room
    cdef Py_ssize_t i
    cdef uint64_t value
    for i in range(count):
        value = <uint64_t>values[i]
        if end - at < 10 and end - at < varint_size(value):
            return NULL
        at = write_varint(at, value)
    return at if at == end else NULL


cdef Py_ssize_t packed_size(int code, object array) noexcept:
    """Bytes of the packed elements of any datatype but BYTES."""
    cdef void* data = cnp.PyArray_DATA(array)
    cdef Py_ssize_t count = cnp.PyArray_SIZE(array)
    if code == INT8:
        return varints_size(<const int8_t*>data, count)
    if code == INT16:
        return varints_size(<const int16_t*>data, count)
    if code == INT32:
        return varints_size(<const int32_t*>data, count)
    if code == INT64:
        return varints_size(<const int64_t*>data, count)
    if code == UINT8:
        return varints_size(<const uint8_t*>data, count)
    if code == UINT16:
        return varints_size(<const uint16_t*>data, count)
    if code == UINT32:
        return varints_size(<const uint32_t*>data, count)
    if code == UINT64:
        return varints_size(<const uint64_t*>data, count)
    return count * item_size(code)


cdef uint8_t* write_packed(uint8_t* at, int code, object array, Py_ssize_t room) noexcept:
    cdef void* data = cnp.PyArray_DATA(array)
    cdef Py_ssize_t count = cnp.PyArray_SIZE(array)
    if code == INT8:
        return write_varints(at, <const int8_t*>data, count, room)
    if code == INT16:
        return write_varints(at, <const int16_t*>data, count, room)
    if code == INT32:
        return write_varints(at, <const int32_t*>data, count, room)
    if code == INT64:
        return write_varints(at, <const int64_t*>data, count, room)
    if code == UINT8:
        return write_varints(at, <const uint8_t*>data, count, room)
    if code == UINT16:
        return write_varints(at, <const uint16_t*>data, count, room)
    if code == UINT32:
        return write_varints(at, <const uint32_t*>data, count, room)
    if code == UINT64:
        return write_varints(at, <const uint64_t*>data, count, room)
    copy(at, <const uint8_t*>data, room)
    return at + room


cdef Py_ssize_t contents_size(int code, object array) except -1:
    """Of an InferTensorContents message with the array's elements; 0 for none."""
    cdef Py_ssize_t i, size, total = 0
    cdef Py_ssize_t count = cnp.PyArray_SIZE(array)
    cdef PyObject** slots
    if count == 0:
        return 0
    if code != BYTES:
        return field_size(packed_size(code, array))
    slots = <PyObject**>cnp.PyArray_DATA(array)
    for i in range(count):
        element_bytes(slots[i], &size)
        total += field_size(size)
    return total


cdef uint8_t* write_contents(uint8_t* at, int code, object array) except NULL:
    cdef Py_ssize_t i, size
    cdef Py_ssize_t count = cnp.PyArray_SIZE(array)
    cdef PyObject** slots
    cdef const char* data
    if count == 0:
        return at
    if code != BYTES:
        size = packed_size(code, array)
        at[0] = <uint8_t>(FIELDS[code] << 3 | LENGTH)
        at = write_packed(write_varint(at + 1, <uint64_t>size), code, array, size)
        if at == NULL:
            raise RuntimeError(f"the {NAMES[code]} array was changed while it was encoded")
        return at
    slots = <PyObject**>cnp.PyArray_DATA(array)
    for i in range(count):
        data = element_bytes(slots[i], &size)
        at = write_bytes(at, BYTES_CONTENTS, data, size)
    return at


# ---- for Python


cdef int code_of(str datatype) except -1:
    cdef Py_ssize_t size
    cdef const char* name = PyUnicode_AsUTF8AndSize(datatype, &size)
    cdef int code = datatype_code(name, size)
    if code == UNKNOWN:
        raise InvalidRequest(f"expected a datatype of {', '.join(NAMES)}, got {datatype!r}")
    return code


cdef int read_shape(object shape, int64_t* dims) except -1:
    cdef int rank = 0
    if len(shape) > MAX_RANK:
        raise InvalidRequest(f"expected at most {MAX_RANK} dimensions, got {len(shape)}")
    for dim in shape:
        if not -0x8000000000000000 <= dim <= 0x7FFFFFFFFFFFFFFF:
            raise InvalidRequest(f"no tensor can have the shape {list(shape)}")
        dims[rank] = dim
        rank += 1
    return rank


def array_from_raw(str datatype not None, shape, buffer):
    """Raw contents as an array of the datatype's dtype (mmcore.model.NUMPY_DTYPES) and ``shape``.

    Read-only: a view that keeps ``buffer`` (any contiguous bytes-like object) alive, or a copy for BYTES, BF16, BOOL
    with bytes above 1, and misaligned data. Raises InvalidRequest when bytes, shape and datatype disagree.
    """
    cdef int64_t[MAX_RANK] dims
    cdef int code = code_of(datatype)
    cdef int rank = read_shape(shape, dims)
    if PyBytes_Check(buffer):
        return array_over(
            code, dims, rank, <const uint8_t*>PyBytes_AS_STRING(buffer), PyBytes_GET_SIZE(buffer), buffer
        )
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise InvalidRequest("expected a contiguous buffer")
    return array_over(
        code, dims, rank, <const uint8_t*>PyMemoryView_GET_BUFFER(view).buf, PyMemoryView_GET_BUFFER(view).len, view
    )


def parse_bytes_tensor(buffer, shape):
    """BYTES raw contents as a read-only object array of ``bytes``; InvalidRequest when framing or count is wrong."""
    return array_from_raw("BYTES", shape, buffer)


def array_to_raw(str datatype not None, array):
    """The raw contents of an array: a memoryview of its own bytes where it holds them so, otherwise bytes.

    Raises TypeError when the array's dtype is not the datatype's (float32 for BF16, objects, S or U for BYTES).
    """
    cdef int code = code_of(datatype)
    array = checked_array(code, array)
    if code == BYTES or code == BF16:
        data = PyBytes_FromStringAndSize(NULL, raw_size(code, array))
        write_raw(<uint8_t*>PyBytes_AS_STRING(data), code, array)
        return data
    return bytes_view(array)


cdef object bytes_view(object array):
    """A read-only memoryview of a contiguous array's bytes; it keeps the array alive."""
    cdef cnp.npy_intp size = cnp.PyArray_NBYTES(array)
    view = cnp.PyArray_New(
        cnp.ndarray, 1, &size, cnp.NPY_UINT8, NULL, cnp.PyArray_DATA(array), 0, VIEW, None
    )
    Py_INCREF(array)
    cnp.PyArray_SetBaseObject(view, array)
    return PyMemoryView_FromObject(view)


def serialize_bytes_tensor(array):
    """The raw contents of a BYTES tensor: for each element, row-major, a uint32 length and its bytes.

    ``array`` holds bytes or str (as UTF-8); TypeError for anything else.
    """
    return array_to_raw("BYTES", array)
