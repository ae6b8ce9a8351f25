"""gRPC over HTTP/2: what a session and its streams are on either side, around libnghttp2.

Sans I/O but for one thing: what is to be sent goes straight to the socket, in one ``sendmsg`` for all that one read
event caused, and to the asyncio transport only when the socket is full (or is not ours, as under TLS).

How it works. ``buffer_updated`` gives received bytes to nghttp2, whose callbacks fill Stream objects; streams that
have something for Python are noted in ``Session.ready`` and served after nghttp2 has returned, so handlers may submit
anything. Then everything is flushed. nghttp2 owns one reference to each open Stream (its stream user data), taken in
``begin`` and given back in ``on_stream_close``; ``shut`` closes what is left when the connection is lost.

Threads: everything runs on the thread of one event loop.
"""

import cython

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.exc cimport PyErr_Fetch, PyErr_Restore
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from mmcore._ext.grpcwire cimport decode_binary, encode_binary
from mmcore._ext.h2memory cimport memory
from mmcore._ext.nghttp2 cimport *
from mmcore._ext.outbuf cimport IN_BYTES, REFERENCE_BYTES, Buffers, Part

import re
from collections import deque

from mmcore._ext.grpcwire import ENCODINGS, compress, decompress

from mmcore.errors import MessageTooLong

cdef enum:
    FRAME_BYTES = 256 * 1024       # longest DATA frame sent: few frames for a tensor, and no stream held up for long
    UPDATE_BYTES = 256 * 1024      # most that a stream receives before its window is opened again
    INBOX_BYTES = 1024 * 1024      # a stream's messages not taken by its handler, before its window is left closed
    MESSAGE_COST = 64              # counted for a received message beside its bytes, about what its object takes
    OUT_LOW_BYTES = 64 * 1024      # a stream's unsent bytes at which its sender is woken

cdef double DEADLINE_SLACK_S = 0.05    # a caller's deadline comes earlier than ours by the time its request took

cdef extern from *:
    """
    #include <nghttp2/nghttp2.h>
    /* In nghttp2 since 1.57, and in older versions where the repair of CVE-2023-44487 was carried back. */
    extern void nghttp2_option_set_stream_reset_rate_limit(nghttp2_option *, uint64_t, uint64_t)
        __attribute__((weak));
    static void leave_resets_to_us(nghttp2_option *option) {
        if (nghttp2_option_set_stream_reset_rate_limit)
            nghttp2_option_set_stream_reset_rate_limit(option, (uint64_t)1 << 40, (uint64_t)1 << 20);
    }
    /* In nghttp2 since 1.50, which began to check then. */
    extern void nghttp2_option_set_no_rfc9113_leading_and_trailing_ws_validation(nghttp2_option *, int)
        __attribute__((weak));
    static void take_spaces_around_values(nghttp2_option *option) {
        if (nghttp2_option_set_no_rfc9113_leading_and_trailing_ws_validation)
            nghttp2_option_set_no_rfc9113_leading_and_trailing_ws_validation(option, 1);
    }
    """
    void leave_resets_to_us(nghttp2_option *option)
    void take_spaces_around_values(nghttp2_option *option)

cdef long live_streams = 0
cdef long live_sessions = 0


def live_objects():
    """Streams and sessions that exist now, for leak checks."""
    return {"streams": live_streams, "sessions": live_sessions}


cdef double now() noexcept:
    """Monotonic seconds, as time.monotonic tells them."""
    cdef timespec spec
    clock_gettime(CLOCK_MONOTONIC, &spec)
    return <double>spec.tv_sec + <double>spec.tv_nsec * 1e-9


cdef object NAME = re.compile(r"[0-9a-z_.\-]+")
cdef object TEXT = re.compile(r"[ -~]*")
cdef frozenset RESERVED = frozenset((
    "te", "host", "content-type", "content-length", "connection", "transfer-encoding", "keep-alive", "upgrade",
    "proxy-connection",
    "grpc-timeout", "grpc-encoding", "grpc-accept-encoding", "grpc-status", "grpc-message",
))


cdef list encode_metadata(object metadata):
    """A caller's metadata as pairs of bytes, base64 for ``-bin`` names.

    Raises:
        ValueError: a name or a value cannot be sent, or there are too many.
        TypeError: a value is not of the type its name asks for.
    """
    cdef list encoded = []
    cdef Py_ssize_t size = 0
    cdef bytes raw
    for name, value in metadata:
        if NAME.fullmatch(name) is None or name in RESERVED:
            raise ValueError(f"{name!r} is no name for metadata")
        if name.endswith("-bin"):
            raw = encode_binary(value)
        elif not isinstance(value, str):
            raise TypeError(f"metadata {name!r} takes text, not {type(value).__name__}; -bin names take bytes")
        elif TEXT.fullmatch(value) is None:
            raise ValueError(f"metadata {name!r} takes printable ASCII; names ending in -bin take bytes")
        else:
            raw = value.encode("ascii")
        encoded.append((name.encode("ascii"), raw))
        size += len(name) + len(raw) + 32
    if len(encoded) > MAX_METADATA or size > MAX_METADATA_BYTES:
        raise ValueError(f"metadata may be {MAX_METADATA} pairs and {MAX_METADATA_BYTES} bytes")
    return encoded


