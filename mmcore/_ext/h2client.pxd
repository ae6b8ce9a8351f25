"""The client side of a session; see ext/h2client.pyx."""

from mmcore._ext.h2 cimport Session, Stream


cdef class ClientCall(Stream):
    cdef object on_done
    cdef bint done
    cdef readonly bint refused
    cdef int http_status
    cdef int not_grpc(self) except -1
    cdef int finish(self, int status, str text) except -1


cdef class ClientSession(Session):
    pass
