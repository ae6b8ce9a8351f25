"""A unary request passed on to another instance as it came, and the answer passed back: no task, future or decoding.

What is sent on are the request's own bytes and metadata pairs, unread; a compressed message stays compressed, its
answer too. Which instance, and what is to be done when one does not answer, is decided in ``mmcore/routing``. Memory:
the request's message is sent from where it lies, as is the answer's. Threads: that of one event loop.
"""

import cython

from libc.math cimport exp
from libc.stdint cimport int64_t, uint8_t

from mmcore._ext.h2 cimport CANCELLED, OK, RESOURCE_EXHAUSTED, Method, encode_metadata, now
from mmcore._ext.h2client cimport ClientCall, ClientSession
from mmcore._ext.h2server cimport ServerCall, Working
from mmcore._ext.onward cimport encodings, open_stream, pass_answer, pass_refusal


#: What was measured counts 1/e after so long: a peer that was slow is tried again.
cdef double LATENCY_DECAY_S = 10.0
#: What a peer has told with an answer holds for so long.
cdef double TOLD_S = 2.0


cdef class Traffic:
    """What goes to one peer, as measured here.

    Attributes:
        usable: whether requests may be sent to it.
        silent: whether it leaves unanswered whether it lives; others are asked first.
        session: the connection used last, which may take no calls any more; None before the first.
        in_flight: requests sent and not answered.
        others: what it works at beside those, as it told with its last answer; -1: not known, or too long ago.
        latency_s: moving average of the seconds to an answer with OK, which fades; 0 before the first.
        answered: requests that got any answer.
        failures: connections that broke or were not to be had since the last answer with OK.
    """

    cdef public bint usable
    cdef public bint silent
    cdef public ClientSession session
    cdef readonly Py_ssize_t in_flight
    cdef double latency       # when it was measured
    cdef double measured_at
    cdef Py_ssize_t told      # of it, without what was sent from here
    cdef double told_at
    cdef readonly int64_t answered
    cdef public int failures

    @property
    def others(self):
        return self.told if self.told_at > 0 and now() - self.told_at < TOLD_S else -1

    cdef void hear(self, Py_ssize_t count, double moment) noexcept:
        """It works at so much, by its last word."""
        if count >= 0:
            self.told = max(0, count - self.in_flight)
            self.told_at = moment

    @property
    def latency_s(self):
        return self.latency_at(now())

    cdef double latency_at(self, double moment) noexcept:
        return self.latency * exp((self.measured_at - moment) / LATENCY_DECAY_S)

    cdef bint goes_before(self, Traffic other) noexcept:
        if self.silent != other.silent:
            return not self.silent
        if self.in_flight != other.in_flight:
            return self.in_flight < other.in_flight
        return self.latency < other.latency

    cdef void succeeded(self, double seconds, double moment) noexcept:
        cdef double faded = self.latency_at(moment)
        self.failures = 0
        self.latency = seconds if self.latency == 0 else faded + (seconds - faded) / 8
        self.measured_at = moment


@cython.final
@cython.freelist(256)
cdef class Forwarded:
    """One unary request on its way to a peer, or to one after the other. Made by :class:`Forwards` only.

    Attributes:
        call, body, model, holders, mode, resolved, idempotent, instead: as they were given.
        peer: where it was sent last.
        over: it is answered, or nobody waits for the answer any more.
        arrival: how it came from another instance, or None.
        tried: ids of the instances that are not to be asked (again).
        ran: how many of them may have run it, or had no room.
        last: (status, text) of the last one that did not answer it, or None.
    """

    cdef readonly object call
    cdef readonly bytes body
    cdef readonly object model
    cdef readonly tuple holders
    cdef readonly object mode
    cdef readonly bint resolved
    cdef readonly bint idempotent
    cdef readonly object instead
    cdef readonly Traffic peer
    cdef readonly bint over
    cdef public object arrival
    cdef public tuple tried
    cdef public int ran
    cdef public object last
    cdef Forwards owner
    cdef ServerCall asked     # the call, where the transport itself has it
    cdef bytes packed         # the message as it came, if it was compressed
    cdef Method method
    cdef ClientCall sent
    cdef double began

    def send(self, Traffic peer not None, ClientSession session not None, list headers not None):
        """Send it to a peer, with these pairs of bytes before its own metadata.

        One with more metadata than can be sent is refused.

        Raises:
            ConnectionError: the session takes no new call.
        """
        try:
            self.submit(peer, session, headers)
        except ValueError as error:
            self.over = True
            self.call.fail(RESOURCE_EXHAUSTED, f"the request cannot be passed on: {error}")

    cdef int submit(self, Traffic peer, ClientSession session, list headers) except -1:
        cdef ClientCall call = ClientCall.__new__(ClientCall)
        cdef ServerCall asked = self.asked
        cdef list encoded = headers
        cdef list kept
        cdef bytes message = self.body
        cdef uint8_t flag = 0
        if not session.takes_calls():
            raise ConnectionError("the connection takes no new calls")
        if asked is not None:
            if asked.closed or asked.finished or asked.target is None:
                self.over = True
                return 0
            if asked.metadata_bytes:
                kept = asked.pairs_between(0, asked.metadata_bytes)
                if kept:
                    encoded = headers + kept
            if self.packed is not None:
                message = self.packed
                flag = 1
            encoded = encodings(encoded, asked, call, flag)
            deadline = asked.deadline
        else:
            if self.call.cancelled:
                self.over = True
                return 0
            encoded = headers + encode_metadata([
                pair for pair in self.call.metadata
                if pair[0] != "user-agent" and not pair[0].startswith(("mmcore-", "grpc-"))
            ])
            deadline = self.call.deadline
        call.on_done = self.answered
        # The deadline is watched where the request came in, which takes it back from here.
        session.submit(call, self.method, message, flag, encoded, deadline)
        self.sent = call
        self.peer = peer
        self.began = now()
        peer.in_flight += 1
        if self.owner.working is not None and self.asked is not None:
            self.owner.working.count -= 1
        self.owner.sent += 1
        self.call.on_cancel = self.cancel
        return 0

    def cancel(self):
        """Nobody waits for the answer any more."""
        self.over = True
        if self.sent is not None:
            self.sent.stop(CANCELLED, "the caller has gone")

    def answered(self, ClientCall call not None):
        """The transport's callback: a peer has answered, or never will."""
        cdef Traffic peer = self.peer
        cdef double moment
        peer.in_flight -= 1
        if self.owner.working is not None and self.asked is not None:
            self.owner.working.count += 1
        self.sent = None
        if self.over:
            return
        peer.answered += not call.lost
        moment = now()
        if not call.lost:
            peer.hear((<ClientSession>call.session).told, moment)
        if call.grpc_status == OK:
            peer.succeeded(moment - self.began, moment)
            self.over = True
            pass_answer(self.call, self.asked, call)
        else:
            self.owner.failed(self, call)

    def refuse(self, ClientCall call not None):
        """Pass on an answer that is an error."""
        self.over = True
        pass_refusal(self.call, self.asked, call)


