"""A unary request passed through to the runtime that holds its model, and the answer passed back: no task or decoding.

What is sent on are the request's own bytes and metadata; only the model's id is put where the runtime wants it. Which
copy, and what is to be done when the runtime does not answer, is decided in ``mmcore/server``. Memory: the request's
message is sent from where it lies, as is the answer's. Threads: that of one event loop.
"""

import cython

from libc.stdint cimport int64_t, uint8_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from mmcore._ext.h2 cimport CANCELLED, OK, RESOURCE_EXHAUSTED, Method, encode_metadata
from mmcore._ext.h2client cimport ClientCall, ClientSession
from mmcore._ext.h2server cimport ServerCall
from mmcore._ext.lru cimport Entry
from mmcore._ext.onward cimport encodings, open_stream, pass_answer, pass_refusal

import base64
from collections import deque

from mmcore._ext.pbwire import find_string, replace_string
from mmcore.errors import Overloaded

#: Requests that may wait for a model that answers only so many at once.
MOST_WAITING = 1000

#: What HTTP/1.1 says of its own message, where a request came by REST.
HTTP_HEADERS = frozenset({
    "accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host",
    "inference-header-content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "user-agent",
})

#: W3C Trace Context, section 3.
TRACE_CONTEXT = (b"traceparent", b"tracestate")


cdef inline int64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t> time.tv_sec * 1000000000 + time.tv_nsec


def kept_pairs(list pairs not None):
    """The encoded metadata that a runtime may see: not what clients, instances and connections tell each other."""
    return [
        pair for pair in pairs
        if not (<bytes>pair[0]).startswith((b"mm-", b"mmcore-", b"grpc-"))
        and pair[0] != b"user-agent" and pair[0] != b"tas-model-id"
    ]


cdef inline int give_back(object copy) except -1:
    """Return a lease; the copy itself looks at the last one alone."""
    if (<Entry?> copy).pins > 1:
        copy.unpin()
    else:
        copy.release()
    return 0


@cython.final
cdef class Target:
    """A copy as its runtime knows it.

    Attributes:
        copy: what requests take a lease of, which is a pin of the entry.
        id: the runtime's name for it.
        headers: encoded metadata that tell the runtime which model is asked for, as ModelMesh writes them.
        limit: requests that may be there at once; 0: any number.
        running: how many are.
    """

    cdef readonly object copy
    cdef readonly str id
    cdef readonly list headers
    cdef readonly Py_ssize_t limit
    cdef readonly Py_ssize_t running
    cdef object waiting

    def __init__(self, copy not None, str known_as not None, Py_ssize_t limit=0):
        self.copy = copy
        self.id = known_as
        self.limit = limit
        self.headers = [(b"mm-model-id-bin", base64.b64encode(known_as.encode()))]
        if known_as.isascii() and known_as.isprintable():
            self.headers.append((b"mm-model-id", known_as.encode()))
        self.waiting = deque()

    def close(self):
        """The copy takes no more requests; those that wait are still answered, which is what their leases are for."""


@cython.final
cdef class Way:
    """How requests of one method are passed through.

    Attributes:
        name, path: the method, ``package.Service/Method`` and with a slash before it.
        extraction: the fields that lead to the model's name in its requests; empty: it is not there.
        injection: those that lead to where the model's id is to be; None: nowhere.
        versioned: whether the second field is the model's version.
    """

    cdef readonly str name
    cdef readonly str path
    cdef readonly tuple extraction
    cdef readonly tuple injection
    cdef readonly bint versioned
    cdef bint same            # where the name is and where the id is to be

    def __init__(self, str name not None, tuple extraction not None, tuple injection, bint versioned):
        self.name = name
        self.path = f"/{name}"
        self.extraction = extraction
        self.injection = injection
        self.versioned = versioned
        self.same = extraction == injection


@cython.final
@cython.freelist(256)
cdef class Asked:
    """What is known of a request, to ask once more where that is needed.

    Attributes:
        way: its method.
        name: what its message says of the model, a vmodel's name too; empty: nothing.
        kind: what kind of name that is.
        version: the model's, as the message says.
        began: nanoseconds of the monotonic clock when it came.
        sent: how often it was sent to the runtime.
    """

    cdef readonly Way way
    cdef readonly str name
    cdef readonly object kind
    cdef readonly str version
    cdef readonly int64_t began
    cdef public int sent


