# Answers given again, for the compiled request path; see ext/responses.pyx.

cimport cython

from mmcore._ext.lru cimport Entry, Lru
from mmcore._ext.v2codec cimport InferRequest


cdef class Shelf


@cython.final
cdef class Response(Entry):
    cdef bytes request
    cdef bytes message
    cdef Shelf shelf


@cython.final
cdef class ResponseCache:
    cdef readonly Py_ssize_t capacity_bytes
    cdef Lru responses
    cdef Py_ssize_t made

    cdef int add(self, Response response) except -1


@cython.final
cdef class Shelf:
    cdef ResponseCache cache
    cdef dict found
    cdef Py_ssize_t head_size
    cdef bint closed

    cdef bytes find(self, InferRequest request)
    cdef int keep(self, InferRequest request, message) except -1
    cdef int drop(self, Response response) except -1