cdef int add_pairs(nghttp2_nv *pairs, int count, list encoded) except -1:
    """Append encoded pairs to a header array; returns the new count.

    nghttp2 copies these (no NO_COPY flags), so ``encoded`` need live only until the submit call.
    """
    cdef bytes name, value
    for name, value in encoded:
        if count == MAX_HEADERS:
            raise ValueError(f"more than {MAX_HEADERS} headers in one block")
        pairs[count].name = <uint8_t *>PyBytes_AS_STRING(name)
        pairs[count].namelen = PyBytes_GET_SIZE(name)
        pairs[count].value = <uint8_t *>PyBytes_AS_STRING(value)
        pairs[count].valuelen = PyBytes_GET_SIZE(value)
        pairs[count].flags = NGHTTP2_NV_FLAG_NONE
        count += 1
    return count


cdef bint is_internal(const uint8_t *name, size_t size) noexcept:
    """Whether metadata of this name is between instances of ours, and of no meaning from or to anybody else."""
    return size > 7 and name[0] == c"m" and memcmp(name, b"mmcore-", 7) == 0


@cython.final
cdef class Method:
    """One gRPC method: its path and, on a server, what answers it.

    Attributes:
        handler: what answers calls from now on.
        counted, from_peers: the calls of clients, and those of other instances.
    """

    def __init__(self, str path not None, object handler=None, bint streaming=False):
        self.path = path
        self.raw_path = path.encode("ascii")
        self.handler = handler
        self.streaming = streaming
        self.counted = CallCounters()
        self.from_peers = CallCounters()