@cython.final
cdef class Quick:
    """Answers a unary method: requests for a copy that is here are sent at once, all others go to ``otherwise``.

    ``kind`` is that of a name in a message, ``lookup(name, version)`` gives the copy or None, and ``otherwise`` gets
    the call, the message and an :class:`Asked`. A copy at whose runtime ``shared_from`` requests are is another one's
    to think of; 0: none is. ``way`` is where the names of methods lead, which may be cleared.
    """

    cdef Passing owner
    cdef str method
    cdef object kind
    cdef object lookup
    cdef object otherwise
    cdef Py_ssize_t shared_from

    def __init__(
        self, Passing owner not None, str method not None, kind, lookup not None, otherwise not None,
        Py_ssize_t shared_from=0,
    ):
        self.owner = owner
        self.method = method
        self.kind = kind
        self.lookup = lookup
        self.otherwise = otherwise
        self.shared_from = shared_from

    def __call__(self, call not None, bytes body not None):
        cdef int64_t began = now()
        cdef Way way = self.owner.ways.get(self.method) or self.owner.describe(self.method)
        cdef Asked asked = asked_by(way, body, self.kind, began)
        cdef Target target
        if asked.name:
            copy = self.lookup(asked.name, asked.version)
            if copy is not None:
                target = copy.prepared
                if target is None:
                    target = self.owner.target(copy)
                if not self.shared_from or target.running < self.shared_from:
                    asked.sent = 1
                    self.owner.pass_on(call, body, target, asked)
                    return None
        self.otherwise(call, body, asked)


cdef tuple VERSION = (2,)


cpdef Asked asked_by(Way way, bytes body, object kind, int64_t began):
    """What a message says.

    Raises:
        InvalidRequest: it is malformed.
    """
    cdef Asked asked = Asked.__new__(Asked)
    asked.way = way
    asked.name = find_string(body, way.extraction) if way.extraction else ""
    asked.version = find_string(body, VERSION) if way.versioned else ""
    asked.kind = kind
    asked.began = began
    return asked


@cython.final
@cython.freelist(256)
cdef class Passed:
    """One unary request on its way to the runtime. Made by :class:`Passing` only.

    Attributes:
        call, body, target: as they were given.
        again: what :meth:`Passing.failed` needs to ask once more.
        over: it is answered, or nobody waits for the answer any more.
    """

    cdef readonly object call
    cdef readonly bytes body
    cdef readonly Target target
    cdef readonly Asked again
    cdef readonly bint over
    cdef Passing owner
    cdef ServerCall asked     # the call, where the transport itself has it
    cdef bytes message
    cdef uint8_t flag
    cdef Method method
    cdef ClientCall sent
    cdef int64_t began
    cdef int64_t sent_at
    cdef bint running

    def cancel(self):
        """Nobody waits for the answer any more."""
        self.over = True
        if self.sent is not None:
            self.sent.stop(CANCELLED, "the caller has gone")

    def send(self):
        """Send it, now that there is a connection; for one that was handed to :meth:`Passing.connect`."""
        if self.over:
            self.owner.ended(self)
        else:
            self.owner.submit(self)

    def answered(self, ClientCall call not None):
        """The transport's callback: the runtime has answered, or never will."""
        cdef int64_t ended = now()
        self.sent = None
        if call.grpc_status == OK and not self.over:
            self.target.copy.statistics.record(1, self.sent_at - self.began, 0, ended - self.sent_at, 0)
            self.owner.ended(self)
            self.over = True
            pass_answer(self.call, self.asked, call)
            return
        if not self.over:
            self.target.copy.statistics.fail(ended - self.began)
        self.owner.ended(self)
        if not self.over:
            self.owner.failed(self, call)

    def refuse(self, ClientCall call not None):
        """Pass on an answer that is an error."""
        self.over = True
        pass_refusal(self.call, self.asked, call)


