"""The server side of a session: calls that come in, and how they are answered."""

import cython

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport INT64_MAX, uint8_t, uint32_t
from libc.string cimport memcmp

from mmcore._ext.grpcwire cimport percent_cut, percent_encode, timeout_ns
from mmcore._ext.h2 cimport *
from mmcore._ext.nghttp2 cimport *

from mmcore._ext.grpcwire import ENCODINGS, compress

cdef enum:
    DETAILS_BYTES = 5000    # of a status text; peers refuse more than 8 KiB of metadata, percent-encoded

cdef nghttp2_nv[2] RESPONSE
RESPONSE[0] = static_nv(b":status", b"200")
RESPONSE[1] = static_nv(b"content-type", b"application/grpc")
cdef nghttp2_nv[1] TRAILER_OK
TRAILER_OK[0] = static_nv(b"grpc-status", b"0")


@cython.final
cdef class Working:
    """What an instance works at.

    Attributes:
        count: requests of whatever protocol, without the unary calls that another instance has been asked to answer.
    """


@cython.final
@cython.no_gc
cdef class ServerCall(Stream):
    """One call a server answers; handlers get it with the request's message.

    Attributes:
        on_cancel: called without arguments when the call ends before it is answered; set by handlers that answer
            later.
        sink: of a streaming call, what takes its messages.
    """

    @property
    def method(self):
        """Path of the method called, ``/package.Service/Method``."""
        return self.target.path if self.target is not None else self.path or ""

    @property
    def internal(self):
        """Whether another instance sent it."""
        return (<ServerSession>self.session).internal

    @property
    def metadata(self):
        """The request's metadata as (name, value) pairs; ``-bin`` values are bytes, others str."""
        return self.metadata_between(0, self.metadata_bytes)

    cdef int on_header(
        self, const uint8_t *name, size_t name_size, const uint8_t *value, size_t value_size, int category,
    ) except -1:
        """Look at one request header; only what gRPC needs is looked at, the rest is kept unread."""
        cdef ServerSession session
        cdef uint8_t first = name[0]
        self.header_bytes += name_size + value_size + 32
        if self.header_bytes > self.session.max_header:
            self.header_flood = True
            return 0
        if category == NGHTTP2_HCAT_HEADERS:
            return 0  # request trailers carry nothing in gRPC
        if first == c":":
            if name_size == 5 and name[1] == c"p":  # :path
                session = <ServerSession>self.session
                if session.latest is None or not is_text(
                    value, value_size, PyBytes_AS_STRING(session.latest.raw_path),
                    PyBytes_GET_SIZE(session.latest.raw_path),
                ):
                    session.latest = session.methods.get((<const char *>value)[:value_size])
                    if session.latest is None:
                        found = session.find_method((<const char *>value)[:value_size])
                        session.latest = <Method?>found if found is not None else None
                self.target = session.latest
            elif name_size == 7 and name[1] == c"m":  # :method
                self.http_ok = is_text(value, value_size, b"POST", 4)
            return 0
        if first == c"t" and is_text(name, name_size, b"te", 2):
            return 0
        if first == c"c" and is_text(name, name_size, b"content-type", 12):
            self.content_type_ok = value_size >= 16 and memcmp(value, b"application/grpc", 16) == 0 and (
                value_size == 16 or value[16] == c"+" or value[16] == c";")
            return 0
        if first == c"g" and name_size > 5 and memcmp(name, b"grpc-", 5) == 0:
            if is_text(name, name_size, b"grpc-timeout", 12):
                self.timeout_ns = timeout_ns(<const char *>value, value_size)
            elif is_text(name, name_size, b"grpc-encoding", 13):
                self.encoding = (<const char *>value)[:value_size].decode("ascii", "replace")
            elif is_text(name, name_size, b"grpc-accept-encoding", 20):
                self.accept_encoding = (<const char *>value)[:value_size].decode("ascii", "replace")
            else:
                return self.keep(name, name_size, value, value_size)
            return 0
        if is_internal(name, name_size) and not (<ServerSession>self.session).internal:
            return 0  # nobody but another instance may tell us what instances tell each other
        return self.keep(name, name_size, value, value_size)

    cdef int on_headers_done(self, int category, bint end) except -1:
        cdef Session session = self.session
        if category != NGHTTP2_HCAT_REQUEST:
            return 0
        session.calls += 1
        self.began = now()
        if (<ServerSession>session).working is not None:
            self.working = True
            (<ServerSession>session).working.count += 1
        if self.header_flood:
            return self.refuse(RESOURCE_EXHAUSTED, f"metadata is above the limit of {session.max_header} bytes")
        if not self.http_ok:
            return self.reject(b"405")
        if not self.content_type_ok:
            return self.reject(b"415")
        if self.target is None:
            return self.refuse(UNIMPLEMENTED, "method is not served here")
        if self.timeout_ns != NO_TIMEOUT:
            if self.timeout_ns < 0:
                return self.refuse(INTERNAL, "grpc-timeout is malformed")
            if self.timeout_ns == 0:
                return self.refuse(DEADLINE_EXCEEDED, "deadline exceeded")
            if self.timeout_ns != INT64_MAX:
                self.deadline = now() + self.timeout_ns * 1e-9
                if not end:
                    session.arm(self.deadline)
        if self.encoding is not None and self.encoding not in ENCODINGS:
            self.extra_headers = [(b"grpc-accept-encoding", b"identity,deflate,gzip")]
            return self.refuse(UNIMPLEMENTED, f"grpc-encoding {self.encoding!r} is not known here")
        if self.target.streaming:
            self.inbox = []
            self.queue_ready()
        return 0

    cdef int reject(self, const char *http_status) except -1:
        """Answer something that is not gRPC, in plain HTTP."""
        cdef nghttp2_nv[1] pair
        self.finished = self.discard = True
        self.rest()
        pair[0] = static_nv(b":status", http_status)
        nghttp2_submit_response(self.session.h2, self.id, pair, 1, NULL)
        return self.leave()

    cdef int leave(self) except -1:
        """The answer's end is submitted: what the client still has to send is not wanted (RFC 9113 section 8.1).

        nghttp2 would drop frames queued before a reset, so that is submitted once they have left.
        """
        if not self.peer_ended:
            self.discard = True
            self.session.resets.append(self.id)
        return 0

    cdef int on_bad_message(self, int status, str text) except -1:
        self.discard = True
        if self.inbox is not None and self.sink is not None:
            self.sink.on_error(status, text)
            return 0
        return self.refuse(status, text)

    cdef int refuse(self, int status, str text) except -1:
        """End the call with a status before any handler has seen it."""
        self.discard = True
        self.fail(status, text)
        return 0

    cdef int on_ready(self) except -1:
        """Run the handler, deliver to the sink, or tell that the call is over."""
        cdef Session session = self.session
        if self.closed:
            if not self.finished:
                self.finished = True
                if self.on_cancel is not None:
                    self.on_cancel()
                if self.sink is not None:
                    self.sink.on_close()
            self.on_cancel = None
            self.sink = None
            return 0
        if self.finished:
            return 0
        if not self.dispatched:
            self.dispatched = True
            if session.unsent > session.max_unsent:
                return self.refuse(RESOURCE_EXHAUSTED, "earlier answers on this connection have not been read")
            if self.inbox is not None:
                if self.deadline is not None:
                    session.arm(self.deadline)
                try:
                    self.sink = session.open_stream_call(self, self.target.handler)
                except Exception as error:
                    session.handler_failed(self, error)
                    return 0
        if self.inbox is not None:
            return self.deliver()
        self.release(self.held)
        try:
            answer = self.target.handler(self, self.body)
            self.body = None
            if answer is not None:
                return self.answer(answer)
        except Exception as error:  # the boundary: every error leaves as a status
            session.handler_failed(self, error)
            return 0
        if self.deadline is not None and not self.finished:
            session.arm(self.deadline)
        return 0

    cdef int on_end(self) except -1:
        """The client has sent all it will."""
        if self.discard:
            return 0
        self.received_end = True
        if self.inbox is None:
            if self.prefix_have or (self.body is not None and not self.body_done):
                return self.refuse(INTERNAL, "the request ended in the middle of a message")
            if self.body is None:
                return self.refuse(UNIMPLEMENTED, "a unary call takes one message, none was sent")
        elif self.prefix_have:
            return self.on_bad_message(INTERNAL, "the request ended in the middle of a message")
        return self.queue_ready()

    cdef int send_headers(self, bint end) except -1:
        """Submit the response headers; with ``end`` they carry the status too (trailers-only)."""
        cdef nghttp2_data_provider provider
        cdef nghttp2_nv[MAX_HEADERS] pairs
        cdef nghttp2_nv *headers = RESPONSE
        cdef int count = 2
        cdef list encoding, status
        self.headers_sent = True
        provider.source.ptr = <void *>self
        provider.read_callback = read_callback
        if end or self.extra_headers is not None or self.send_encoding is not None:
            headers = pairs
            pairs[0] = RESPONSE[0]
            pairs[1] = RESPONSE[1]
            if self.send_encoding is not None:
                # The pairs point into these bytes: they must live until they are submitted.
                encoding = [(b"grpc-encoding", self.send_encoding.encode("ascii"))]
                count = add_pairs(pairs, count, encoding)
            if self.extra_headers is not None:
                count = add_pairs(pairs, count, self.extra_headers)
            if end:
                status = self.status_pairs()
                count = add_pairs(pairs, count, status)
        nghttp2_submit_response(self.session.h2, self.id, headers, count, NULL if end else &provider)
        return self.leave() if end else 0

    cdef list status_pairs(self):
        cdef list pairs = [(b"grpc-status", b"%d" % self.grpc_status)]
        if self.grpc_message:
            pairs.append((b"grpc-message", percent_encode(self.grpc_message)))
        if self.extra_trailers is not None:
            pairs.extend(self.extra_trailers)
        if (<ServerSession>self.session).tells():
            pairs.append((b"mmcore-working", b"%d" % (<ServerSession>self.session).told))
        return pairs

    cdef int submit_end(self) except -1:
        cdef nghttp2_nv[MAX_HEADERS] pairs
        cdef list status
        cdef bytes told
        if self.grpc_status == OK and self.extra_trailers is None:
            pairs[0] = TRAILER_OK[0]
            if not (<ServerSession>self.session).tells():
                nghttp2_submit_trailer(self.session.h2, self.id, pairs, 1)
            else:
                told = b"%d" % (<ServerSession>self.session).told
                pairs[1] = bytes_nv(b"mmcore-working", told, NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_INDEX)
                nghttp2_submit_trailer(self.session.h2, self.id, pairs, 2)
        else:
            status = self.status_pairs()
            nghttp2_submit_trailer(self.session.h2, self.id, pairs, add_pairs(pairs, 0, status))
        return self.leave()

    cdef int answer(self, object message) except -1:
        if self.send_encoding is not None and not self.closed and not self.finished:
            return self.answer_as(compress(self.send_encoding, message), 1)
        return self.answer_as(message, 0)

    cdef int answer_as(self, object message, uint8_t flag) except -1:
        """Answer with a message that is compressed already, flag 1, or shall not be."""
        if self.closed or self.finished:
            return 0
        self.push_as(message, flag)
        self.finished = True
        self.on_cancel = None
        self.grpc_status = OK
        self.out_end = True
        self.count(OK)
        self.send_headers(False)
        self.session.want_flush()
        return 0

    cdef void rest(self) noexcept:
        """It is worked at no more."""
        if self.working:
            self.working = False
            (<ServerSession>self.session).working.count -= 1

    cdef void count(self, int status) noexcept:
        """Count the call, which has just ended."""
        self.rest()
        if self.target is not None:
            if (<ServerSession>self.session).internal:
                self.target.from_peers.add(status, now() - self.began, self.message_bytes, self.answer_bytes)
            else:
                self.target.counted.add(status, now() - self.began, self.message_bytes, self.answer_bytes)

    def reply(self, message not None):
        """Answer a unary call: one message and status OK. Nothing happens when the call is over.

        Args:
            message: bytes, another contiguous buffer, or a list of those sent as one message without joining.
        """
        self.answer(message)

    def fail(self, int status, str details not None):
        """End the call with a status other than OK. Nothing happens when the call is over.

        Args:
            details: text for people; a very long one is cut off.
        """
        if self.closed or self.finished:
            return
        if len(details) > DETAILS_BYTES // 12:  # a character takes twelve bytes at the most
            details = percent_cut(details, DETAILS_BYTES)
        self.conclude(status, details)

    cdef int conclude(self, int status, str details) except -1:
        """Settle the status; it leaves after what is queued, or with the headers where nothing was sent yet."""
        self.finished = True
        self.count(status)
        self.grpc_status = status
        self.grpc_message = details
        self.out_end = True
        self.on_cancel = None
        self.sink = None
        if self.headers_sent:
            self.wake()
        else:
            self.send_headers(True)
            self.session.want_flush()
        return 0

    def send(self, message not None):
        """Queue one message of a streaming answer; see ``unsent`` for what has not left yet."""
        if self.closed or self.finished:
            return
        self.push(message)
        if self.headers_sent:
            self.wake()
        else:
            self.send_headers(False)
            self.session.want_flush()

    def end(self):
        """End a streaming answer with status OK."""
        if not self.closed and not self.finished:
            self.conclude(OK, None)

    def set_initial_metadata(self, metadata):
        """Metadata sent before the answer.

        Raises:
            ValueError: headers are out already, or what is given cannot be sent.
            TypeError: a value is not of the type its name asks for.
        """
        if self.headers_sent:
            raise ValueError("initial metadata was already sent")
        self.extra_headers = encode_metadata(metadata)

    def set_trailers(self, metadata):
        """Metadata sent with the status.

        Raises:
            ValueError: what is given cannot be sent.
            TypeError: a value is not of the type its name asks for.
        """
        self.extra_trailers = encode_metadata(metadata)

    def set_compression(self, str encoding):
        """Compress what is sent with ``gzip`` or ``deflate`` if the client accepts it; returns whether it does."""
        if self.headers_sent or self.accept_encoding is None or encoding not in ENCODINGS:
            return False
        if encoding not in [name.strip() for name in self.accept_encoding.split(",")]:
            return False
        if encoding != "identity":
            self.send_encoding = encoding
        return True

    cdef int on_close(self, uint32_t code, str reason) except -1:
        if code in (
            NGHTTP2_PROTOCOL_ERROR, NGHTTP2_FLOW_CONTROL_ERROR, NGHTTP2_STREAM_CLOSED, NGHTTP2_FRAME_SIZE_ERROR
        ):
            # nghttp2 has reset it for what the peer did. A peer that provokes that ends calls as resets of its own
            # would, and as cheaply ("MadeYouReset", CVE-2025-8671).
            self.session.count_control()
        if not self.finished:
            self.count(CANCELLED)
            if self.dispatched:
                self.queue_ready()
        elif code == NGHTTP2_NO_ERROR and self.session.control_tokens < self.session.control_burst:
            self.session.control_tokens += 1
        return 0

    cdef bint running(self) noexcept:
        return not self.finished

    cdef int expire(self) except -1:
        """The deadline passed: answer so, and let the handler stop."""
        callback = self.on_cancel
        sink = self.sink
        self.refuse(DEADLINE_EXCEEDED, "deadline exceeded")
        if callback is not None:
            callback()
        if sink is not None:
            sink.on_close()
        return 0


