from libc.stdint cimport int64_t


cdef int64_t timeout_ns(const char *text, size_t length) noexcept
cdef bytes percent_encode(str text)
cdef str percent_cut(str text, Py_ssize_t limit)
cdef str percent_decode(const char *text, size_t length)
cdef bytes encode_binary(object value)
cdef bytes decode_binary(bytes value)
