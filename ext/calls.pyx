"""Counts of calls by method and outcome: how many, how long from arrival to answer, and how large.

Counters are C integers behind one pointer for each status that has occurred, so that counting an answer costs some ten
nanoseconds and a scrape depends on methods and statuses alone. Everything is called with the GIL held, from the thread
of the event loop; a snapshot is plain objects.
"""

cimport cython
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport int64_t

from collections import namedtuple

# Upper bounds, those of the archived stack: nanoseconds, and bytes from 128 on, each four times the one before. The
# last count of each is of what lies above.
cdef int64_t[TIME_BOUNDS] TIME_BOUND_NS = [
    500000, 1000000, 2000000, 5000000, 10000000, 20000000, 50000000, 75000000, 100000000, 200000000, 500000000,
    1000000000, 2000000000, 5000000000, 10000000000, 20000000000, 60000000000, 120000000000, 300000000000,
]

CallCounts = namedtuple(
    "CallCounts", ("status", "times", "time_s", "requests", "request_bytes", "responses", "response_bytes")
)

TIME_BOUNDS_S = tuple([TIME_BOUND_NS[at] * 1e-9 for at in range(TIME_BOUNDS)])
SIZE_BOUNDS_BYTES = tuple([128 * 4**at for at in range(SIZE_BOUNDS)])


cdef inline int time_bucket(int64_t value) noexcept nogil:
    cdef int at = 0
    # Most are below the first few bounds.
    while at < TIME_BOUNDS and TIME_BOUND_NS[at] < value:
        at += 1
    return at


cdef inline int size_bucket(int64_t value) noexcept nogil:
    cdef int at = 0
    cdef int64_t bound = 128
    while at < SIZE_BOUNDS and bound < value:
        at += 1
        bound <<= 2
    return at


@cython.final
cdef class CallCounters:
    """The calls of one method, from zero."""

    def __dealloc__(self):
        cdef int status
        for status in range(STATUSES):
            PyMem_Free(self.counted[status])

    cdef void add(self, int status, double seconds, int64_t request_bytes, int64_t response_bytes) noexcept:
        cdef Counted* counted
        cdef int64_t ns = <int64_t> (seconds * 1e9)
        if not 0 <= status < STATUSES:
            status = UNKNOWN_STATUS
        counted = self.counted[status]
        if counted == NULL:
            counted = <Counted*> PyMem_Calloc(1, sizeof(Counted))
            if counted == NULL:
                return
            self.counted[status] = counted
        counted.ns += ns
        counted.request_bytes += request_bytes
        counted.response_bytes += response_bytes
        counted.times[time_bucket(ns)] += 1
        counted.requests[size_bucket(request_bytes)] += 1
        counted.responses[size_bucket(response_bytes)] += 1

    def count(self, int status, double seconds, int64_t request_bytes, int64_t response_bytes) -> None:
        """Count one call that has ended with a gRPC status, ``seconds`` after it came."""
        self.add(status, seconds, request_bytes, response_bytes)

    def snapshot(self):
        """Counts for each status that has occurred; of times and sizes one for each bound and one above the last."""
        cdef int status, at
        cdef Counted* counted
        found = []
        for status in range(STATUSES):
            counted = self.counted[status]
            if counted != NULL:
                found.append(CallCounts(
                    status,
                    [counted.times[at] for at in range(TIME_BOUNDS + 1)], counted.ns * 1e-9,
                    [counted.requests[at] for at in range(SIZE_BOUNDS + 1)], counted.request_bytes,
                    [counted.responses[at] for at in range(SIZE_BOUNDS + 1)], counted.response_bytes,
                ))
        return found
