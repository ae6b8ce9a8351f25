"""The common inference request, from bytes to bytes in one compiled call.

Common means: its copy is loaded, all its tensors are in the message and it has no parameters, and the model is known
to be fast enough for the event loop. Everything else is handed to the Python side, at the point where it turns out to
be uncommon. Nothing is kept between requests but one :class:`Prepared` for each copy; calls are made on the loop's
thread.

Requests for a model whose rows are independent are gathered: those that the loop reads in one turn run as one
inference in the next, where measurement says that this takes less time. A model that is asked by one caller at a time
is not made to wait for a second one: gathering begins when a request comes right behind another, or when one in a few
that is made to wait for the turn's end finds company, and it ends when they keep being alone.
"""

cimport cython
cimport numpy as cnp
from cpython.dict cimport PyDict_Next
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from mmcore._ext.batches cimport common_rows, mergeable, merged, parted
from mmcore._ext.responses cimport Shelf
from mmcore._ext.v2codec cimport (
    InferRequest, Signature, id_of, model_name_of, model_version_of, output_names_of, read_request,
)
from mmcore._ext.v2encode cimport write_response

from asyncio import _get_running_loop

cnp.import_array()

cdef enum:
    # After so many requests one goes the way that measures the model and decides anew; twice as many each time that it
    # decides as before. (One that turns out slow is noticed at once.)
    FIRST_MEASURED = 32
    LAST_MEASURED = 1024
    SLOW_NS = 300000
    # A merged inference may take the loop longer than one request: alone, its requests would take it longer still.
    SLOW_MERGED_NS = 3000000
    # One that does may have had its processor taken away.
    SLOW_TURNS = 3
    # Shorter calls are not worth the gathering.
    SHORT_NS = 4000
    # What comes so soon after the last inference was there before it ended.
    RIGHT_BEHIND_NS = 15000
    # Turns without company after which gathering ends; and, while it is off, one in so many requests tries anew.
    LONELY_TURNS = 16
    TRIED_EVERY = 16
    # Requests that run alone after merging has turned out to gain nothing.
    NOT_GAINED_PAUSE = 4096
    # Gathering, merging and answering later cost so much a request.
    GATHERING_NS = 700
    MOST_BYTES = 1048576
    SIZE_CLASSES = 65


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
@cython.freelist(64)
cdef class Gathered:
    """A request that waits for the turn's end."""

    cdef object call
    cdef InferRequest request
    cdef dict inputs
    cdef tuple names
    cdef int64_t rows
    cdef int64_t started
    cdef int64_t bound