cdef int on_header(
    nghttp2_session *h2, const nghttp2_frame *frame, const uint8_t *name, size_t name_size, const uint8_t *value,
    size_t value_size, uint8_t flags, void *user_data,
) except NGHTTP2_ERR_CALLBACK_FAILURE:
    cdef void *call = find_stream(<Session>user_data, frame.hd.stream_id)
    if call != NULL:
        (<ServerCall>call).on_header(name, name_size, value, value_size, frame.headers.cat)
    return 0


cdef nghttp2_session_callbacks *callbacks = new_callbacks(<nghttp2_on_header_callback>on_header)


cdef class ServerSession(Session):
    """The server's side of one connection.

    Args:
        buffers, settings: as for Session.
        methods: what is served, :class:`Method` by raw path.

    Attributes:
        internal: whether the other side is another instance; metadata named ``mmcore-…`` is dropped where it is not.
        working: counts the calls too, and is told to another instance with answers; None for nothing.
    """

    def __cinit__(self, buffers, settings, dict methods not None, *args, **kwargs):
        self.methods = methods
        self.told = -1
        self.open(False, callbacks, settings)

    cdef bint tells(self) noexcept:
        """Whether the other side is to be told anew how much there is to do: it differs by more than an eighth."""
        cdef Py_ssize_t count
        if not self.internal or self.working is None:
            return False
        count = max(0, self.working.count)
        if self.told >= 0 and 8 * abs(count - self.told) <= self.told:
            return False
        self.told = count
        return True

    def find_method(self, bytes path not None):
        """A :class:`Method` that is not in ``methods``, or None."""

    def shut(self, str reason not None):
        """The connection is gone: cancel every call, and let go of the handlers, which may hold calls."""
        Session.shut(self, reason)
        self.methods = {}
        self.latest = None

    cdef Stream accept(self):
        return ServerCall.__new__(ServerCall)
