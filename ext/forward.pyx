"""A unary request passed on to another instance as it came, and the answer passed back: no task, future or decoding.

What is sent on are the request's own bytes and metadata pairs, unread; a compressed message stays compressed, its
answer too. Which instance, and what is to be done when one does not answer, is decided in ``mmcore/routing``. Memory:
the request's message is sent from where it lies, as is the answer's. Threads: that of one event loop.
"""

import cython

from libc.stdint cimport int64_t, uint8_t

from mmcore._ext.h2 cimport CANCELLED, OK, Method, encode_metadata, now
from mmcore._ext.h2client cimport ClientCall, ClientSession
from mmcore._ext.h2server cimport ServerCall


cdef class Traffic:
    """What goes to one peer, as measured here.

    Attributes:
        in_flight: requests sent and not answered.
        latency_s: moving average of the seconds to an answer with OK; 0 before the first.
        answered: requests that got any answer.
        failures: connections that broke or were not to be had since the last answer with OK.
    """

    cdef readonly Py_ssize_t in_flight
    cdef readonly double latency_s
    cdef readonly int64_t answered
    cdef public int failures

    cdef void succeeded(self, double seconds) noexcept:
        self.failures = 0
        if self.latency_s == 0:
            self.latency_s = seconds
        else:
            self.latency_s += (seconds - self.latency_s) / 8


@cython.final
@cython.freelist(256)
cdef class Forwarded:
    """One unary request on its way to a peer, or to one after the other.

    Attributes:
        call: where the answer goes: a ServerCall, or what has its metadata, deadline, cancelled, on_cancel, reply
            and fail.
        body: the message.
        state: whatever the owner wants to remember of it.
        peer: where it was sent last.
        over: it is answered, or nobody waits for the answer any more.
    """

    cdef readonly object call
    cdef readonly bytes body
    cdef readonly object state
    cdef readonly Traffic peer
    cdef readonly bint over
    cdef ServerCall asked     # the call, where the transport itself has it
    cdef bytes packed         # the message as it came, if it was compressed
    cdef Method method
    cdef ClientCall sent
    cdef object failed
    cdef double began

    def __init__(self, call not None, bytes body not None, object state, object failed, Method method=None):
        """``failed(forwarded, call)`` is given a peer's answer other than OK; ``method`` is the call's unless given."""
        self.call = call
        self.body = body
        self.state = state
        self.failed = failed
        self.method = method
        if isinstance(call, ServerCall):
            self.asked = <ServerCall>call
            if body is self.asked.body:
                self.packed = self.asked.packed
            if method is None:
                self.method = self.asked.target

    def send(self, Traffic peer not None, ClientSession session not None, list headers not None):
        """Send it to a peer, with these pairs of bytes before its own metadata.

        Raises:
            ConnectionError: the session takes no new call.
            ValueError: it has more metadata than can be sent.
        """
        cdef ClientCall call = ClientCall.__new__(ClientCall)
        cdef ServerCall asked = self.asked
        cdef list encoded = headers
        cdef bytes message = self.body
        cdef uint8_t flag = 0
        if not session.takes_calls():
            raise ConnectionError("the connection takes no new calls")
        if asked is not None:
            if asked.closed or asked.finished or asked.target is None:
                self.over = True
                return
            if asked.metadata_bytes:
                encoded = headers + asked.pairs_between(0, asked.metadata_bytes)
            if asked.accept_encoding is not None:
                call.as_came = True
                encoded = encoded + [(b"grpc-accept-encoding", asked.accept_encoding.encode("latin-1", "replace"))]
            if self.packed is not None:
                message = self.packed
                flag = 1
                encoded = encoded + [(b"grpc-encoding", asked.encoding.encode("ascii"))]
            deadline = asked.deadline
        else:
            if self.call.cancelled:
                self.over = True
                return
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
        self.call.on_cancel = self.cancel

    def cancel(self):
        """Nobody waits for the answer any more."""
        self.over = True
        if self.sent is not None:
            self.sent.stop(CANCELLED, "the caller has gone")

    def answered(self, ClientCall call not None):
        """The transport's callback: a peer has answered, or never will."""
        cdef Traffic peer = self.peer
        peer.in_flight -= 1
        self.sent = None
        if self.over:
            return
        peer.answered += not call.lost
        if call.grpc_status == OK:
            peer.succeeded(now() - self.began)
            self.answer(call)
        else:
            self.failed(self, call)

    cdef int answer(self, ClientCall call) except -1:
        """Pass on an answer with OK."""
        cdef ServerCall asked = self.asked
        self.over = True
        if asked is None:
            self.call.reply(call.body)
            return 0
        if call.metadata_bytes:
            self.take_metadata(call)
        if call.packed is None:
            return asked.answer(call.body)
        asked.send_encoding = call.encoding
        return asked.answer_as(call.packed, 1)

    def refuse(self, ClientCall call not None):
        """Pass on an answer that is an error."""
        self.over = True
        if self.asked is not None and call.metadata_bytes:
            self.take_metadata(call)
        self.call.fail(call.grpc_status, call.grpc_message or "")

    cdef int take_metadata(self, ClientCall call) except -1:
        self.asked.extra_headers = call.pairs_between(0, call.initial_bytes) or None
        self.asked.extra_trailers = call.pairs_between(call.initial_bytes, call.metadata_bytes) or None
        return 0


def pass_stream(ServerCall asked not None, ClientSession session not None, list headers not None, sink not None):
    """Start a streaming call for the one that was asked: same method, metadata, deadline and compression.

    Raises:
        ConnectionError: the session takes no new call, or the call that asked is over.
        ValueError: it has more metadata than can be sent.
    """
    cdef ClientCall call = ClientCall.__new__(ClientCall)
    cdef list encoded = headers + asked.pairs_between(0, asked.metadata_bytes)
    if not session.takes_calls():
        raise ConnectionError("the connection takes no new calls")
    if asked.target is None:
        raise ConnectionError("the call is over")
    call.sink = sink
    call.inbox = []
    if asked.encoding is not None and asked.encoding != "identity":
        call.send_encoding = asked.encoding
        encoded.append((b"grpc-encoding", asked.encoding.encode("ascii")))
    if asked.accept_encoding is not None:
        encoded.append((b"grpc-accept-encoding", asked.accept_encoding.encode("latin-1", "replace")))
    session.submit(call, asked.target, None, 0, encoded, asked.deadline)
    return call


def pass_head(ServerCall asked not None, ClientCall call not None):
    """Answer a streaming call with the metadata and the compression of another's answer; before the first message."""
    if asked.headers_sent:
        return
    asked.extra_headers = call.pairs_between(0, call.initial_bytes) or None
    if call.encoding is not None and call.encoding != "identity":
        asked.send_encoding = call.encoding


def pass_trailers(ServerCall asked not None, ClientCall call not None):
    """End a streaming call, when it ends, with the trailers of another's answer."""
    asked.extra_trailers = call.pairs_between(call.initial_bytes, call.metadata_bytes) or None
