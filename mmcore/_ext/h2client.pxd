"""The client side of a session; see ext/h2client.pyx."""

from libc.stdint cimport uint8_t

from mmcore._ext.h2 cimport Method, Session, Stream


cdef class ClientCall(Stream):
    cdef object on_done
    cdef bint done
    cdef readonly bint refused
    cdef readonly bint lost
    cdef int http_status
    cdef int not_grpc(self) except -1
    cdef int finish(self, int status, str text) except -1
    cdef int on_header(
        self, const uint8_t *name, size_t name_size, const uint8_t *value, size_t value_size, int category,
    ) except -1


cdef class ClientSession(Session):
    cdef Py_ssize_t told      # by another instance, of what it works at; -1 before that
    cdef bint takes_calls(self) noexcept
    cdef int submit(
        self, ClientCall call, Method method, object message, uint8_t flag, list encoded, object deadline
    ) except -1
