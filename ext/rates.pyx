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

# What all copies of this process count together, those that are gone too: what a scrape reads, whose cost must not
# depend on the number of models. Upper bounds in ns and in rows; the last count of each is of what lies above them.
cdef enum:
    TIME_BOUNDS = 24
    ROW_BOUNDS = 11

cdef int64_t[TIME_BOUNDS] TIME_BOUND_NS = [
    10000, 25000, 50000, 100000, 250000, 500000, 1000000, 2000000, 5000000, 10000000, 20000000, 50000000, 75000000,
    100000000, 200000000, 500000000, 1000000000, 2000000000, 5000000000, 10000000000, 20000000000, 60000000000,
    120000000000, 300000000000,
]
cdef int64_t[ROW_BOUNDS] ROW_BOUND = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]

cdef struct Together:
    int64_t failed
    int64_t rows
    int64_t hits
    int64_t misses
    int64_t total_ns
    int64_t queue_ns
    int64_t infer_ns
    int64_t executed_rows
    int64_t[TIME_BOUNDS + 1] total
    int64_t[TIME_BOUNDS + 1] queue
    int64_t[TIME_BOUNDS + 1] infer
    int64_t[ROW_BOUNDS + 1] batch

cdef Together together

TimeHistogram = namedtuple("TimeHistogram", ("counts", "sum_ns"))
Totals = namedtuple(
    "Totals", ("failed", "rows", "hits", "misses", "total", "queue", "infer", "batch_counts", "executed_rows")
)

TIME_BOUNDS_NS = tuple([TIME_BOUND_NS[at] for at in range(TIME_BOUNDS)])
BATCH_BOUNDS = tuple([ROW_BOUND[at] for at in range(ROW_BOUNDS)])


cdef inline int bucket(const int64_t* bounds, int count, int64_t value) noexcept nogil:
    """The first bound that is not below the value; ``count`` where all are."""
    cdef int low = 0, high = count, middle
    while low < high:
        middle = (low + high) >> 1
        if bounds[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


cdef inline int count_together(int64_t rows, int64_t queue_ns, int64_t infer_ns, int64_t total_ns) noexcept nogil:
    """One request that was answered by an inference; the place of its whole time among the bounds."""
    cdef int place = bucket(TIME_BOUND_NS, TIME_BOUNDS, total_ns)
    together.rows += rows
    together.queue_ns += queue_ns
    together.infer_ns += infer_ns
    together.total_ns += total_ns
    together.queue[bucket(TIME_BOUND_NS, TIME_BOUNDS, queue_ns)] += 1
    together.infer[bucket(TIME_BOUND_NS, TIME_BOUNDS, infer_ns)] += 1
    together.total[place] += 1
    return place


cdef inline void count_batch(int64_t rows) noexcept nogil:
    """One inference over so many rows."""
    together.executed_rows += rows
    together.batch[bucket(ROW_BOUND, ROW_BOUNDS, rows)] += 1


def totals():
    """What all copies have counted since the process began.

    Histograms hold a count for each bound and one for what lies above the last.
    """
    return Totals(
        together.failed, together.rows, together.hits, together.misses,
        TimeHistogram([together.total[at] for at in range(TIME_BOUNDS + 1)], together.total_ns),
        TimeHistogram([together.queue[at] for at in range(TIME_BOUNDS + 1)], together.queue_ns),
        TimeHistogram([together.infer[at] for at in range(TIME_BOUNDS + 1)], together.infer_ns),
        [together.batch[at] for at in range(ROW_BOUNDS + 1)], together.executed_rows,
    )


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
    cdef int64_t[TIME_BOUNDS + 1] times
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
        self.times[count_together(batch, queue_ns, infer_ns, queue_ns + input_ns + infer_ns + output_ns)] += 1
        count_batch(batch)
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
        self.times[count_together(rows, queue_ns, infer_ns, queue_ns + input_ns + infer_ns + output_ns)] += 1
        if leads:
            self.executions += 1
            count_batch(batch)
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
        self.times[bucket(TIME_BOUND_NS, TIME_BOUNDS, total_ns)] += 1
        together.hits += 1
        self.last_ms = read_clock(CLOCK_REALTIME) // 1000000

    def miss(self, int64_t total_ns) -> None:
        """Count one request whose answer the response cache had to be given; it took ``total_ns`` for all it did."""
        self.misses += 1
        self.miss_ns += total_ns
        together.misses += 1

    def fail(self, int64_t total_ns) -> None:
        """Count one request that was answered with an error after ``total_ns`` nanoseconds."""
        self.failed += 1
        self.fail_ns += total_ns
        together.failed += 1
        self.last_ms = read_clock(CLOCK_REALTIME) // 1000000

    def times_by_bound(self):
        """The requests answered, by their whole time: a count for each bound of TIME_BOUNDS_NS and one for the rest."""
        return [self.times[at] for at in range(TIME_BOUNDS + 1)]

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
