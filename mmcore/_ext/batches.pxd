# Merging of requests, for the compiled request path.

from libc.stdint cimport int64_t

cdef int64_t common_rows(dict inputs, int64_t* size_bytes) noexcept
cdef bint mergeable(dict one, dict other) noexcept
cdef dict merged(list members)
cdef list parted(outputs, list rows)
