"""The buffers that all connections of one event loop share: one to read into, one to gather frames in.

A loop handles one connection at a time, and neither buffer holds anything between two of them: what a socket did not
take at once goes to its transport. So ten thousand idle connections cost no buffer at all. One thread only.
"""

import cython

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memcpy, memset


cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int, const msghdr *, int)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL


@cython.final
cdef class Part:
    """A contiguous buffer held for sending; its exporter cannot resize until this is gone."""

    def __cinit__(self, source):
        self.held = False
        PyObject_GetBuffer(source, &self.view, PyBUF_SIMPLE)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


@cython.final
cdef class Buffers:
    """Owns the read buffer and the write buffer of one loop."""

    def __cinit__(self):
        self.out = <uint8_t *>PyMem_Malloc(OUT_BYTES)
        if self.out == NULL:
            raise MemoryError
        self.used = self.sealed = self.total = 0
        self.count = 0
        self.owners = []
        self.incoming = bytearray(IN_BYTES)
        self.incoming_view = memoryview(self.incoming)

    def __dealloc__(self):
        PyMem_Free(self.out)

    cdef void seal(self) noexcept:
        """Close the copied bytes since the last vector into one of their own."""
        if self.used > self.sealed:
            self.vectors[self.count].iov_base = self.out + self.sealed
            self.vectors[self.count].iov_len = self.used - self.sealed
            self.count += 1
            self.sealed = self.used

    cdef void copy(self, const uint8_t *data, size_t length) noexcept:
        """Append bytes; the caller has checked has_room."""
        memcpy(self.out + self.used, data, length)
        self.used += length
        self.total += length

    cdef int reference(self, const uint8_t *data, size_t length, object owner) except -1:
        """Append bytes where they lie; ``owner`` keeps them until they are written."""
        self.owners.append(owner)
        self.seal()
        self.vectors[self.count].iov_base = <void *>data
        self.vectors[self.count].iov_len = length
        self.count += 1
        self.total += length
        return 0

    cdef ssize_t send(self, int fd) noexcept:
        """One sendmsg of all that is gathered: bytes taken, 0 when the socket is full, -1 when it is broken."""
        cdef msghdr header
        cdef ssize_t sent
        self.seal()
        memset(&header, 0, sizeof(header))
        header.msg_iov = self.vectors
        header.msg_iovlen = self.count
        sent = sendmsg(fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent < 0 and (errno == EAGAIN or errno == EINTR):
            return 0
        return sent

    cdef bytes rest(self, size_t sent):
        """What follows the first ``sent`` bytes, joined."""
        cdef bytes joined
        cdef uint8_t *target
        cdef size_t skip, length
        cdef int i
        self.seal()
        joined = PyBytes_FromStringAndSize(NULL, self.total - sent)
        target = <uint8_t *>PyBytes_AS_STRING(joined)
        skip = sent
        for i in range(self.count):
            length = self.vectors[i].iov_len
            if skip >= length:
                skip -= length
                continue
            memcpy(target, <uint8_t *>self.vectors[i].iov_base + skip, length - skip)
            target += length - skip
            skip = 0
        return joined

    cdef int clear(self) except -1:
        """Forget everything gathered."""
        self.used = self.sealed = self.total = 0
        self.count = 0
        if self.owners:
            self.owners.clear()
        return 0