cdef class Passing:
    """Passes unary requests through to one runtime.

    Attributes:
        session: the connection to it; None while there is none.
        in_flight: requests sent and not answered.
        ways: those that are known, by the methods' names.
    """

    cdef public ClientSession session
    cdef readonly Py_ssize_t in_flight
    cdef readonly dict ways
    cdef dict methods

    def __init__(self):
        self.ways = {}
        self.methods = {}

    def unary(self, call not None, bytes body not None, Target target not None, Asked asked not None):
        """Have a request answered by the runtime; the answer comes later through ``call``.

        Args:
            call: a ServerCall, or what has its metadata, deadline, cancelled, on_cancel, reply and fail.
            body: the message.
            target: the copy that answers.
            asked: what is known of it.

        Raises:
            Overloaded: too many wait for this model already.
            InvalidRequest: the message is malformed.
        """
        self.pass_on(call, body, target, asked)

    cdef int pass_on(self, object call, bytes body, Target target, Asked asked) except -1:
        cdef Way way = asked.way
        cdef Passed passed = Passed.__new__(Passed)
        passed.owner = self
        passed.call = call
        passed.body = passed.message = body
        passed.target = target
        passed.again = asked
        passed.began = asked.began
        if isinstance(call, ServerCall):
            passed.asked = <ServerCall>call
        if way.injection is not None and not (way.same and asked.name == target.id):
            passed.message = replace_string(body, way.injection, target.id)
        elif passed.asked is not None and passed.asked.packed is not None and body is passed.asked.body:
            passed.message = passed.asked.packed
            passed.flag = 1
        passed.method = self.method(way.path)
        if target.limit and target.running >= target.limit:
            if len(target.waiting) >= MOST_WAITING:
                raise Overloaded(f"Model queue overload: {MOST_WAITING} requests wait for model '{target.id}'")
            target.copy.pin()
            call.on_cancel = passed.cancel
            target.waiting.append(passed)
            return 0
        target.copy.pin()
        return self.start(passed)

    cdef int start(self, Passed passed) except -1:
        passed.target.running += 1
        passed.running = True
        self.in_flight += 1
        passed.call.on_cancel = passed.cancel
        if self.session is None or not self.session.takes_calls():
            self.connect(passed)
            return 0
        return self.submit(passed)

    cdef int submit(self, Passed passed) except -1:
        cdef ClientCall call = ClientCall.__new__(ClientCall)
        cdef ServerCall asked = passed.asked
        cdef list encoded = passed.target.headers
        if asked is not None:
            if asked.closed or asked.finished or asked.target is None:
                passed.over = True
                return self.ended(passed)
            if asked.metadata_bytes:
                encoded = encoded + kept_pairs(asked.pairs_between(0, asked.metadata_bytes))
            encoded = encodings(encoded, asked, call, passed.flag)
            deadline = asked.deadline
        else:
            if passed.call.cancelled:
                passed.over = True
                return self.ended(passed)
            try:
                encoded = encoded + kept_pairs(encode_metadata(
                    [pair for pair in passed.call.metadata if pair[0] not in HTTP_HEADERS]
                ))
            except ValueError as error:
                return self.refused(passed, str(error))
            deadline = passed.call.deadline
        call.on_done = passed.answered
        passed.sent_at = now()
        try:
            # The deadline is watched where the request came in, which takes it back from here.
            self.session.submit(call, passed.method, passed.message, passed.flag, encoded, deadline)
        except ConnectionError:
            self.connect(passed)
            return 0
        except ValueError as error:
            return self.refused(passed, str(error))
        passed.sent = call
        return 0

    cdef int refused(self, Passed passed, str reason) except -1:
        passed.over = True
        self.ended(passed)
        passed.call.fail(RESOURCE_EXHAUSTED, f"the request cannot be passed on: {reason}")
        return 0

    cdef int ended(self, Passed passed) except -1:
        """It is at the runtime no more: return its lease, and let the next one in."""
        cdef Target target = passed.target
        cdef Passed other
        if not passed.running:
            return 0
        passed.running = False
        target.running -= 1
        self.in_flight -= 1
        give_back(target.copy)
        while target.waiting and target.running < target.limit:
            other = <Passed>target.waiting.popleft()
            if other.over:
                give_back(target.copy)
            else:
                self.start(other)
        return 0

    cdef Method method(self, str path):
        method = self.methods.get(path)
        if method is None:
            method = self.methods[path] = Method(path)
        return method

    def give_up(self, Passed passed not None, int status, str details not None):
        """Answer a request that was handed to :meth:`connect` with an error."""
        self.ended(passed)
        if not passed.over:
            passed.over = True
            passed.call.fail(status, details)

    def describe(self, str method not None):
        """The way of a method that is not among :attr:`ways` yet, which it is put into; raises if there is none."""
        raise NotImplementedError

    def target(self, copy not None):
        """A copy as its runtime knows it, which is ``copy.prepared`` from then on."""
        raise NotImplementedError

    def connect(self, Passed passed not None):
        """There is no connection that takes it: get one and call its ``send``, or :meth:`give_up`."""

    def failed(self, Passed passed not None, ClientCall answer not None):
        """The runtime's answer is not OK; the lease is returned already."""
        passed.refuse(answer)


def pass_stream_to(
    ServerCall asked not None, ClientSession session not None, Target target not None, str path not None, sink,
    list context=None,
):
    """Start a streaming call at the runtime for the one that was asked: same metadata, deadline and compression.

    ``context``: encoded metadata in place of the trace context that came.

    Raises:
        ConnectionError: the session takes no new call, or the call that asked is over.
        ValueError: it has more metadata than can be sent.
    """
    cdef list kept = kept_pairs(asked.pairs_between(0, asked.metadata_bytes))
    if context is not None:
        kept = [pair for pair in kept if pair[0] not in TRACE_CONTEXT] + context
    return open_stream(asked, session, Method(path), target.headers + kept, sink)
