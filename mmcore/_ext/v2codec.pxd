# Infer requests for compiled callers: the same objects as Python's, without the calls in between.

from libc.stdint cimport int64_t, uint8_t, uint32_t

from mmcore._ext.pbwire cimport Span
from mmcore._ext.v2layout cimport Layout, TensorPlace

cdef struct Spec:
    const char* name
    Py_ssize_t name_size
    int code
    uint32_t codes                  # a bit for each datatype taken, that of `code` among them
    int rank
    int64_t* shape

cdef class InferMessage:
    cdef readonly bytes body
    cdef Layout layout

    cdef const uint8_t* base(self) noexcept
    cdef object place_text(self, Span place)
    cdef tuple tensors(self)
    cdef object array(self, TensorPlace* place)
    cdef object where(self, name)
    cdef object problem(self)

cdef class InferRequest(InferMessage):
    pass

cdef class Signature:
    cdef readonly tuple inputs      # TensorSpec; its names are what the C table points into
    cdef readonly bint any_name
    cdef tuple names
    cdef Spec* specs
    cdef int64_t* shapes
    cdef int count

    cdef int find(self, const void* name, Py_ssize_t size) noexcept
    cdef bint takes(self, int index, int code, int rank, const int64_t* shape) noexcept
    cdef object refusal(self, int index, where, int code, datatype, int rank, const int64_t* shape)
    cdef object wrong_inputs(self, model, list got)
    cdef object wrong_request(self, InferRequest request)
    cdef dict bound(self, InferRequest request)     # bind

cdef InferRequest read_request(bytes body)          # decode_infer_request
cdef object model_name_of(InferMessage message)
cdef object model_version_of(InferMessage message)
cdef object id_of(InferMessage message)
cdef tuple output_names_of(InferRequest request)
