"""Counters of one copy: what was answered, how long each part of it took, and by which batch size.

Everything is a C integer in the owning object, so that counting costs tens of nanoseconds. Calls are made with the GIL
held, in practice from the event loop's thread; a snapshot is a plain tuple and may go anywhere.
The parts are those of Triton's statistics extension: queue, compute input, compute infer, compute output.
"""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.stdint cimport int64_t
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec

from collections import namedtuple

Duration = namedtuple("Duration", ("count", "ns"))
BatchStatistics = namedtuple("BatchStatistics", ("batch_size", "compute_input", "compute_infer", "compute_output"))
Statistics = namedtuple(
    "Statistics",
    (
        "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
        "inference_count", "execution_count", "last_inference_ms", "batches",
    ),
)

# Clients choose batch sizes: beyond so many distinct ones, those that come are counted in the sums alone.
cdef enum:
    BATCH_SIZES_KEPT = 256
    BATCH_SIZES_FIRST = 4

cdef struct BatchCounters:
    int64_t size
    int64_t count
    int64_t input_ns
    int64_t infer_ns
    int64_t output_ns


cdef inline int64_t read_clock(int which) noexcept nogil:
    cdef timespec now
    clock_gettime(which, &now)
    return <int64_t> now.tv_sec * 1000000000 + now.tv_nsec


def now_ns() -> int:
    """Nanoseconds of the monotonic clock, the one ``time.monotonic_ns`` reads."""
    return read_clock(CLOCK_MONOTONIC)


@cython.final
cdef class ModelStatistics:
    """The counters of one copy, from zero."""

    cdef int64_t succeeded
    cdef int64_t failed
    cdef int64_t success_ns
    cdef int64_t fail_ns
    cdef int64_t queue_ns
    cdef int64_t input_ns
    cdef int64_t infer_ns
    cdef int64_t output_ns
    cdef int64_t hits
    cdef int64_t hit_ns
    cdef int64_t misses
    cdef int64_t miss_ns
    cdef int64_t rows
    cdef int64_t executions
    cdef int64_t last_ms
    cdef BatchCounters* batches
    cdef Py_ssize_t batch_count
    cdef Py_ssize_t batch_room
    cdef Py_ssize_t batch_last

    def __cinit__(self):
        self.batches = NULL

    def __dealloc__(self):
        PyMem_Free(self.batches)

    cdef BatchCounters* counters(self, int64_t size) except? NULL:
        """The counters of a batch size, NULL when too many sizes have been seen."""
        cdef Py_ssize_t index
        cdef Py_ssize_t room
        cdef BatchCounters* grown
        if self.batch_last < self.batch_count and self.batches[self.batch_last].size == size:
            return &self.batches[self.batch_last]
        for index in range(self.batch_count):
            if self.batches[index].size == size:
                self.batch_last = index
                return &self.batches[index]
        if self.batch_count == BATCH_SIZES_KEPT:
            return NULL
        if self.batch_count == self.batch_room:
            room = self.batch_room * 2 if self.batch_room else BATCH_SIZES_FIRST
            grown = <BatchCounters*> PyMem_Realloc(self.batches, room * sizeof(BatchCounters))
            if grown == NULL:
                raise MemoryError
            self.batches = grown
            self.batch_room = room
        index = self.batch_count
        self.batches[index] = BatchCounters(size, 0, 0, 0, 0)
        self.batch_count = index + 1
        self.batch_last = index
        return &self.batches[index]

    def record(self, int64_t batch, int64_t queue_ns, int64_t input_ns, int64_t infer_ns, int64_t output_ns) -> None:
        """Count one request that was answered, run by itself.

        ``batch`` is its number of rows, at least 1; the four times, in nanoseconds, are what it waited and what
        decoding, the model and encoding took.
        """
        cdef BatchCounters* counters
        self.succeeded += 1
        self.executions += 1
        self.rows += batch
        self.queue_ns += queue_ns
        self.input_ns += input_ns
        self.infer_ns += infer_ns
        self.output_ns += output_ns
        self.success_ns += queue_ns + input_ns + infer_ns + output_ns
        self.last_ms = read_clock(CLOCK_REALTIME) // 1000000
        counters = self.counters(batch)
        if counters != NULL:
            counters.count += 1
            counters.input_ns += input_ns
            counters.infer_ns += infer_ns
            counters.output_ns += output_ns

    def record_part(
        self, int64_t batch, int64_t rows, bint leads,
        int64_t queue_ns, int64_t input_ns, int64_t infer_ns, int64_t output_ns,
    ) -> None:
        """Count one request of ``rows`` rows, answered by an inference over ``batch`` rows, others' among them.

        ``infer_ns`` is that inference's whole time, which each of its requests took; exactly one of them ``leads``,
        with which the inference is counted.
        """
        cdef BatchCounters* counters
        self.succeeded += 1
        self.rows += rows
        self.queue_ns += queue_ns
        self.input_ns += input_ns
        self.infer_ns += infer_ns
        self.output_ns += output_ns
        self.success_ns += queue_ns + input_ns + infer_ns + output_ns
        self.last_ms = read_clock(CLOCK_REALTIME) // 1000000
        if leads:
            self.executions += 1
        counters = self.counters(batch)
        if counters != NULL:
            counters.input_ns += input_ns
            counters.output_ns += output_ns
            if leads:
                counters.count += 1
                counters.infer_ns += infer_ns

    def hit(self, int64_t total_ns) -> None:
        """Count one request that was answered from the response cache within ``total_ns`` nanoseconds.

        As with Triton it is a success that ran nothing: it counts in ``success`` and ``queue``, not in what computes.
        """
        self.succeeded += 1
        self.success_ns += total_ns
        self.hits += 1
        self.hit_ns += total_ns
        self.last_ms = read_clock(CLOCK_REALTIME) // 1000000

    def miss(self, int64_t total_ns) -> None:
        """Count one request whose answer the response cache had to be given; it took ``total_ns`` for all it did."""
        self.misses += 1
        self.miss_ns += total_ns

    def fail(self, int64_t total_ns) -> None:
        """Count one request that was answered with an error after ``total_ns`` nanoseconds."""
        self.failed += 1
        self.fail_ns += total_ns
        self.last_ms = read_clock(CLOCK_REALTIME) // 1000000

    def snapshot(self):
        """All counters at this moment, batch sizes ascending."""
        cdef Py_ssize_t index
        cdef BatchCounters counters
        batches = []
        for index in range(self.batch_count):
            counters = self.batches[index]
            batches.append(
                BatchStatistics(
                    counters.size,
                    Duration(counters.count, counters.input_ns),
                    Duration(counters.count, counters.infer_ns),
                    Duration(counters.count, counters.output_ns),
                )
            )
        batches.sort()
        return Statistics(
            Duration(self.succeeded, self.success_ns),
            Duration(self.failed, self.fail_ns),
            Duration(self.succeeded, self.queue_ns),
            Duration(self.succeeded - self.hits, self.input_ns),
            Duration(self.succeeded - self.hits, self.infer_ns),
            Duration(self.succeeded - self.hits, self.output_ns),
            Duration(self.hits, self.hit_ns),
            Duration(self.misses, self.miss_ns),
            self.rows,
            self.executions,
            self.last_ms,
            tuple(batches),
        )