@cython.final
cdef class Prepared:
    """What the compiled path needs of one copy, taken from it once; and what it knows of the copy's speed.

    Attributes:
        batched: whether the first dimension counts rows, so that a request of n rows counts as n inferences.

    ``merging`` is the lane's, None where requests are not merged; ``most_rows`` is what one request may have, 0: any
    number; ``shelf`` holds answers to be given again, None where none are. ``free`` tells whether an inference more
    may run, None where any number may.
    """

    cdef readonly bint batched
    cdef object merging
    cdef object copy                # while requests are gathered
    cdef list gathered
    cdef int64_t gathered_rows
    cdef int64_t gathered_bytes
    cdef int64_t most_rows
    cdef int64_t most_merged_rows
    cdef Py_ssize_t most_requests
    cdef bint scheduled
    cdef int slow_turns             # in a row
    cdef int turns_left             # of gathering without company
    cdef int untried                # requests since gathering was tried
    cdef int pause
    cdef int64_t ended              # the last inference
    cdef double merged_ns           # what merged inferences took of late, and their requests would have taken alone
    cdef double alone_ns
    cdef double[SIZE_CLASSES] cost  # of a request alone, in ns by its size class; 0: not known
    cdef Signature signature
    cdef object infer
    cdef object record
    cdef object record_part
    cdef object free
    cdef object fail
    cdef object hit
    cdef object miss
    cdef Shelf shelf
    cdef int64_t searched_ns        # for answers that were not there, not counted yet
    cdef str name
    cdef str version
    cdef uint64_t allowed
    cdef int left                   # until the next measurement
    cdef int interval               # between the last two

    def __init__(self, copy, merging=None, int64_t most_rows=0, Shelf shelf=None, free=None):
        self.free = free
        self.shelf = shelf
        self.merging = merging
        self.gathered = []
        self.most_rows = most_rows
        self.most_merged_rows = merging.most_rows if merging is not None else 0
        self.most_requests = merging.most_requests if merging is not None else 0
        self.merged_ns = self.alone_ns = 0
        self.signature = copy.signature
        self.infer = copy.model.infer
        self.record = copy.statistics.record
        self.record_part = copy.statistics.record_part
        self.fail = copy.statistics.fail
        self.hit = copy.statistics.hit
        self.miss = copy.statistics.miss
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
            self.left = self.interval = min(2 * self.interval, LAST_MEASURED) if self.interval else FIRST_MEASURED
        else:
            self.allowed &= ~bit
            self.interval = 0

    cdef bytes answered(self, InferRequest request):
        """The answer that the same request got before, None where there is none."""
        cdef int64_t began = now()
        cdef bytes message = self.shelf.find(request)
        if message is not None:
            self.hit(now() - began)
        else:
            self.searched_ns += now() - began
        return message

    def keep(self, InferRequest request not None, message) -> None:
        """Let the same request get the same answer again, where the model's settings say so."""
        cdef int64_t began
        if self.shelf is not None:
            began = now()
            self.shelf.keep(request, message)
            self.miss(now() - began + self.searched_ns)
            self.searched_ns = 0

    def close(self) -> None:
        """Forget answers: the copy gives no more."""
        if self.shelf is not None:
            self.shelf.close()

    cdef void learn(self, int64_t rows, int64_t elapsed) noexcept:
        """Note the time of one request alone; a processor taken away in the middle counts for no more than it must."""
        cdef double* cost = &self.cost[size_class(rows)]
        if cost[0] == 0:
            cost[0] = elapsed
        else:
            cost[0] += (min(<double> elapsed, 8 * cost[0]) - cost[0]) / 8

    cdef bint gathers(self, int64_t rows, int64_t started) noexcept:
        """Whether a request should wait for the turn's end."""
        if self.gathered:
            return True
        if self.pause > 0:
            self.pause -= 1
            return False
        if self.cost[size_class(rows)] < SHORT_NS:
            return False
        if self.turns_left > 0:
            return True
        self.untried += 1
        if self.untried >= TRIED_EVERY or started - self.ended < RIGHT_BEHIND_NS:
            self.untried = 0
            return True
        return False

    cdef void found(self, Py_ssize_t requests) noexcept:
        """Learn from a turn how many requests come together."""
        if requests > 1:
            self.turns_left = LONELY_TURNS
        elif self.turns_left > 0:
            self.turns_left -= 1

    cdef void gained(self, list group, int64_t elapsed) noexcept:
        """Learn from a merged inference whether merging gains time."""
        cdef double expected = 0
        cdef double cost
        cdef Gathered one
        for one in group:
            cost = self.cost[size_class(one.rows)]
            if cost == 0:
                return
            expected += cost
        if self.alone_ns == 0:
            self.alone_ns = 8 * expected
            self.merged_ns = self.alone_ns / 2
        # No single one tells: the processor may have been taken away in the middle. And those of two or three, which
        # gain the least, tell less than those of many.
        self.merged_ns += min(1.5 * expected, elapsed + GATHERING_NS * <double> len(group)) - self.merged_ns / 8
        self.alone_ns += expected - self.alone_ns / 8
        if self.merged_ns > 0.95 * self.alone_ns:
            self.pause = NOT_GAINED_PAUSE
            self.merged_ns = self.alone_ns = 0
            self.turns_left = 0