cdef class Forwards:
    """Passes unary requests on: the common ones here, all others by the methods that a subclass overrides.

    Common is a client's request, to be answered from a copy that a peer with an open connection holds.

    Attributes:
        choose: given the usable ones of several holders, returns the one to be asked; None: the one with the fewest
            requests in flight from here, of several the one that answers fastest.
        first_hop: encoded metadata of a common request.
        sent: requests sent to a peer, each time that they were.
        working: what this instance works at, to which requests that were sent to a peer do not count; or None.
    """

    cdef readonly int64_t sent
    cdef public Working working
    cdef public object choose
    cdef public list first_hop
    cdef dict methods

    def __init__(self):
        self.methods = {}

    def unary(
        self, call not None, bytes body not None, str model not None, holders not None, *,
        mode="hit", bint resolved=False, bint idempotent=True, instead=None, str path=None, int ran=0,
        tuple tried=(),
    ):
        """Have a request answered by one of the holders; the answer, or ``instead``, comes later through ``call``.

        Args:
            call: a ServerCall, or what has its metadata, deadline, cancelled, on_cancel, reply and fail.
            body: the message.
            model: the concrete model's name; it travels along where ``resolved`` says that ``body`` does not hold it.
            holders: the peers that hold a copy, or shall load one.
            mode: how they may answer, a ``Mode`` of mmcore/routing/hops.py.
            idempotent: whether running it twice does no harm.
            instead: called with (call, body, Unanswered) when no holder answers; None: its status is the answer.
            path: the method to call, where it is not the call's own.
            ran: how many instances may have run it already.
            tried: ids of the instances that were asked already.
        """
        cdef Forwarded request = Forwarded.__new__(Forwarded)
        cdef Traffic peer
        request.owner = self
        request.call = call
        request.body = body
        request.model = model
        request.holders = holders if isinstance(holders, tuple) else tuple(holders)
        request.mode = mode
        request.resolved = resolved
        request.idempotent = idempotent
        request.instead = instead
        request.ran = ran
        request.tried = tried
        if isinstance(call, ServerCall):
            request.asked = <ServerCall>call
            request.method = request.asked.target
            if body is request.asked.body:
                request.packed = request.asked.packed
        if path is not None:
            request.method = self.method(path)
        if request.asked is not None and not resolved and mode == "hit" and not tried and not request.asked.internal:
            peer = self.one_of(request.holders)
            if peer is not None and peer.session is not None and peer.session.takes_calls():
                request.send(peer, peer.session, self.first_hop)
                return
        self.begin(request)

    cdef Method method(self, str path):
        method = self.methods.get(path)
        if method is None:
            method = self.methods[path] = Method(path)
        return method

    cdef Traffic one_of(self, tuple holders):
        """The usable peer to be asked first, or None."""
        cdef Traffic best = None
        cdef Traffic peer
        cdef list usable
        if len(holders) == 1:
            peer = <Traffic?>holders[0]
            return peer if peer.usable else None
        if self.choose is not None:
            usable = [one for one in holders if (<Traffic?>one).usable and not (<Traffic?>one).silent]
            if not usable:
                usable = [one for one in holders if (<Traffic?>one).usable]
            return <Traffic?>(self.choose(usable) if len(usable) > 1 else usable[0]) if usable else None
        for one in holders:
            peer = <Traffic?>one
            if peer.usable and (best is None or peer.goes_before(best)):
                best = peer
        return best

    def one(self, holders not None):
        """The peer of these that is to be asked, or None: of the usable ones the one that ``choose`` says."""
        return self.one_of(tuple(holders))

    def begin(self, Forwarded request not None):
        """Send a request that is not common."""

    def failed(self, Forwarded request not None, ClientCall answer not None):
        """A peer's answer is not OK."""
        request.refuse(answer)


def pass_stream(ServerCall asked not None, ClientSession session not None, list headers not None, sink not None):
    """Start a streaming call for the one that was asked: same method, deadline and compression.

    Its metadata goes behind ``headers``.

    Raises:
        ConnectionError: the session takes no new call, or the call that asked is over.
        ValueError: it has more metadata than can be sent.
    """
    cdef list encoded = headers + asked.pairs_between(0, asked.metadata_bytes)
    return open_stream(asked, session, asked.target, encoded, sink)
