"""The client side of a session: calls made, and what became of them."""

import cython

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.string cimport memcmp

from mmcore._ext.grpcwire cimport percent_decode
from mmcore._ext.h2 cimport *
from mmcore._ext.nghttp2 cimport *

from mmcore._ext.grpcwire import ENCODINGS, compress, format_timeout

cdef bytes ACCEPTED = b"identity,deflate,gzip"


@cython.final
@cython.no_gc
cdef class ClientCall(Stream):
    """One call made on a client session.

    Attributes:
        refused: the server certainly did nothing for it (REFUSED_STREAM, GOAWAY before it, or a connection lost
            before a unary request had left): safe to send again.
        lost: it ended with its connection.
    """

    @property
    def status(self):
        """The gRPC status as a number; -1 while the call runs."""
        return self.grpc_status if self.done else -1

    @property
    def details(self):
        """``grpc-message`` of the answer, decoded."""
        return self.grpc_message or ""

    @property
    def message(self):
        """The answer of a unary call, None when there was none."""
        return self.body if self.body_done else None

    @property
    def initial_metadata(self):
        """Metadata that came before the answer."""
        return self.metadata_between(0, self.initial_bytes)

    @property
    def trailers(self):
        """Metadata that came with the status."""
        return self.metadata_between(self.initial_bytes, self.metadata_bytes)

    cdef int on_header(
        self, const uint8_t *name, size_t name_size, const uint8_t *value, size_t value_size, int category,
    ) except -1:
        self.header_bytes += name_size + value_size + 32
        if self.header_bytes > self.session.max_header:
            self.header_flood = True
            return 0
        if name[0] == c":":
            self.http_status = number_of(value, value_size, 3)
            return 0
        if name[0] == c"c" and is_text(name, name_size, b"content-type", 12):
            self.content_type_ok = value_size >= 16 and memcmp(value, b"application/grpc", 16) == 0
            return 0
        if name[0] == c"g" and name_size > 5 and memcmp(name, b"grpc-", 5) == 0:
            if is_text(name, name_size, b"grpc-status", 11):
                self.grpc_status = number_of(value, value_size, 3)
                if self.grpc_status < 0:
                    self.grpc_status = UNKNOWN
                return 0
            if is_text(name, name_size, b"grpc-message", 12):
                self.details_header = (<const char *>value)[:value_size]
                return 0
            if is_text(name, name_size, b"grpc-encoding", 13):
                self.encoding = (<const char *>value)[:value_size].decode("ascii", "replace")
                return 0
            if is_text(name, name_size, b"grpc-accept-encoding", 20):
                return 0
        if name[0] == c"m" and is_text(name, name_size, b"mmcore-working", 14):
            (<ClientSession>self.session).told = number_of(value, value_size, 9)
            return 0
        return self.keep(name, name_size, value, value_size)

    cdef int on_headers_done(self, int category, bint end) except -1:
        if not end:  # the answer's headers, or interim ones before them
            self.initial_bytes = self.metadata_bytes
        if self.header_flood:
            return self.on_bad_message(
                RESOURCE_EXHAUSTED, f"metadata is above the limit of {self.session.max_header} bytes")
        if not end and self.http_status >= 200 and (self.http_status != 200 or not self.content_type_ok):
            self.not_grpc()
            return self.on_bad_message(INTERNAL, "")
        return 0

    cdef int not_grpc(self) except -1:
        """The answer came from something else than a gRPC server."""
        if self.http_status != 200:
            return self.finish(
                status_of_http(self.http_status), f"HTTP status {self.http_status} without grpc-status")
        return self.finish(UNKNOWN, "the answer is not gRPC: its content-type is not application/grpc")

    cdef int on_bad_message(self, int status, str text) except -1:
        self.discard = True
        self.body = None
        self.body_done = False
        nghttp2_submit_rst_stream(self.session.h2, 0, self.id, NGHTTP2_CANCEL)
        return self.finish(status, text)

    cdef int on_end(self) except -1:
        """The answer is whole: find its status."""
        cdef str details = ""
        self.received_end = True
        if self.done:
            return 0
        if self.details_header is not None:
            details = percent_decode(PyBytes_AS_STRING(self.details_header), PyBytes_GET_SIZE(self.details_header))
        if self.grpc_status < 0 or self.grpc_status > 16:
            if self.grpc_status > 16:
                self.finish(UNKNOWN, details)
            elif self.http_status != 200 or not self.content_type_ok:
                self.not_grpc()
            else:
                self.finish(INTERNAL, "the answer ended without grpc-status")
        elif self.grpc_status == OK and self.prefix_have:
            self.finish(INTERNAL, "the answer ended in the middle of a message")
        elif self.grpc_status == OK and self.inbox is None and not self.body_done:
            self.finish(UNIMPLEMENTED, "a unary call is answered by one message, none was sent")
        else:
            self.finish(self.grpc_status, details)
        if not self.closed and (self.out_bytes or not self.out_end):
            # The server answered without wanting the rest of the request.
            nghttp2_submit_rst_stream(self.session.h2, 0, self.id, NGHTTP2_NO_ERROR)
        return 0

    cdef int finish(self, int status, str text) except -1:
        """Settle the outcome once; the caller hears of it from on_ready."""
        if self.done:
            return 0
        self.done = True
        self.grpc_status = status
        self.grpc_message = text
        return self.queue_ready()

    cdef int on_ready(self) except -1:
        if self.sink is not None:
            self.deliver()
            if self.done:
                sink = self.sink
                self.sink = None
                sink.on_close()
        elif self.done and self.on_done is not None:
            callback = self.on_done
            self.on_done = None
            callback(self)
        return 0

    def cancel(self):
        """Take the call back: the server hears of it, the outcome is CANCELLED. Nothing happens when it is over."""
        self.stop(CANCELLED, "cancelled by the caller")

    def stop(self, int status, str details):
        """Take the call back with this outcome."""
        if self.done:
            return
        self.discard = True
        if self.session.h2 != NULL and not self.closed:
            nghttp2_submit_rst_stream(self.session.h2, 0, self.id, NGHTTP2_CANCEL)
        self.finish(status, details)
        self.session.want_flush()

    def send(self, message not None):
        """Queue one message of a streaming request."""
        if self.closed or self.out_end:
            return
        self.push(message)
        self.wake()

    def end(self):
        """No more messages will be sent."""
        if self.closed or self.out_end:
            return
        self.out_end = True
        self.wake()

    cdef int on_close(self, uint32_t code, str reason) except -1:
        if self.done:
            return 0
        if reason is not None:
            self.lost = True
            self.refused = self.inbox is None and self.out_bytes > 0
            return self.finish(UNAVAILABLE, reason)
        self.refused = code == NGHTTP2_REFUSED_STREAM
        return self.finish(status_of_reset(code), f"the server reset the stream with HTTP/2 error {code}")

    cdef bint running(self) noexcept:
        return not self.done

    cdef int expire(self) except -1:
        self.stop(DEADLINE_EXCEEDED, "deadline exceeded")
        return 0


