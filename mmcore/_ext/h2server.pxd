"""The server side of a session; see ext/h2server.pyx."""

from libc.stdint cimport uint8_t

from mmcore._ext.h2 cimport Method, Session, Stream


cdef class Working:
    cdef public Py_ssize_t count


cdef class ServerCall(Stream):
    cdef bint working         # it is counted in the session's
    cdef bint headers_sent
    cdef bint finished
    cdef bint dispatched
    cdef list extra_trailers
    cdef list extra_headers
    cdef public object on_cancel
    cdef void count(self, int status) noexcept
    cdef void rest(self) noexcept
    cdef int answer(self, object message) except -1
    cdef int answer_as(self, object message, uint8_t flag) except -1
    cdef int send_headers(self, bint end) except -1
    cdef int leave(self) except -1
    cdef int conclude(self, int status, str details) except -1
    cdef int refuse(self, int status, str text) except -1
    cdef int reject(self, const char *http_status) except -1
    cdef list status_pairs(self)
    cdef int on_header(
        self, const uint8_t *name, size_t name_size, const uint8_t *value, size_t value_size, int category,
    ) except -1


cdef class ServerSession(Session):
    cdef public bint internal  # the peers are instances of ours, whose own metadata counts
    cdef public Working working
    cdef Py_ssize_t told      # of it, to the other side
    cdef dict methods
    cdef Method latest        # method called last; the next call's is mostly the same
    cdef bint tells(self) noexcept