@cython.no_gc  # its references to Python callables are cleared in forget(); cycles end there
cdef class Stream:
    """One HTTP/2 stream: the state both sides share. Made by the session only."""

    def __cinit__(self):
        global live_streams
        live_streams += 1
        self.grpc_status = -1
        self.timeout_ns = NO_TIMEOUT

    def __dealloc__(self):
        global live_streams
        live_streams -= 1
        if self.more_metadata != NULL:
            PyMem_Free(self.more_metadata)

    cdef int begin(self, Session session, int32_t stream_id) except -1:
        """Enter the session's list; nghttp2 holds a reference from here on."""
        self.session = session
        self.id = stream_id
        self.opened = True
        self.older = session.newest
        self.newer = NULL
        if session.newest != NULL:
            (<Stream>session.newest).newer = <void *>self
        session.newest = <void *>self
        session.open_streams += 1
        Py_INCREF(self)
        return 0

    cdef int forget(self) except -1:
        """Leave the session's list and drop nghttp2's reference; the caller holds one of its own."""
        cdef Session session = self.session
        if not self.opened:
            return 0
        self.opened = False
        if self.newer != NULL:
            (<Stream>self.newer).older = self.older
        else:
            session.newest = self.older
        if self.older != NULL:
            (<Stream>self.older).newer = self.newer
        if session.last_stream == <void *>self:
            session.last_stream = NULL
            session.last_id = -1
        session.open_streams -= 1
        session.unsent -= self.out_bytes
        self.out_bytes = 0
        self.out_left = 0
        self.out_owner = self.out_next = self.out_queue = None
        self.release(self.held)
        if self.target is not None:
            self.path = self.target.path
            self.target = None
        if not self.body_done:
            self.body = None
        Py_DECREF(self)
        return 0

    # -- metadata

    cdef int keep(self, const uint8_t *name, size_t name_size, const uint8_t *value, size_t value_size) except -1:
        """Copy one pair of metadata, unread; most calls' fit the object itself."""
        cdef uint8_t *target
        cdef uint32_t[2] sizes
        cdef size_t needed = self.metadata_bytes + sizeof(sizes) + name_size + value_size
        if needed > INLINE_METADATA and needed > self.metadata_room:
            target = <uint8_t *>PyMem_Realloc(self.more_metadata, 2 * needed)
            if target == NULL:
                raise MemoryError
            if self.more_metadata == NULL:
                memcpy(target, self.inline_metadata, self.metadata_bytes)
            self.more_metadata = target
            self.metadata_room = 2 * needed
        target = (self.more_metadata if self.more_metadata != NULL else &self.inline_metadata[0]) + self.metadata_bytes
        sizes[0] = <uint32_t>name_size
        sizes[1] = <uint32_t>value_size
        memcpy(target, sizes, sizeof(sizes))
        memcpy(target + sizeof(sizes), name, name_size)
        memcpy(target + sizeof(sizes) + name_size, value, value_size)
        self.metadata_bytes = needed
        return 0

    cdef tuple metadata_between(self, size_t first, size_t last):
        """Pairs kept in these bytes as Python objects: text values as str, ``-bin`` values decoded."""
        cdef const uint8_t *source = self.more_metadata if self.more_metadata != NULL else &self.inline_metadata[0]
        cdef uint32_t[2] sizes
        cdef list found = []
        cdef bytes value
        while first < last:
            memcpy(sizes, source + first, sizeof(sizes))
            first += sizeof(sizes)
            name = (<const char *>source + first)[:sizes[0]].decode("ascii", "replace")
            first += sizes[0]
            value = (<const char *>source + first)[:sizes[1]]
            first += sizes[1]
            if not name.endswith("-bin"):
                found.append((name, value.decode("latin-1")))
                continue
            for one in value.split(b","):
                try:
                    found.append((name, decode_binary(one.strip())))
                except ValueError:
                    continue  # not base64: the pair says nothing, as in gRPC's own libraries
        return tuple(found)

    cdef list pairs_between(self, size_t first, size_t last):
        """Pairs kept in these bytes as they came, to be passed on: without user-agent and what instances tell us."""
        cdef const uint8_t *source = self.more_metadata if self.more_metadata != NULL else &self.inline_metadata[0]
        cdef const uint8_t *name
        cdef uint32_t[2] sizes
        cdef list found = []
        while first < last:
            memcpy(sizes, source + first, sizeof(sizes))
            name = source + first + sizeof(sizes)
            first += sizeof(sizes) + sizes[0] + sizes[1]
            if not is_text(name, sizes[0], b"user-agent", 10) and not is_internal(name, sizes[0]):
                found.append(((<const char *>name)[:sizes[0]], (<const char *>name)[sizes[0]:sizes[0] + sizes[1]]))
        return found

    cdef int on_headers_done(self, int category, bint end) except -1:
        return 0

    # -- receiving

    cdef int feed(self, const uint8_t *data, size_t length) except -1:
        """Unframe DATA bytes: five bytes of prefix, then the message straight into its final object."""
        cdef size_t take
        cdef size_t size
        cdef Session session = self.session
        while length:
            if self.discard:
                return 0
            if self.prefix_have < 5:
                take = min(<size_t>(5 - self.prefix_have), length)
                memcpy(self.prefix + self.prefix_have, data, take)
                self.prefix_have += <int>take
                data += take
                length -= take
                if self.prefix_have < 5:
                    return 0
                size = (
                    (<size_t>self.prefix[1] << 24) | (<size_t>self.prefix[2] << 16)
                    | (<size_t>self.prefix[3] << 8) | <size_t>self.prefix[4]
                )
                if self.prefix[0] > 1:
                    return self.on_bad_message(INTERNAL, f"message flag {self.prefix[0]} is neither 0 nor 1")
                if size > <size_t>session.max_message:
                    return self.on_overflow(size)
                if self.inbox is None and self.body is not None:
                    return self.on_bad_message(UNIMPLEMENTED, "a unary call takes one message, more were sent")
                if self.hold(size + MESSAGE_COST) < 0:
                    return -1
                if self.discard:
                    return 0
                try:
                    self.body = PyBytes_FromStringAndSize(NULL, size)
                except MemoryError:
                    return self.on_no_memory(size)
                self.body_have = 0
                self.body_done = False
            size = PyBytes_GET_SIZE(self.body)
            take = min(size - self.body_have, length)
            memcpy(PyBytes_AS_STRING(self.body) + self.body_have, data, take)
            self.body_have += take
            data += take
            length -= take
            if <size_t>self.body_have < size:
                return 0
            self.body_done = True
            self.prefix_have = 0
            if self.take_message() < 0:
                return -1
        return 0

    cdef int hold(self, Py_ssize_t size) except -1:
        """Count bytes the stream keeps until a handler takes them; too many of them on a server refuse the call."""
        cdef Session session = self.session
        if session.receiving + size > session.max_receiving and not session.client:
            return self.on_bad_message(
                RESOURCE_EXHAUSTED, "too many bytes of unfinished messages on this connection")
        self.held += size
        session.receiving += size
        return 0

    cdef void release(self, Py_ssize_t size) noexcept:
        """Stop counting bytes that hold counted; all of them went when the stream was forgotten."""
        size = min(size, self.held)
        self.held -= size
        self.session.receiving -= size

    cdef int take_message(self) except -1:
        """A whole message is there: decompress it, and hand it on."""
        cdef str encoding
        cdef bytes packed
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self.body)
        if self.prefix[0] == 1:
            encoding = self.encoding
            if encoding is None or encoding == "identity":
                return self.on_bad_message(INTERNAL, "a message is marked compressed, but grpc-encoding names nothing")
            if encoding not in ENCODINGS:
                return self.on_bad_message(INTERNAL, f"grpc-encoding {encoding!r} is not known here")
            packed = self.body
            if self.as_came:
                self.packed = packed
                return self.on_message()
            try:
                self.body = decompress(encoding, packed, self.session.max_message)
            except MessageTooLong:
                return self.on_overflow(0)
            except MemoryError:
                return self.on_no_memory(size)
            except ValueError as error:
                return self.on_bad_message(INTERNAL, f"a message is not valid {encoding}: {error}")
            self.release(size)
            if self.hold(PyBytes_GET_SIZE(self.body)) < 0:
                return -1
            if self.discard:
                return 0
            if self.inbox is None and not self.session.client:
                self.packed = packed
        self.message_bytes += PyBytes_GET_SIZE(self.body)
        if self.inbox is not None:
            self.inbox.append(self.body)
            self.inbox_bytes += PyBytes_GET_SIZE(self.body) + MESSAGE_COST
            self.body = None
            return self.queue_ready()
        return self.on_message()

    cdef int on_message(self) except -1:
        return 0

    cdef int on_overflow(self, size_t length) except -1:
        cdef str what = f"message of {length} bytes" if length else "message, once decompressed,"
        return self.on_bad_message(
            RESOURCE_EXHAUSTED, f"{what} is above the limit of {self.session.max_message} bytes")

    cdef int on_no_memory(self, size_t length) except -1:
        """The call is refused and the connection goes on."""
        return self.on_bad_message(RESOURCE_EXHAUSTED, f"there is no memory for a message of {length} bytes")

    cdef int on_bad_message(self, int status, str text) except -1:
        self.discard = True
        return 0

    def taken(self, Py_ssize_t size):
        """A message of the inbox was consumed: let the peer send as much again."""
        cdef Session session = self.session
        self.inbox_bytes -= size + MESSAGE_COST
        self.release(size + MESSAGE_COST)
        if (
            self.withheld >= session.update_bytes and self.inbox_bytes <= INBOX_BYTES
            and not self.closed and session.h2 != NULL
        ):
            nghttp2_session_consume_stream(session.h2, self.id, self.withheld)
            self.withheld = 0
            session.want_flush()

    # -- sending

    cdef int push(self, object message) except -1:
        """Queue one message: bytes, another buffer, or a list of them that is one message."""
        if self.send_encoding is not None:
            return self.push_as(compress(self.send_encoding, message), 1)
        return self.push_as(message, 0)

    cdef int push_as(self, object message, uint8_t flag) except -1:
        """Queue one message that is compressed already, flag 1, or shall not be."""
        cdef Py_ssize_t size
        cdef uint8_t head[5]
        if PyBytes_CheckExact(message):
            size = PyBytes_GET_SIZE(message)
        elif isinstance(message, list):
            message = [piece if PyBytes_CheckExact(piece) else Part(piece) for piece in message]
            size = 0
            for piece in message:
                size += PyBytes_GET_SIZE(piece) if PyBytes_CheckExact(piece) else (<Part>piece).view.len
        else:
            message = Part(message)
            size = (<Part>message).view.len
        if size > <Py_ssize_t>0xFFFFFFFF:
            raise ValueError(f"a gRPC message holds at most 4294967295 bytes, this one has {size}")
        self.answer_bytes += size
        head[0] = flag
        head[1] = (size >> 24) & 0xFF
        head[2] = (size >> 16) & 0xFF
        head[3] = (size >> 8) & 0xFF
        head[4] = size & 0xFF
        if self.out_left == 0 and self.out_next is None:
            memcpy(self.out_prefix, head, 5)
            self.out_data = self.out_prefix
            self.out_left = 5
            self.out_owner = None
        else:
            self.push_buffer((<const char *>head)[:5])
        if isinstance(message, list):
            for piece in message:
                self.push_buffer(piece)
        else:
            self.push_buffer(message)
        self.out_bytes += size + 5
        self.session.unsent += size + 5
        return 0

    cdef int push_buffer(self, object piece) except -1:
        if self.out_next is None:
            self.out_next = piece
            return 0
        if self.out_queue is None:
            self.out_queue = deque()
        self.out_queue.append(piece)
        return 0

    cdef int advance(self) except -1:
        """Make the next piece the current one."""
        piece = self.out_next
        self.out_next = self.out_queue.popleft() if self.out_queue else None
        self.out_owner = piece
        if PyBytes_CheckExact(piece):
            self.out_data = <const uint8_t *>PyBytes_AS_STRING(piece)
            self.out_left = PyBytes_GET_SIZE(piece)
        else:
            self.out_data = <const uint8_t *>(<Part>piece).view.buf
            self.out_left = (<Part>piece).view.len
        return 0

    cdef int emit(self, Buffers buffers, size_t length) except -1:
        """Move the next ``length`` bytes into the write buffer, long pieces by reference."""
        cdef size_t take
        while length:
            while self.out_left == 0:
                self.advance()
            take = min(<size_t>self.out_left, length)
            if take >= REFERENCE_BYTES:
                buffers.reference(self.out_data, take, self.out_owner)
            else:
                buffers.copy(self.out_data, take)
            self.out_data += take
            self.out_left -= take
            length -= take
        return 0

    cdef int wake(self) except -1:
        """There is something to send now: tell nghttp2 and see to a flush."""
        if self.deferred and self.session.h2 != NULL:
            self.deferred = False
            nghttp2_session_resume_data(self.session.h2, self.id)
        self.session.want_flush()
        return 0

    cdef int submit_end(self) except -1:
        """Called when the last DATA frame is made; a server adds its trailers here."""
        return 0

    cdef int queue_ready(self) except -1:
        """Have on_ready called once nghttp2 is off the stack."""
        if not self.queued:
            self.queued = True
            self.session.ready.append(self)
        return 0

    cdef int on_ready(self) except -1:
        return 0

    cdef int on_end(self) except -1:
        """The peer has sent all it will."""
        return 0

    cdef int on_close(self, uint32_t code, str reason) except -1:
        """The stream is closed: by an HTTP/2 error code, or with its connection for a reason."""
        return 0

    cdef bint running(self) noexcept:
        """Whether a deadline still matters."""
        return False

    cdef int expire(self) except -1:
        """The deadline passed."""
        return 0

    cdef int deliver(self) except -1:
        """Give the sink what came: messages in order, then the end."""
        cdef list messages = self.inbox
        if messages:
            self.inbox = []
            for message in messages:
                if self.sink is None:  # it ended the call
                    return 0
                self.sink.on_message(message)
        if self.received_end and self.sink is not None:
            self.received_end = False
            self.sink.on_end()
        if self.want_writable and self.out_bytes <= OUT_LOW_BYTES and self.sink is not None:
            self.want_writable = False
            self.sink.on_writable()
        return 0

    @property
    def peer(self):
        """Address of the other side."""
        return self.session.peer

    @property
    def cancelled(self):
        """Whether the stream has ended, whoever ended it."""
        return self.closed

    @property
    def unsent(self):
        """Bytes of queued messages that are in no frame yet."""
        return self.out_bytes

    def notify_writable(self):
        """Have the sink's on_writable called once the unsent bytes are few."""
        self.want_writable = True


