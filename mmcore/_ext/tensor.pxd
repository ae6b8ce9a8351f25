# V2 tensors as numpy arrays, for the codec; the rules are in ext/tensor.pyx.

from libc.stdint cimport int64_t, uint8_t, uint32_t

cdef enum:
    UNKNOWN = -1
    BOOL = 0
    UINT8 = 1
    UINT16 = 2
    UINT32 = 3
    UINT64 = 4
    INT8 = 5
    INT16 = 6
    INT32 = 7
    INT64 = 8
    FP16 = 9
    BF16 = 10
    FP32 = 11
    FP64 = 12
    BYTES = 13
    DATATYPES = 14

cdef enum:
    MAX_RANK = 32    # numpy 1's limit; numpy 2 has 64

cdef int datatype_code(const char* name, Py_ssize_t size) noexcept nogil
cdef str datatype_name(int code)
cdef str shape_text(const int64_t* shape, int rank)

# Elements of a shape and whether it is one: no negative dimension, rank and bytes within what memory can hold.
cdef bint count_elements(const int64_t* shape, int rank, Py_ssize_t* count) noexcept nogil

# Read-only arrays over `data`, which `owner` keeps alive; InvalidRequest when bytes and shape disagree.
cdef object array_over(int code, const int64_t* shape, int rank, const uint8_t* data, Py_ssize_t size, object owner)

# InferTensorContents: check one message and add up its elements; its field for a datatype; the array of its elements.
cdef bint scan_contents(const uint8_t* data, Py_ssize_t size, uint32_t* kinds, Py_ssize_t* count) noexcept nogil
cdef object array_from_contents(int code, const int64_t* shape, int rank, const uint8_t* tensor, Py_ssize_t size,
                                uint32_t kinds, Py_ssize_t count)

# The other direction. `array` must have come from checked_array, which makes it contiguous and of the datatype's dtype.
cdef object checked_array(int code, object array)
cdef Py_ssize_t raw_size(int code, object array) except -1
cdef uint8_t* write_raw(uint8_t* at, int code, object array) except NULL
cdef Py_ssize_t contents_size(int code, object array) except -1
cdef uint8_t* write_contents(uint8_t* at, int code, object array) except NULL
cdef bint has_contents_field(int code) noexcept nogil
cdef object bytes_view(object array)


cdef inline Py_ssize_t item_size(int code) noexcept nogil:
    # Bytes of an element in raw contents; 0 for BYTES.
    if code == FP32 or code == INT32 or code == UINT32:
        return 4
    if code == INT64 or code == FP64 or code == UINT64:
        return 8
    if code == FP16 or code == BF16 or code == INT16 or code == UINT16:
        return 2
    return 0 if code == BYTES else 1
