# Where everything lies in a ModelInferRequest or ModelInferResponse; how it is found is in ext/v2layout.pyx.

from libc.stdint cimport int64_t, uint8_t, uint32_t

from mmcore._ext.pbwire cimport Cursor, Span

# Fields of ModelInferRequest and ModelInferResponse; `tensors` are a request's inputs and a response's outputs.
cdef enum:
    MODEL_NAME = 1
    MODEL_VERSION = 2
    MESSAGE_ID = 3
    PARAMETERS = 4
    TENSORS = 5
    REQUESTED = 6           # of a request
    REQUEST_RAW = 7
    RESPONSE_RAW = 6
# Fields of InferInputTensor and InferOutputTensor, of InferRequestedOutputTensor, of a map entry, of InferParameter.
cdef enum:
    TENSOR_NAME = 1
    TENSOR_DATATYPE = 2
    TENSOR_SHAPE = 3
    TENSOR_PARAMETERS = 4
    TENSOR_CONTENTS = 5
    REQUESTED_PARAMETERS = 2
    ENTRY_KEY = 1
    ENTRY_VALUE = 2
    BOOL_PARAM = 1
    INT64_PARAM = 2
    STRING_PARAM = 3
    DOUBLE_PARAM = 4
    UINT64_PARAM = 5

# What is wrong with a message that decodes; told when a tensor is asked for.
cdef enum:
    SOUND = 0
    MIXED_CONTENTS = 1
    RAW_COUNT = 2

cdef enum:
    HAS_PARAMETERS = 1
    HAS_CONTENTS = 2
    IN_SHARED_MEMORY = 4
    HAS_RAW = 8

cdef enum:
    INLINE_TENSORS = 3      # kept in the object itself; messages with more use the heap
    INLINE_DIMS = 12

cdef struct TensorPlace:
    Span message
    Span name
    Span datatype
    Span raw
    Py_ssize_t count        # elements in the typed contents
    uint32_t kinds          # a bit for each contents field with elements
    uint32_t dims           # index of the first dimension
    int rank
    int code
    int flags

cdef struct Layout:
    Span model_name
    Span model_version
    Span id
    int tensor_count
    int tensor_room
    int requested_count
    int raw_count
    int raw_room
    int dim_count
    int dim_room
    int problem             # SOUND, MIXED_CONTENTS of tensor `culprit`, RAW_COUNT
    int culprit
    bint has_parameters     # the request's or answer's own
    bint plain              # no tensor has parameters
    bint shared_memory      # a tensor's data lies in a shared memory region
    bint typed              # a tensor has typed contents
    const char* wrong       # of a message that does not decode
    TensorPlace* tensors
    Span* raws
    int64_t* dims
    TensorPlace[INLINE_TENSORS] inline_tensors
    Span[INLINE_TENSORS] inline_raws
    int64_t[INLINE_DIMS] inline_dims

cdef void clear(Layout* layout) noexcept
cdef void release(Layout* layout) noexcept
cdef int read_message(Layout* layout, const uint8_t* base, Py_ssize_t size, bint response) except -1

# Of bytes known to be UTF-8.
cdef object text(const uint8_t* at, Py_ssize_t size)
cdef object cached_text(const uint8_t* at, Py_ssize_t size)

# Of a message already checked.
cdef Span value_span(const uint8_t* base, Cursor* cursor) noexcept
cdef dict read_parameters(const uint8_t* base, Span message, uint32_t number)


cdef inline Span span_of(const uint8_t* base, Cursor* inner) noexcept:
    return Span(<uint32_t>(inner.at - base), <uint32_t>(inner.end - inner.at))
