# Fuzz targets without a Python object in them, for counts of executions that the others do not reach; built by
# MMCORE_FUZZ=1 only. Each takes libFuzzer's own buffer, so that AddressSanitizer sees a read behind its end.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport abort, free, malloc
from libc.string cimport memset

from mmcore._ext.grpcwire cimport timeout_ns
from mmcore._ext.pbwire cimport (
    LENGTH, VARINT, Cursor, Span, read_length, read_tag, read_varint, skip_value, valid_utf8, varint_size, write_varint,
)
from mmcore._ext.tensor cimport MAX_RANK, count_elements, datatype_code, scan_contents
from mmcore._ext.v2layout cimport Layout, TensorPlace, clear, read_message, release

ctypedef int (*Target)(const uint8_t* data, size_t size) noexcept

cdef extern int LLVMFuzzerRunDriver(int* argc, char*** argv, Target target)


cdef void check(bint holds) noexcept:
    # libFuzzer tells the input and the place.
    if not holds:
        abort()


cdef bint walk(Cursor cursor, const uint8_t* end, int depth) noexcept:
    """Every field of a message and, where they are messages as well, of its values."""
    cdef uint32_t field, wire
    cdef uint64_t number
    cdef uint8_t[10] again
    cdef Cursor inner
    while cursor.at < cursor.end:
        if not read_tag(&cursor, &field, &wire):
            return False
        if wire == LENGTH:
            if not read_length(&cursor, &inner):
                return False
            check(inner.at <= inner.end and inner.end == cursor.at)
            valid_utf8(inner.at, inner.end - inner.at)
            if depth:
                walk(inner, end, depth - 1)
        elif wire == VARINT:
            if not read_varint(&cursor, &number):
                return False
            check(write_varint(again, number) - again == varint_size(number))
        elif not skip_value(&cursor, field, wire):
            return False
        check(cursor.at <= end)
    return True


cdef int protobuf(const uint8_t* data, size_t size) noexcept:
    """Scanning protobuf's wire format."""
    walk(Cursor(data, data + size), data + size, 3)
    return 0


cdef void within(Span span, size_t size) noexcept:
    check(<uint64_t>span.at + span.size <= size)


cdef int layout(const uint8_t* data, size_t size) noexcept:
    """Where everything lies in a ModelInferRequest (first bit 0) or ModelInferResponse."""
    cdef Layout found
    cdef TensorPlace* tensor
    cdef int i
    if size == 0:
        return 0
    memset(&found, 0, sizeof(Layout))
    clear(&found)
    if read_message(&found, data + 1, <Py_ssize_t>(size - 1), data[0] & 1):
        within(found.model_name, size - 1)
        within(found.model_version, size - 1)
        within(found.id, size - 1)
        check(found.tensor_count <= found.tensor_room and found.dim_count <= found.dim_room)
        for i in range(found.raw_count):
            within(found.raws[i], size - 1)
        for i in range(found.tensor_count):
            tensor = &found.tensors[i]
            within(tensor.name, size - 1)
            within(tensor.datatype, size - 1)
            within(tensor.raw, size - 1)
            check(tensor.rank <= MAX_RANK and tensor.dims + <uint32_t>tensor.rank <= <uint32_t>found.dim_count)
    release(&found)
    return 0


cdef int contents(const uint8_t* data, size_t size) noexcept:
    """InferTensorContents, datatypes' names and shapes."""
    cdef uint32_t kinds = 0
    cdef Py_ssize_t count = 0
    cdef int64_t[MAX_RANK] shape
    cdef int rank = 0
    scan_contents(data, <Py_ssize_t>size, &kinds, &count)
    # An element of a packed bool or varint takes a byte at least.
    check(0 <= count <= <Py_ssize_t>size)
    datatype_code(<const char*>data, <Py_ssize_t>(size if size < 8 else 8))
    while rank < MAX_RANK and <size_t>(rank + 1) * 8 <= size:
        shape[rank] = (<const int64_t*>data)[rank]
        rank += 1
    if count_elements(shape, rank, &count):
        check(count >= 0)
    return 0


cdef int timeout(const uint8_t* data, size_t size) noexcept:
    """The ``grpc-timeout`` header."""
    check(timeout_ns(<const char*>data, size) >= -1)
    return 0


cdef Target named(str name) except NULL:
    if name == "native_protobuf":
        return protobuf
    if name == "native_layout":
        return layout
    if name == "native_contents":
        return contents
    if name == "native_timeout":
        return timeout
    raise KeyError(name)


def fuzz(str name not None, list arguments not None):
    """Run libFuzzer on a target with the options of its command line; it ends the process itself."""
    cdef Target target = named(name)
    cdef int count = <int>len(arguments)
    cdef char** values = <char**>malloc(sizeof(char*) * (len(arguments) + 1))
    cdef list kept = [argument.encode() for argument in arguments]
    cdef int i
    for i in range(count):
        values[i] = kept[i]
    values[count] = NULL
    result = LLVMFuzzerRunDriver(&count, &values, target)
    free(values)
    return result