@cython.final
cdef class CommonPath:
    """The handler of ModelInfer.

    Attributes:
        tracing: whether requests are traced, for which all go the uncommon way.

    ``lookup`` is the routing table's. ``uncommon(call, request, copy, started)`` takes a request that is not common,
    ``measured(call, request, copy, inputs, started, bound)`` one that is and shall be measured, or may not run on
    the loop; both return the answer or None when it comes later. ``slow(copy, rows, elapsed)`` hears of inferences that
    took longer than they should, ``refuse(call, error, what)`` answers an error that comes later. Times are nanoseconds
    of the monotonic clock.
    """

    cdef public bint tracing
    cdef object lookup
    cdef object uncommon
    cdef object measured
    cdef object slow
    cdef object refuse

    def __init__(self, lookup, uncommon, measured, slow, refuse):
        self.refuse = refuse
        self.lookup = lookup
        self.uncommon = uncommon
        self.measured = measured
        self.slow = slow

    def infer(self, call, bytes body not None):
        """The encoded answer to an encoded request, or None when it comes later.

        Raises MmcoreError whatever refuses the request, and what a model raises as it is.
        """
        cdef int64_t started = now()
        cdef int64_t bound, inferred, rows, size_bytes
        cdef Prepared prepared
        cdef InferRequest request = read_request(body)
        cdef dict inputs
        copy = self.lookup(model_name_of(request), model_version_of(request))
        if copy is None or self.tracing or not request.layout.plain or request.layout.has_parameters:
            return self.uncommon(call, request, copy, started)
        prepared = <Prepared?> copy.prepared if copy.prepared is not None else None
        if prepared is None:
            return self.uncommon(call, request, copy, started)
        if prepared.shelf is not None:
            message = prepared.answered(request)
            if message is not None:
                return message
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
            or 0 < prepared.most_rows < rows
            or not prepared.allowed >> size_class(rows) & 1
            or (deadline is not None and <double> deadline <= bound * 1e-9)
            or (prepared.free is not None and not prepared.free())
        ):
            return self.measured(call, request, copy, inputs, started, bound)
        if prepared.merging is not None and prepared.gathers(rows, started):
            if common_rows(inputs, &size_bytes) == rows and self.gather(
                prepared, copy, call, request, inputs, rows, size_bytes, started, bound
            ):
                return None
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
        prepared.ended = now()
        prepared.record(
            rows if prepared.batched else 1, 0, bound - started, inferred - bound, prepared.ended - inferred
        )
        prepared.learn(rows, inferred - bound)
        if inferred - bound > SLOW_NS:
            prepared.left = prepared.interval = 0
            self.slow(copy, rows, inferred - bound)
        if prepared.shelf is not None:
            prepared.keep(request, message)
        return message

    cdef bint gather(
        self, Prepared prepared, copy, call, InferRequest request, dict inputs,
        int64_t rows, int64_t size_bytes, int64_t started, int64_t bound,
    ) except -1:
        """Let a request wait for the turn's end; False where it should run at once."""
        cdef Gathered one
        if not prepared.merging.active or size_bytes > MOST_BYTES or rows > prepared.most_merged_rows:
            return False
        if prepared.gathered and (
            len(prepared.gathered) >= prepared.most_requests
            or prepared.gathered_rows + rows > prepared.most_merged_rows
            or prepared.gathered_bytes + size_bytes > MOST_BYTES
        ):
            self.end_turn(prepared)
        if not prepared.scheduled:
            loop = _get_running_loop()
            if loop is None:
                return False
            loop.call_soon(self.turn_ended, prepared)
            prepared.scheduled = True
        if prepared.copy is None:
            copy.acquire()
            prepared.copy = copy
        one = Gathered.__new__(Gathered)
        one.call = call
        one.request = request
        one.inputs = inputs
        one.names = output_names_of(request)
        one.rows = rows
        one.started = started
        one.bound = bound
        prepared.gathered.append(one)
        prepared.gathered_rows += rows
        prepared.gathered_bytes += size_bytes
        return True

    def turn_ended(self, Prepared prepared not None) -> None:
        """The loop's callback: run what has been gathered in its last turn."""
        prepared.scheduled = False
        self.end_turn(prepared)

    cdef int end_turn(self, Prepared prepared) except -1:
        cdef list gathered = prepared.gathered
        cdef list group
        cdef list others
        cdef Gathered first
        cdef Gathered one
        copy = prepared.copy
        if copy is None:
            return 0
        prepared.gathered = []
        prepared.gathered_rows = 0
        prepared.gathered_bytes = 0
        prepared.copy = None
        try:
            gathered = [one for one in gathered if not one.call.cancelled]
            prepared.found(len(gathered))
            if prepared.free is not None and not prepared.free():
                for one in gathered:
                    self.hand_on(copy, one)
                return 0
            while gathered:
                first = <Gathered> gathered[0]
                group = []
                others = []
                for one in gathered:
                    if one is first or (mergeable(first.inputs, one.inputs) and first.names == one.names):
                        group.append(one)
                    else:
                        others.append(one)
                self.run_group(prepared, copy, group)
                gathered = others
            prepared.ended = now()
        finally:
            copy.release()
        return 0

    cdef int hand_on(self, copy, Gathered one) except -1:
        """Let a gathered request wait for its turn in a thread after all."""
        try:
            message = self.measured(one.call, one.request, copy, one.inputs, one.started, one.bound)
        except (Exception, SystemExit) as failure:
            self.refuse(one.call, failure, f"inference of model {copy.name}")
            return 0
        if message is not None:
            one.call.reply(message)
        return 0

    cdef int run_group(self, Prepared prepared, copy, list group) except -1:
        """Run requests that can be merged, and answer them."""
        cdef int64_t began = now()
        cdef int64_t inferred
        cdef Gathered first = <Gathered> group[0]
        cdef Gathered last = <Gathered> group[len(group) - 1]
        cdef Gathered one
        cdef list rows = [one.rows for one in group]
        cdef list members
        cdef list parts = None
        cdef Py_ssize_t at
        cdef bint check = False
        cdef int64_t total = 0
        if len(group) > 1 and prepared.merging.active:
            members = [one.inputs for one in group]
            check = prepared.merging.check_due(first.inputs, last.inputs)
            if not check:
                try:
                    parts = parted(prepared.infer(merged(members), first.names), rows)
                except (Exception, SystemExit):
                    # One of them is at fault, or the merging; which it is shows when each runs alone.
                    pass
        if parts is not None:
            inferred = now()
            prepared.gained(group, inferred - began)
            total = sum(rows)
            for at in range(len(group)):
                one = <Gathered> group[at]
                self.answer(prepared, one, parts[at], None, total, began, inferred - began, at == 0)
            prepared.slow_turns = prepared.slow_turns + 1 if inferred - began > SLOW_MERGED_NS else 0
            if prepared.slow_turns >= SLOW_TURNS:
                self.slow(copy, first.rows, inferred - began)
                prepared.left = prepared.interval = 0
            return 0
        members = [one.inputs for one in group]
        if check or len(group) == 1:
            results = prepared.merging.run(prepared.infer, members, rows, first.names, check=check)
        else:
            results = prepared.merging.each_alone(prepared.infer, members, rows, first.names)
        for at in range(len(group)):
            one = <Gathered> group[at]
            outputs, error, infer_ns, ran_rows, leads = results[at]
            if ran_rows == one.rows and error is None:
                prepared.learn(one.rows, infer_ns)
                if len(group) == 1 and infer_ns > SLOW_NS:
                    prepared.left = prepared.interval = 0
                    self.slow(copy, one.rows, infer_ns)
            self.answer(prepared, one, outputs, error, ran_rows, began, infer_ns, leads)
        return 0

    cdef int answer(
        self, Prepared prepared, Gathered one, outputs, error,
        int64_t batch, int64_t began, int64_t infer_ns, bint leads,
    ) except -1:
        """Answer one gathered request; a fault in it is its own alone."""
        cdef int64_t inferred = now()
        try:
            if error is not None:
                raise error
            message = write_response(
                prepared.name, prepared.version, id_of(one.request), outputs, not one.request.layout.typed
            )
            one.call.reply(message)
        except (Exception, SystemExit) as failure:
            prepared.fail(now() - one.started)
            self.refuse(one.call, failure, f"inference of model {prepared.name}")
            return 0
        prepared.record_part(
            batch, one.rows, leads, began - one.bound, one.bound - one.started, infer_ns, now() - inferred
        )
        if prepared.shelf is not None:
            prepared.keep(one.request, message)
        return 0
