"""Bytes on their way out of one event loop's connections."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport uint8_t


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef enum:
    OUT_BYTES = 512 * 1024
    IOVECS = 256
    # From here on a piece is referenced where it lies instead of copied: about where memcpy costs more than an iovec.
    REFERENCE_BYTES = 16 * 1024
    IN_BYTES = 256 * 1024
    GATHER_BYTES = 1024 * 1024     # written at once, about; what a full socket leaves of it is copied


cdef class Part:
    cdef Py_buffer view
    cdef bint held


cdef class Buffers:
    cdef bytearray incoming
    cdef object incoming_view
    cdef uint8_t *out
    cdef size_t used          # of out
    cdef size_t sealed        # of out, already in an iovec
    cdef size_t total         # bytes in all iovecs and the unsealed end
    cdef iovec[256] vectors
    cdef int count
    cdef list owners

    cdef inline bint has_room(self, size_t length) noexcept:
        """Whether a frame of that length can still be taken before the next write."""
        return (
            self.used + length + 64 <= OUT_BYTES and self.count + 2 * (length // REFERENCE_BYTES) + 4 <= IOVECS
            and self.total < GATHER_BYTES
        )

    cdef void seal(self) noexcept
    cdef void copy(self, const uint8_t *data, size_t length) noexcept
    cdef int reference(self, const uint8_t *data, size_t length, object owner) except -1
    cdef ssize_t send(self, int fd) noexcept
    cdef bytes rest(self, size_t sent)
    cdef int clear(self) except -1
