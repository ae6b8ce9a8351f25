"""Counts of calls by method and outcome; see ext/calls.pyx."""

from libc.stdint cimport int64_t

cdef enum:
    STATUSES = 17          # of gRPC, OK among them
    UNKNOWN_STATUS = 2
    TIME_BOUNDS = 19
    SIZE_BOUNDS = 8

cdef struct Counted:
    int64_t ns
    int64_t request_bytes
    int64_t response_bytes
    int64_t[TIME_BOUNDS + 1] times
    int64_t[SIZE_BOUNDS + 1] requests
    int64_t[SIZE_BOUNDS + 1] responses


cdef class CallCounters:
    cdef Counted* counted[STATUSES]
    cdef void add(self, int status, double seconds, int64_t request_bytes, int64_t response_bytes) noexcept