cdef Py_ssize_t number_of(const uint8_t *text, size_t length, size_t most) noexcept:
    """A number of at most ``most`` digits (nine or fewer), -1 for anything else."""
    cdef Py_ssize_t number = 0
    cdef size_t i
    if length == 0 or length > most:
        return -1
    for i in range(length):
        if text[i] < c"0" or text[i] > c"9":
            return -1
        number = number * 10 + (text[i] - c"0")
    return number


cdef int status_of_http(int status) noexcept:
    """gRPC status for an HTTP one (grpc/doc/http-grpc-status-mapping.md)."""
    if status == 400:
        return INTERNAL
    if status == 401:
        return UNAUTHENTICATED
    if status == 403:
        return PERMISSION_DENIED
    if status == 404:
        return UNIMPLEMENTED
    if status == 429 or status == 502 or status == 503 or status == 504:
        return UNAVAILABLE
    return UNKNOWN


cdef int status_of_reset(uint32_t code) noexcept:
    """gRPC status for an HTTP/2 error code ("gRPC over HTTP2", section Errors)."""
    if code == NGHTTP2_REFUSED_STREAM:
        return UNAVAILABLE
    if code == NGHTTP2_CANCEL:
        return CANCELLED
    if code == NGHTTP2_ENHANCE_YOUR_CALM:
        return RESOURCE_EXHAUSTED
    if code == NGHTTP2_INADEQUATE_SECURITY:
        return PERMISSION_DENIED
    return INTERNAL


cdef int on_header(
    nghttp2_session *h2, const nghttp2_frame *frame, const uint8_t *name, size_t name_size, const uint8_t *value,
    size_t value_size, uint8_t flags, void *user_data,
) except NGHTTP2_ERR_CALLBACK_FAILURE:
    cdef void *call = find_stream(<Session>user_data, frame.hd.stream_id)
    if call != NULL:
        (<ClientCall>call).on_header(name, name_size, value, value_size, frame.headers.cat)
    return 0


