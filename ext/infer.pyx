"""The common inference request, from bytes to bytes in one compiled call.

Common means: its copy is loaded, all its tensors are in the message and it has no parameters, and the model is known
to be fast enough for the event loop. Everything else is handed to the Python side, at the point where it turns out to
be uncommon. Nothing is kept between requests but one :class:`Prepared` for each copy; calls are made on the loop's
thread.
"""

cimport cython
cimport numpy as cnp
from cpython.dict cimport PyDict_Next
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from mmcore._ext.v2codec cimport (
    InferRequest, Signature, id_of, model_name_of, model_version_of, output_names_of, read_request,
)
from mmcore._ext.v2encode cimport write_response

cnp.import_array()

cdef enum:
    # Every so many requests one goes the way that measures the model and decides anew.
    MEASURED_EVERY = 32
    SLOW_NS = 300000


cdef inline int64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t> time.tv_sec * 1000000000 + time.tv_nsec


cdef inline int64_t first_dimension(dict inputs) noexcept:
    """The first dimension of the first array, at least 1."""
    cdef Py_ssize_t position = 0
    cdef PyObject* key
    cdef PyObject* value
    if PyDict_Next(inputs, &position, &key, &value) and cnp.PyArray_Check(<object> value) and cnp.PyArray_NDIM(
        <cnp.ndarray> value
    ):
        return max(1, cnp.PyArray_DIM(<cnp.ndarray> value, 0))
    return 1


cdef extern from *:
    int count_leading_zeros "__builtin_clzll"(unsigned long long value) noexcept


cdef inline int size_class(int64_t rows) noexcept:
    """The number of binary digits of a number of rows; of a batch without rows as well, whose digits C cannot count."""
    return 64 - count_leading_zeros(<uint64_t> rows | 1)


@cython.final
cdef class Prepared:
    """What the compiled path needs of one copy, taken from it once; and what it knows of the copy's speed.

    Attributes:
        batched: whether the first dimension counts rows, so that a request of n rows counts as n inferences.
    """

    cdef readonly bint batched
    cdef Signature signature
    cdef object infer
    cdef object record
    cdef object fail
    cdef str name
    cdef str version
    cdef uint64_t allowed
    cdef int left

    def __init__(self, copy):
        self.signature = copy.signature
        self.infer = copy.model.infer
        self.record = copy.statistics.record
        self.fail = copy.statistics.fail
        self.name = copy.name
        self.version = copy.version
        self.batched = all([bool(spec.shape) and spec.shape[0] == -1 for spec in copy.model.inputs])

    def allow(self, int64_t rows, bint allowed) -> None:
        """Let inferences of about so many rows run in the compiled path until the next measurement, or no more.

        About as many are those with as many binary digits.
        """
        cdef uint64_t bit = <uint64_t> 1 << size_class(rows)
        if allowed:
            self.allowed |= bit
            self.left = MEASURED_EVERY
        else:
            self.allowed &= ~bit


@cython.final
cdef class CommonPath:
    """The handler of ModelInfer.

    Attributes:
        tracing: whether requests are traced, for which all go the uncommon way.

    ``lookup`` is the routing table's. ``uncommon(call, request, copy, started)`` takes a request that is not common,
    ``measured(call, request, copy, inputs, started, bound)`` one that is and shall be measured, or may not run on
    the loop; both return the answer or None when it comes later. ``slow(copy, rows, elapsed)`` hears of inferences
    that took longer than they should. Times are nanoseconds of the monotonic clock.
    """

    cdef public bint tracing
    cdef object lookup
    cdef object uncommon
    cdef object measured
    cdef object slow

    def __init__(self, lookup, uncommon, measured, slow):
        self.lookup = lookup
        self.uncommon = uncommon
        self.measured = measured
        self.slow = slow

    def infer(self, call, bytes body not None):
        """The encoded answer to an encoded request, or None when it comes later.

        Raises MmcoreError whatever refuses the request, and what a model raises as it is.
        """
        cdef int64_t started = now()
        cdef int64_t bound, inferred, rows
        cdef Prepared prepared
        cdef InferRequest request = read_request(body)
        cdef dict inputs
        copy = self.lookup(model_name_of(request), model_version_of(request))
        if copy is None or self.tracing or not request.layout.plain or request.layout.has_parameters:
            return self.uncommon(call, request, copy, started)
        prepared = <Prepared?> copy.prepared if copy.prepared is not None else None
        if prepared is None:
            return self.uncommon(call, request, copy, started)
        try:
            inputs = prepared.signature.bound(request)
        except Exception:
            prepared.fail(now() - started)
            raise
        bound = now()
        rows = first_dimension(inputs)
        deadline = call.deadline
        if (
            prepared.left <= 0
            or not prepared.allowed >> size_class(rows) & 1
            or (deadline is not None and <double> deadline <= bound * 1e-9)
        ):
            return self.measured(call, request, copy, inputs, started, bound)
        prepared.left -= 1
        try:
            outputs = prepared.infer(inputs, output_names_of(request))
            inferred = now()
            message = write_response(
                prepared.name, prepared.version, id_of(request), outputs, not request.layout.typed
            )
        except Exception:
            prepared.fail(now() - started)
            raise
        prepared.record(rows if prepared.batched else 1, 0, bound - started, inferred - bound, now() - inferred)
        if inferred - bound > SLOW_NS:
            prepared.left = 0
            self.slow(copy, rows, inferred - bound)
        return message
