"""One HTTP/2 session that speaks gRPC, either side of it; see ext/h2.pyx."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memcmp, strlen

from mmcore._ext.calls cimport CallCounters
from mmcore._ext.nghttp2 cimport (
    NGHTTP2_NV_FLAG_NO_COPY_NAME,
    NGHTTP2_NV_FLAG_NO_COPY_VALUE,
    nghttp2_data_source_read_callback,
    nghttp2_nv,
    nghttp2_on_header_callback,
    nghttp2_session,
    nghttp2_session_callbacks,
    nghttp2_session_get_stream_user_data,
)
from mmcore._ext.outbuf cimport Buffers


cdef enum:
    INLINE_METADATA = 96           # bytes of metadata kept without an allocation: a user-agent's
    STATIC = NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE
    MAX_HEADERS = 128              # header pairs sent in one block, our own included
    MAX_METADATA = 48              # pairs of metadata given for one block
    MAX_METADATA_BYTES = 16 * 1024  # of these, together; nghttp2 drops a block of headers above 64 KiB
    NO_TIMEOUT = -2

# gRPC statuses (grpc/doc/statuscodes.md), as the transport gives them.
cdef enum:
    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    DEADLINE_EXCEEDED = 4
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


cdef inline nghttp2_nv static_nv(const char *name, const char *value) noexcept:
    """A header pair of literals."""
    cdef nghttp2_nv nv
    nv.name = <uint8_t *>name
    nv.namelen = strlen(name)
    nv.value = <uint8_t *>value
    nv.valuelen = strlen(value)
    nv.flags = STATIC
    return nv


cdef inline nghttp2_nv bytes_nv(const char *name, bytes value, uint8_t flags) noexcept:
    """A header pair whose value lives as long as ``value``."""
    cdef nghttp2_nv nv
    nv.name = <uint8_t *>name
    nv.namelen = strlen(name)
    nv.value = <uint8_t *>PyBytes_AS_STRING(value)
    nv.valuelen = PyBytes_GET_SIZE(value)
    nv.flags = flags
    return nv


cdef inline bint is_text(const uint8_t *data, size_t size, const char *text, size_t length) noexcept:
    return size == length and memcmp(data, text, length) == 0


cdef double now() noexcept
cdef list encode_metadata(object metadata)
cdef int add_pairs(nghttp2_nv *pairs, int count, list encoded) except -1
cdef bint is_internal(const uint8_t *name, size_t size) noexcept
cdef nghttp2_data_source_read_callback read_callback


cdef class Method:
    cdef readonly str path
    cdef bytes raw_path
    cdef public object handler
    cdef bint streaming
    cdef readonly CallCounters counted
    cdef readonly CallCounters from_peers


@cython.no_gc  # for subclasses in other modules, which see this declaration only
cdef class Stream:
    cdef Session session
    cdef int32_t id
    cdef void *newer          # neighbours in the session's list of open streams
    cdef void *older
    cdef Method target        # of an open call: its handler may lead back here, which nothing would collect
    cdef str path             # of the method, once the call is over
    # receiving
    cdef uint8_t prefix[5]
    cdef int prefix_have
    cdef bytes body            # the message being filled, or the one delivered (unary)
    cdef Py_ssize_t body_have
    cdef bint body_done
    cdef bint as_came          # a compressed answer is not unpacked, for it is passed on
    cdef bytes packed          # the message as it came, where it was compressed (of a server's unary call, or as_came)
    cdef bint received_end     # and on_end of the sink is due
    cdef bint peer_ended       # END_STREAM came
    cdef Py_ssize_t held       # what it takes of session.receiving
    cdef bint discard         # whatever else comes is dropped
    cdef list inbox           # streaming: whole messages not handed over yet
    cdef Py_ssize_t inbox_bytes
    cdef size_t withheld      # of the stream's window
    # metadata, unread: sizes of name and value, name, value; again and again
    cdef uint8_t inline_metadata[INLINE_METADATA]
    cdef uint8_t *more_metadata
    cdef size_t metadata_bytes
    cdef size_t metadata_room
    cdef size_t initial_bytes  # client: how many of them came before the trailers
    cdef size_t header_bytes
    cdef str encoding
    cdef str accept_encoding
    cdef bint content_type_ok
    cdef bint http_ok
    cdef bint header_flood
    cdef int64_t timeout_ns
    # sending
    cdef uint8_t out_prefix[5]
    cdef const uint8_t *out_data
    cdef Py_ssize_t out_left   # of out_data
    cdef object out_owner
    cdef object out_next       # after out_data; then out_queue
    cdef object out_queue
    cdef Py_ssize_t out_bytes  # not yet in a frame, all together
    cdef double began          # of a server's call: when its headers came
    cdef int64_t message_bytes  # of messages received, decompressed
    cdef int64_t answer_bytes  # of messages sent, before what is not sent yet
    cdef bint out_end
    cdef bint deferred
    cdef bint want_writable
    cdef bint queued           # in session.ready
    cdef bint opened           # nghttp2 knows it
    cdef bint closed
    cdef readonly object deadline
    cdef str send_encoding
    cdef public object sink
    # status: what trailers said (client) or will say (server); -1 unknown
    cdef int grpc_status
    cdef str grpc_message
    cdef bytes details_header

    cdef int begin(self, Session session, int32_t stream_id) except -1
    cdef int keep(self, const uint8_t *name, size_t name_size, const uint8_t *value, size_t value_size) except -1
    cdef int feed(self, const uint8_t *data, size_t length) except -1
    cdef int take_message(self) except -1
    cdef int hold(self, Py_ssize_t size) except -1
    cdef void release(self, Py_ssize_t size) noexcept
    cdef int push(self, object message) except -1
    cdef int push_as(self, object message, uint8_t flag) except -1
    cdef int push_buffer(self, object piece) except -1
    cdef int advance(self) except -1
    cdef int emit(self, Buffers buffers, size_t length) except -1
    cdef int wake(self) except -1
    cdef int queue_ready(self) except -1
    cdef int forget(self) except -1
    cdef tuple metadata_between(self, size_t first, size_t last)
    cdef list pairs_between(self, size_t first, size_t last)
    cdef int on_headers_done(self, int category, bint end) except -1
    cdef int on_no_memory(self, size_t length) except -1
    cdef int on_overflow(self, size_t length) except -1
    cdef int on_bad_message(self, int status, str text) except -1
    cdef int on_message(self) except -1
    cdef int deliver(self) except -1
    cdef int on_ready(self) except -1
    cdef int submit_end(self) except -1
    cdef int on_end(self) except -1
    cdef int on_close(self, uint32_t code, str reason) except -1
    cdef bint running(self) noexcept
    cdef int expire(self) except -1


cdef class Session:
    cdef nghttp2_session *h2
    cdef Buffers buffers
    cdef readonly bint client
    cdef void *newest
    cdef int32_t last_id
    cdef void *last_stream
    cdef list ready
    cdef list resets                # streams to reset once their answer has left
    cdef readonly int open_streams
    cdef readonly bint settled      # the peer's SETTINGS came
    cdef readonly bint going_away   # the peer sent GOAWAY
    cdef readonly bint broken
    cdef bint inside                # nghttp2 is on the stack
    cdef bint busy                  # a flush follows anyway
    cdef bint flushing
    cdef bint linger                # quiet, but not to be closed yet
    cdef bint full
    cdef bint handed_over
    cdef bint paused
    cdef bint flush_planned
    cdef object transport
    cdef int fd
    cdef readonly str peer
    cdef bytes authority
    cdef bytes scheme
    cdef bytes user_agent
    cdef Py_ssize_t max_message
    cdef Py_ssize_t max_receiving
    cdef Py_ssize_t max_unsent
    cdef size_t max_header
    cdef size_t consumed            # of the connection's window, in this read event
    cdef size_t update_bytes        # received by a stream before its window is opened again
    cdef Py_ssize_t receiving       # bytes of messages no handler has yet
    cdef readonly Py_ssize_t unsent
    cdef readonly int64_t bytes_received
    cdef readonly int64_t bytes_sent
    cdef readonly int64_t data_sent   # bytes of messages put in frames
    cdef readonly int64_t calls
    cdef double next_deadline
    cdef double control_tokens
    cdef double control_burst
    cdef double control_rate
    cdef double control_at

    cdef int receive(self, const uint8_t *data, size_t length) except -1
    cdef int greet(self, settings) except -1
    cdef int close_stream(self, Stream stream, uint32_t code, str reason) except -1
    cdef Stream accept(self)
    cdef int open(self, bint client, nghttp2_session_callbacks *callbacks, settings) except -1
    cdef int want_flush(self) except -1
    cdef int run_ready(self) except -1
    cdef int do_flush(self) except -1
    cdef int write_out(self) except -1
    cdef int count_control(self) except -1
    cdef int refuse_waiting(self) except -1
    cdef int end_streams(self, str reason) except -1
    cdef int fatal(self, int code) except -1
    cdef int arm(self, double deadline) except -1


cdef inline void *find_stream(Session session, int32_t stream_id) noexcept:
    """The stream of this id, borrowed, or NULL; most callbacks come for the same one in a row."""
    if stream_id != session.last_id:
        session.last_id = stream_id
        session.last_stream = nghttp2_session_get_stream_user_data(session.h2, stream_id)
    return session.last_stream


cdef nghttp2_session_callbacks *new_callbacks(nghttp2_on_header_callback on_header) except NULL