cdef nghttp2_session_callbacks *callbacks = new_callbacks(<nghttp2_on_header_callback>on_header)


cdef class ClientSession(Session):
    """The client's side of one connection."""

    def __cinit__(self, buffers, settings, *args, **kwargs):
        self.told = -1
        self.open(True, callbacks, settings)

    def request_allowed(self):
        """Whether a new call may be started on this session."""
        return self.takes_calls()

    cdef bint takes_calls(self) noexcept:
        return (
            self.h2 != NULL and not self.broken and not self.going_away
            and nghttp2_session_check_request_allowed(self.h2) != 0)

    def skip_to(self, int stream_id):
        """Give the next call this id, which is odd and above those used (tests of the last ids)."""
        if self.h2 == NULL or nghttp2_session_set_next_stream_id(self.h2, stream_id) != 0:
            raise ValueError(f"no call can have the id {stream_id}")

    def open_limit(self):
        """How many calls the server lets us have open at once."""
        if self.h2 == NULL:
            return 0
        return nghttp2_session_get_remote_settings(self.h2, NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS)

    def request(self, Method method not None, message, on_done, metadata, deadline, sink=None, str encoding=None):
        """Start a call.

        Args:
            message: the request of a unary call; None leaves the request open for ``send``.
            on_done: called with the ClientCall when the outcome is known.
            metadata: (name, value) pairs, or None.
            deadline: monotonic seconds, or None.
            sink: takes the messages of a streaming answer; None for a unary one.
            encoding: compress what is sent.

        Raises:
            ConnectionError: the session takes no new calls.
            ValueError: metadata or the encoding cannot be sent.
            TypeError: the message or metadata is of no type that can be sent.
        """
        cdef ClientCall call = ClientCall.__new__(ClientCall)
        cdef list encoded = None
        call.on_done = on_done
        call.sink = sink
        if encoding is not None and encoding != "identity":
            if encoding not in ENCODINGS:
                raise ValueError(f"encoding {encoding!r} is not one of {', '.join(sorted(ENCODINGS))}")
            call.send_encoding = encoding
        if sink is not None:
            call.inbox = []
        if encoding is not None:
            encoded = [(b"grpc-encoding", encoding.encode("ascii")), (b"grpc-accept-encoding", ACCEPTED)]
        if metadata:
            encoded = encode_metadata(metadata) if encoded is None else encoded + encode_metadata(metadata)
        if message is not None and call.send_encoding is not None:
            self.submit(call, method, compress(call.send_encoding, message), 1, encoded, deadline)
        else:
            self.submit(call, method, message, 0, encoded, deadline)
        if deadline is not None:
            self.arm(deadline)
        return call

    cdef int submit(
        self, ClientCall call, Method method, object message, uint8_t flag, list encoded, object deadline
    ) except -1:
        """Send a call's headers, and its message in the form that ``flag`` states unless it is None."""
        cdef nghttp2_nv[MAX_HEADERS] pairs
        cdef nghttp2_data_provider provider
        cdef bytes timeout
        cdef int count = 7
        cdef int32_t stream_id
        if self.h2 == NULL or self.broken:
            raise ConnectionError("the connection is closed")
        call.session = self
        call.target = method
        pairs[0] = static_nv(b":method", b"POST")
        pairs[1] = bytes_nv(b":scheme", self.scheme, STATIC)
        pairs[2] = bytes_nv(b":path", method.raw_path, STATIC)
        pairs[3] = bytes_nv(b":authority", self.authority, STATIC)
        pairs[4] = static_nv(b"te", b"trailers")
        pairs[5] = static_nv(b"content-type", b"application/grpc")
        pairs[6] = bytes_nv(b"user-agent", self.user_agent, STATIC)
        if deadline is not None:
            call.deadline = deadline
            timeout = format_timeout(deadline - now())
            pairs[count] = bytes_nv(
                b"grpc-timeout", timeout, NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_INDEX)
            count += 1
        if encoded is not None:
            count = add_pairs(pairs, count, encoded)
        if message is not None:
            call.push_as(message, flag)
            call.out_end = True
        provider.source.ptr = <void *>call
        provider.read_callback = read_callback
        stream_id = nghttp2_submit_request(self.h2, NULL, pairs, count, &provider, <void *>call)
        if stream_id < 0:
            self.unsent -= call.out_bytes
            raise ConnectionError((<bytes>nghttp2_strerror(stream_id)).decode())
        call.begin(self, stream_id)
        self.calls += 1
        return self.want_flush()