cdef class Session:
    """One connection's HTTP/2 state and its way to the socket.

    Subclassed by h2server and h2client, and those in Python (mmcore/transport/connection.py) by a protocol that owns
    timers and the event loop; the methods named there (``plan_flush`` and those raising nothing) are its hooks.

    Args:
        buffers: the loop's shared buffers.
        settings: limits, a :class:`mmcore.config.TransportSettings`.
    """

    def __cinit__(self, Buffers buffers not None, settings, *args, **kwargs):
        global live_sessions
        live_sessions += 1
        self.buffers = buffers
        self.ready = []
        self.resets = []
        self.last_id = -1
        self.fd = -1
        self.peer = ""
        self.authority = b"localhost"
        self.scheme = b"http"
        self.user_agent = b"mmcore"
        self.max_message = settings.max_message_bytes
        # One message of any allowed length always fits.
        self.max_receiving = max(settings.max_receiving_bytes, 2 * settings.max_message_bytes)
        self.max_unsent = max(settings.max_unsent_bytes, 2 * settings.max_message_bytes)
        self.max_header = settings.max_header_bytes
        self.update_bytes = min(UPDATE_BYTES, settings.stream_window_bytes // 2)
        self.control_burst = self.control_tokens = settings.control_frame_burst
        self.control_rate = settings.control_frames_per_s
        self.control_at = now()

    cdef int open(self, bint client, nghttp2_session_callbacks *callbacks, settings) except -1:
        """Make the nghttp2 session; called by the subclass that knows the side."""
        cdef nghttp2_option *option = NULL
        self.client = client
        if nghttp2_option_new(&option) != 0:
            raise MemoryError
        nghttp2_option_set_no_auto_window_update(option, 1)
        nghttp2_option_set_no_closed_streams(option, 1)
        leave_resets_to_us(option)
        if client:
            # gRPC's servers send a message that ends in a space as it is: Triton's for a wrong shape does.
            take_spaces_around_values(option)
            status = nghttp2_session_client_new3(&self.h2, callbacks, <void *>self, option, &memory)
        else:
            status = nghttp2_session_server_new3(&self.h2, callbacks, <void *>self, option, &memory)
        nghttp2_option_del(option)
        if status != 0:
            raise MemoryError
        return self.greet(settings)

    def __dealloc__(self):
        global live_sessions
        live_sessions -= 1
        if self.h2 != NULL:
            nghttp2_session_del(self.h2)

    cdef int greet(self, settings) except -1:
        """Queue our SETTINGS and open the connection's window."""
        cdef nghttp2_settings_entry[5] entries
        entries[0].settings_id = NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE
        entries[0].value = settings.stream_window_bytes
        entries[1].settings_id = NGHTTP2_SETTINGS_MAX_FRAME_SIZE
        entries[1].value = settings.max_frame_bytes
        entries[2].settings_id = NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE
        entries[2].value = settings.max_header_bytes
        if self.client:
            entries[3].settings_id, entries[3].value = NGHTTP2_SETTINGS_ENABLE_PUSH, 0
        else:
            entries[3].settings_id = NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS
            entries[3].value = settings.max_concurrent_streams
        # Nobody sets gRPC priorities, and nghttp2's dependency tree costs a call more than its queue does.
        entries[4].settings_id = NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES
        entries[4].value = 1
        nghttp2_submit_settings(self.h2, 0, entries, 5)
        nghttp2_session_set_local_window_size(self.h2, 0, 0, settings.connection_window_bytes)
        return 0

    # -- hooks of the protocol that subclasses this

    def plan_flush(self):
        """Flush soon; overridden to do it once per loop iteration."""
        self.flush()

    def abort(self):
        """Drop the connection at once."""

    def finish(self):
        """All is said: close the connection so that the peer can read the last of it."""
        self.transport.close()

    def deadline_changed(self, double deadline):
        """The earliest deadline is now this one (monotonic seconds)."""

    def callback_failed(self, call, error):
        """A callback of a call raised, other than a unary handler."""

    def open_stream_call(self, call, handler):
        """Start a streaming handler; returns the sink for the call's messages."""

    def handler_failed(self, call, error):
        """Answer an exception of a unary handler."""

    def on_pong(self):
        """A PING of ours was answered."""

    def on_going_away(self):
        """The peer sent GOAWAY."""

    cdef Stream accept(self):
        """A new stream of the peer's (server side)."""
        raise TypeError("this side takes no calls")

    # -- socket

    def attach(self, transport, int fd, str peer not None, bytes authority=None, bint secure=False):
        """The connection is made: write to ``fd`` directly, or only through ``transport`` when it is -1."""
        self.transport = transport
        self.fd = fd
        self.peer = peer
        if authority is not None:
            self.authority = authority
        if secure:
            self.scheme = b"https"

    def get_buffer(self, sizehint):
        """asyncio.BufferedProtocol: where to read into."""
        return self.buffers.incoming_view

    def buffer_updated(self, Py_ssize_t nbytes):
        """asyncio.BufferedProtocol: bytes were read."""
        if nbytes < 0 or nbytes > IN_BYTES:
            raise ValueError(f"read of {nbytes} bytes")
        self.receive(<const uint8_t *>PyByteArray_AS_STRING(self.buffers.incoming), nbytes)

    def feed_bytes(self, bytes data not None):
        """Give received bytes by hand (tests, fuzzing)."""
        self.receive(<const uint8_t *>PyBytes_AS_STRING(data), len(data))

    cdef int receive(self, const uint8_t *data, size_t length) except -1:
        cdef ssize_t used
        if self.h2 == NULL or self.broken:
            return 0
        self.bytes_received += length
        self.busy = self.inside = True
        used = nghttp2_session_mem_recv(self.h2, data, length)
        self.inside = False
        try:
            if used == NGHTTP2_ERR_FLOODED:
                # More acknowledgements wait to leave than one read event may cause.
                self.terminate(NGHTTP2_ENHANCE_YOUR_CALM)
            elif used < 0:
                return self.fatal(<int>used)
            if self.consumed:
                nghttp2_session_consume_connection(self.h2, self.consumed)
                self.consumed = 0
            self.run_ready()
        finally:
            self.busy = False
        self.do_flush()
        return 0

    cdef int run_ready(self) except -1:
        """Serve the streams that have something for Python."""
        cdef list ready
        cdef Stream stream
        cdef Py_ssize_t served
        while self.ready:
            ready = self.ready
            self.ready = []
            served = 0
            try:
                for item in ready:
                    served += 1
                    stream = <Stream>item
                    stream.queued = False
                    try:
                        stream.on_ready()
                    except Exception as error:  # a callback's fault must not cost the other streams their turn
                        self.callback_failed(stream, error)
            finally:
                if served < len(ready):  # an interrupt: the others keep their turn
                    self.ready = ready[served:] + self.ready
        return 0

    cdef int want_flush(self) except -1:
        """See to it that what was just queued leaves: at the end of this read event, or of this loop iteration."""
        if not self.busy and not self.flush_planned:
            self.flush_planned = True
            self.plan_flush()
        return 0

    cdef int fatal(self, int code) except -1:
        """nghttp2 gave up on the connection, or a callback of ours failed and its exception is pending."""
        cdef PyObject *kind = NULL
        cdef PyObject *value = NULL
        cdef PyObject *trace = NULL
        PyErr_Fetch(&kind, &value, &trace)
        self.broken = True
        try:
            self.abort()
        finally:
            if kind != NULL:
                PyErr_Restore(kind, value, trace)
        if kind != NULL:
            return -1
        return 0

    def flush(self):
        """Make frames of what is queued and write them."""
        self.flush_planned = False
        self.do_flush()

    cdef int do_flush(self) except -1:
        cdef const uint8_t *data
        cdef ssize_t length
        cdef Buffers buffers = self.buffers
        if self.inside or self.flushing or self.h2 == NULL or self.broken or self.transport is None:
            return 0
        self.flushing = self.busy = True
        try:
            while True:
                if self.handed_over:
                    if self.paused or self.transport.get_write_buffer_size() > 0:
                        self.run_ready()  # outcomes are told even while nothing can be sent
                        break
                    self.handed_over = False
                self.full = False
                self.inside = True
                length = nghttp2_session_mem_send(self.h2, &data)
                self.inside = False
                if length < 0:
                    buffers.clear()
                    self.fatal(<int>length)
                    return 0
                if length > 0:
                    if not buffers.has_room(length):
                        self.write_out()
                    buffers.copy(data, length)
                    continue
                if self.full:
                    self.write_out()
                    continue
                if self.resets:
                    for stream_id in self.resets:
                        if nghttp2_session_get_stream_user_data(self.h2, stream_id) != NULL:
                            nghttp2_submit_rst_stream(self.h2, 0, stream_id, NGHTTP2_NO_ERROR)
                    self.resets.clear()
                    continue
                if not self.ready:
                    break
                self.run_ready()
            if buffers.total:
                self.write_out()
        finally:
            self.flushing = self.busy = False
        if self.broken or self.linger or self.handed_over:
            return 0
        if not nghttp2_session_want_read(self.h2) and not nghttp2_session_want_write(self.h2):
            self.broken = True
            self.end_streams("the connection was ended for an HTTP/2 error")
            self.finish()
        return 0

    cdef int write_out(self) except -1:
        """Write what is gathered; what the socket does not take goes to the transport."""
        cdef Buffers buffers = self.buffers
        cdef ssize_t sent = 0
        cdef size_t total = buffers.total
        if self.fd >= 0 and not self.handed_over:
            buffers.seal()
            sent = buffers.send(self.fd)
            if sent < 0:
                sent = 0  # broken: the transport is to find out, and to end the connection
        if <size_t>sent < total:
            rest = buffers.rest(sent)
            buffers.clear()
            self.transport.write(rest)
            self.handed_over = True
            self.continue_later()
        else:
            buffers.clear()
        self.bytes_sent += total
        return 0

    @property
    def waiting(self):
        """Whether bytes wait for the peer to take them: for its windows to open, or its socket."""
        return self.unsent > 0 or self.handed_over

    def continue_later(self):
        """Bytes were left to the transport: flush again when it has written them."""

    def pause_writing(self):
        """asyncio: the transport's buffer has filled."""
        self.paused = True

    def resume_writing(self):
        """asyncio: the transport's buffer has drained."""
        self.paused = False
        self.do_flush()

    def shut(self, str reason not None):
        """The connection is gone: end every call with UNAVAILABLE, or cancel it on a server."""
        self.transport = None
        self.fd = -1
        self.broken = True
        self.end_streams(reason)
        if self.h2 != NULL and not self.inside:
            nghttp2_session_del(self.h2)
            self.h2 = NULL

    cdef int end_streams(self, str reason) except -1:
        """Close the streams that are left on a connection that carries nothing any more, and tell their callers."""
        cdef Stream stream
        while self.newest != NULL:
            stream = <Stream>self.newest
            if self.h2 != NULL:
                nghttp2_session_set_stream_user_data(self.h2, stream.id, NULL)
            self.close_stream(stream, NGHTTP2_CANCEL, reason)
        return self.run_ready()

    cdef int close_stream(self, Stream stream, uint32_t code, str reason) except -1:
        """A stream has closed: settle its outcome, and drop nghttp2's reference."""
        stream.closed = True
        stream.on_close(code, reason)
        stream.forget()
        return 0

    # -- deadlines

    cdef int arm(self, double deadline) except -1:
        if self.next_deadline == 0 or deadline < self.next_deadline:
            self.next_deadline = deadline
            self.deadline_changed(deadline)
        return 0

    def expire(self):
        """End the calls whose deadline has passed; tells the next deadline by ``deadline_changed``."""
        cdef double current = now(), earliest = 0
        cdef Stream stream
        cdef list late = []
        cdef void *place = self.newest
        while place != NULL:
            stream = <Stream>place
            place = stream.older
            if stream.deadline is None or not stream.running():
                continue
            if stream.deadline <= current:
                late.append(stream)
            elif earliest == 0 or stream.deadline < earliest:
                earliest = stream.deadline
        self.next_deadline = 0
        if earliest:
            self.arm(earliest)
        for item in late:
            try:
                (<Stream>item).expire()
            except Exception as error:  # of a callback: the other calls end as well
                self.callback_failed(item, error)
        self.run_ready()
        self.do_flush()

    # -- control

    def ping(self):
        """Send a PING."""
        if self.h2 != NULL:
            nghttp2_submit_ping(self.h2, 0, NULL)
            self.want_flush()

    def announce_shutdown(self):
        """First GOAWAY of a graceful end, and a PING: once that is answered the peer knows, and refuse_new follows."""
        if self.h2 != NULL:
            self.linger = True
            nghttp2_submit_shutdown_notice(self.h2)
            self.ping()

    def refuse_new(self):
        """Second GOAWAY: calls after those already seen are refused; the session ends with the last open one."""
        self.linger = False
        if self.h2 != NULL:
            nghttp2_submit_goaway(
                self.h2, 0, nghttp2_session_get_last_proc_stream_id(self.h2), NGHTTP2_NO_ERROR, NULL, 0)
            self.want_flush()

    def terminate(self, uint32_t code):
        """GOAWAY with an error; the connection closes once it is written."""
        self.linger = False
        if self.h2 != NULL:
            nghttp2_session_terminate_session(self.h2, code)
            self.want_flush()

    cdef int count_control(self) except -1:
        """Take a token for a frame that costs us work and carries nothing; none left ends the connection.

        Time gives tokens back, and so does every call that is answered (ServerCall.on_close).
        """
        cdef double current
        self.control_tokens -= 1
        if self.control_tokens < 0:
            current = now()
            self.control_tokens = min(
                self.control_burst, self.control_tokens + (current - self.control_at) * self.control_rate)
            self.control_at = current
            if self.control_tokens < 0:
                self.linger = False
                nghttp2_session_terminate_session(self.h2, NGHTTP2_ENHANCE_YOUR_CALM)
        return 0

    cdef int refuse_waiting(self) except -1:
        """The peer takes no new calls: end those that nghttp2 still holds back for want of a place."""
        cdef Stream stream
        cdef void *place = self.newest
        while place != NULL:
            stream = <Stream>place
            place = stream.older
            if nghttp2_session_get_stream_user_data(self.h2, stream.id) == NULL:
                stream.on_close(NGHTTP2_REFUSED_STREAM, None)
                nghttp2_submit_rst_stream(self.h2, 0, stream.id, NGHTTP2_REFUSED_STREAM)
        return 0

cdef extern from "Python.h":
    char *PyByteArray_AS_STRING(bytearray)


# -- nghttp2's callbacks. One that raises returns NGHTTP2_ERR_CALLBACK_FAILURE with the exception pending; nghttp2
# -- then unwinds without calling another, and receive or do_flush finds the exception.

cdef int on_begin_headers(
    nghttp2_session *h2, const nghttp2_frame *frame, void *user_data
) except NGHTTP2_ERR_CALLBACK_FAILURE:
    cdef Session session
    cdef Stream stream
    if (<Session>user_data).client or frame.headers.cat != NGHTTP2_HCAT_REQUEST:
        return 0
    session = <Session>user_data
    stream = session.accept()
    stream.begin(session, frame.hd.stream_id)
    nghttp2_session_set_stream_user_data(h2, frame.hd.stream_id, <void *>stream)
    session.last_id = frame.hd.stream_id
    session.last_stream = <void *>stream
    return 0


cdef int on_data_chunk(
    nghttp2_session *h2, uint8_t flags, int32_t stream_id, const uint8_t *data, size_t length, void *user_data,
) except NGHTTP2_ERR_CALLBACK_FAILURE:
    cdef void *found = find_stream(<Session>user_data, stream_id)
    cdef Stream stream
    (<Session>user_data).consumed += length
    if found == NULL:
        return 0
    stream = <Stream>found
    # The stream's window is opened again once it is worth a frame; most calls end before.
    stream.withheld += length
    if stream.withheld >= (<Session>user_data).update_bytes and (stream.inbox_bytes <= INBOX_BYTES or stream.discard):
        nghttp2_session_consume_stream(h2, stream_id, stream.withheld)
        stream.withheld = 0
    stream.feed(data, length)
    return 0


cdef int on_frame(
    nghttp2_session *h2, const nghttp2_frame *frame, void *user_data
) except NGHTTP2_ERR_CALLBACK_FAILURE:
    cdef Session session = <Session>user_data
    cdef Stream stream
    cdef void *found
    cdef bint end
    cdef uint8_t kind = frame.hd.type
    if kind == NGHTTP2_DATA or kind == NGHTTP2_HEADERS:
        found = find_stream(session, frame.hd.stream_id)
        end = (frame.hd.flags & NGHTTP2_FLAG_END_STREAM) != 0
        if kind == NGHTTP2_DATA and frame.hd.length == 0 and not end:
            session.count_control()
        if found == NULL:
            return 0
        stream = <Stream>found
        stream.peer_ended = end
        if kind == NGHTTP2_HEADERS:
            stream.on_headers_done(frame.headers.cat, end)
        if end:
            stream.on_end()
    elif kind == NGHTTP2_SETTINGS:
        if not frame.hd.flags & NGHTTP2_FLAG_ACK:
            session.settled = True
            session.count_control()
    elif kind == NGHTTP2_PING:
        session.count_control()
        if frame.hd.flags & NGHTTP2_FLAG_ACK:
            session.on_pong()
    elif kind == NGHTTP2_RST_STREAM:
        # Callers whose deadline has passed reset their calls, in crowds when we are slow: no reason to drop them all.
        found = find_stream(session, frame.hd.stream_id)
        if found == NULL or (<Stream>found).deadline is None or (<Stream>found).deadline > now() + DEADLINE_SLACK_S:
            session.count_control()
    elif kind == NGHTTP2_PRIORITY:
        session.count_control()
    elif kind == NGHTTP2_GOAWAY:
        session.count_control()
        session.going_away = True
        if session.client:
            session.refuse_waiting()
        session.on_going_away()
    return 0


cdef int on_invalid_frame(
    nghttp2_session *h2, const nghttp2_frame *frame, int error, void *user_data
) except NGHTTP2_ERR_CALLBACK_FAILURE:
    """nghttp2 answers with a reset, which waits for a peer that does not read: such ones are few or a flood."""
    if (<Session>user_data).handed_over:
        (<Session>user_data).count_control()
    return 0


cdef int on_stream_close(
    nghttp2_session *h2, int32_t stream_id, uint32_t code, void *user_data
) except NGHTTP2_ERR_CALLBACK_FAILURE:
    cdef void *found = find_stream(<Session>user_data, stream_id)
    cdef Stream stream
    if found != NULL:
        stream = <Stream>found
        if stream.opened:
            (<Session>user_data).close_stream(stream, code, None)
    return 0


cdef ssize_t on_read_length(
    nghttp2_session *h2, uint8_t kind, int32_t stream_id, int32_t session_window, int32_t stream_window,
    uint32_t max_frame, void *user_data,
) noexcept:
    """How long the next DATA frame may be; nghttp2's own answer would be 16 KiB."""
    return min(FRAME_BYTES, min(<ssize_t>max_frame, min(<ssize_t>session_window, <ssize_t>stream_window)))


cdef ssize_t on_read(
    nghttp2_session *h2, int32_t stream_id, uint8_t *buffer, size_t length, uint32_t *flags,
    nghttp2_data_source *source, void *user_data,
) except NGHTTP2_ERR_CALLBACK_FAILURE:
    """Say how much of a stream's queue the next DATA frame takes; on_send_data moves the bytes."""
    cdef Stream stream = <Stream>source.ptr
    cdef Py_ssize_t take = min(<Py_ssize_t>length, stream.out_bytes)
    if take == 0 and not stream.out_end:
        stream.deferred = True
        return NGHTTP2_ERR_DEFERRED
    stream.out_bytes -= take
    (<Session>user_data).unsent -= take
    (<Session>user_data).data_sent += take
    flags[0] |= NGHTTP2_DATA_FLAG_NO_COPY
    if stream.out_bytes == 0 and stream.out_end:
        flags[0] |= NGHTTP2_DATA_FLAG_EOF
        if not (<Session>user_data).client:
            flags[0] |= NGHTTP2_DATA_FLAG_NO_END_STREAM
            stream.submit_end()
    elif stream.want_writable and stream.out_bytes <= OUT_LOW_BYTES:
        stream.queue_ready()
    return take


cdef int on_send_data(
    nghttp2_session *h2, nghttp2_frame *frame, const uint8_t *head, size_t length, nghttp2_data_source *source,
    void *user_data,
) except NGHTTP2_ERR_CALLBACK_FAILURE:
    cdef Buffers buffers = (<Session>user_data).buffers
    if not buffers.has_room(length + 9):
        (<Session>user_data).full = True
        return NGHTTP2_ERR_WOULDBLOCK
    buffers.copy(head, 9)
    (<Stream>source.ptr).emit(buffers, length)
    return 0


cdef nghttp2_data_source_read_callback read_callback = <nghttp2_data_source_read_callback>on_read

cdef nghttp2_session_callbacks *new_callbacks(nghttp2_on_header_callback on_header) except NULL:
    """The callbacks of one side; its headers are the one thing each side reads in its own way."""
    cdef nghttp2_session_callbacks *callbacks = NULL
    if nghttp2_session_callbacks_new(&callbacks) != 0:
        raise MemoryError
    nghttp2_session_callbacks_set_on_begin_headers_callback(
        callbacks, <nghttp2_on_begin_headers_callback>on_begin_headers)
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header)
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(
        callbacks, <nghttp2_on_data_chunk_recv_callback>on_data_chunk)
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, <nghttp2_on_frame_recv_callback>on_frame)
    nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(
        callbacks, <nghttp2_on_invalid_frame_recv_callback>on_invalid_frame)
    nghttp2_session_callbacks_set_on_stream_close_callback(
        callbacks, <nghttp2_on_stream_close_callback>on_stream_close)
    nghttp2_session_callbacks_set_send_data_callback(callbacks, <nghttp2_send_data_callback>on_send_data)
    nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, on_read_length)
    return callbacks
