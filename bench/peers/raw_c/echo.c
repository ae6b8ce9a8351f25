/* The yardstick of the transport suite: a unary gRPC echo written directly over nghttp2 and epoll, one thread.
 *
 * It does what a gRPC server must do for a unary call (check the path, gather the length-prefixed message, answer
 * response headers, one message and trailers) and nothing else, so that what is left is nghttp2, the kernel and as
 * little as possible around them:
 *
 * - one recv, one nghttp2_session_mem_recv and one sendmsg for everything that is ready on a connection;
 * - header arrays are constant and passed with the NO_COPY flags;
 * - DATA leaves through the send-data callback: small payloads are appended to the connection's output buffer,
 *   large ones are referenced in place (the stream's buffer is kept until the kernel has taken it);
 * - streams come from a free list with room for a small message inside, closed ones are not kept by nghttp2;
 * - windows and frame sizes are opened wide, so that neither window updates nor 16 KiB frames slow a large message.
 *
 * Usage: echo [HOST [PORT]]; port 0 takes a free one. Prints the ready line of the bench peers and runs until killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define READ_BYTES (256 * 1024)
#define OUT_BYTES (128 * 1024)
#define OUT_PARTS 128
#define COPY_LIMIT 4096  /* a payload up to this size is cheaper to copy than to carry as a part of its own */
#define INLINE_BYTES 512
#define PREFIX_BYTES 5   /* gRPC: compressed flag, 4-byte big-endian length */
#define MESSAGE_LIMIT (64u * 1024 * 1024)
#define CONNECTION_WINDOW_BYTES (64 * 1024 * 1024)  /* windows and frames as mmcore's TransportSettings have them */
#define STREAM_WINDOW_BYTES (4 * 1024 * 1024)
#define FRAME_BYTES (1024 * 1024)

static const char PATH[] = "/inference.GRPCInferenceService/ModelInfer";

/* One call. `body` is the request's DATA with its prefix, which is also the answer's. */
struct stream {
    struct stream *next_free;
    uint8_t *body;
    uint32_t length, capacity, sent;
    uint32_t references;   /* nghttp2's stream, and every part of the output that points into body */
    int known_path;
    uint8_t small[INLINE_BYTES];
};

struct connection {
    int fd;
    int wants_write;       /* EPOLLOUT is armed: the socket was full */
    nghttp2_session *session;
    int32_t last_id;       /* the stream of the latest frame: most callbacks come for the same one in a row */
    struct stream *last;
    size_t used, part_count, first_part;
    struct iovec parts[OUT_PARTS];
    struct stream *owners[OUT_PARTS];
    uint8_t out[OUT_BYTES];
};

static int epoll_fd;
static uint8_t read_buffer[READ_BYTES];
static struct stream *free_streams;
static nghttp2_session_callbacks *callbacks;
static nghttp2_option *option;

static void die(const char *what) {
    perror(what);
    exit(1);
}

#define HEADER(name, value) \
    {(uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, sizeof(value) - 1, \
     NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE}

static const nghttp2_nv response_headers[] = {HEADER(":status", "200"), HEADER("content-type", "application/grpc")};
static const nghttp2_nv ok_trailers[] = {HEADER("grpc-status", "0")};
static const nghttp2_nv unknown_method[] = {HEADER(":status", "200"), HEADER("content-type", "application/grpc"),
                                            HEADER("grpc-status", "12")};

static struct stream *stream_new(void) {
    struct stream *s = free_streams;
    if (s)
        free_streams = s->next_free;
    else if (!(s = malloc(sizeof *s)))
        die("malloc");
    s->body = s->small;
    s->capacity = INLINE_BYTES;
    s->length = s->sent = 0;
    s->known_path = 0;
    s->references = 1;
    return s;
}

static void stream_release(struct stream *s) {
    if (--s->references)
        return;
    if (s->body != s->small)
        free(s->body);
    s->next_free = free_streams;
    free_streams = s;
}

static struct stream *stream_of(struct connection *c, int32_t id) {
    if (c->last_id != id) {
        c->last = nghttp2_session_get_stream_user_data(c->session, id);
        c->last_id = id;
    }
    return c->last;
}

static int on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    struct connection *c = user;
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
        return 0;
    c->last = stream_new();
    c->last_id = frame->hd.stream_id;
    return nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, c->last);
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_length,
                     const uint8_t *value, size_t value_length, uint8_t flags, void *user) {
    (void)session, (void)flags;
    if (name_length == 5 && value_length == sizeof PATH - 1 && !memcmp(name, ":path", 5)) {
        struct stream *s = stream_of(user, frame->hd.stream_id);
        s->known_path = !memcmp(value, PATH, sizeof PATH - 1);
    }
    return 0;
}

static int on_data_chunk(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data, size_t length,
                         void *user) {
    (void)flags;
    struct stream *s = stream_of(user, id);
    if (length > s->capacity - s->length) {
        /* The first chunk nearly always holds the prefix, so the buffer is allocated once at its final size. */
        size_t needed = s->length + length;
        if (s->length == 0 && length >= PREFIX_BYTES) {
            uint32_t announced;
            memcpy(&announced, data + 1, 4);
            announced = ntohl(announced);
            if (announced <= MESSAGE_LIMIT && announced + PREFIX_BYTES > needed)
                needed = announced + PREFIX_BYTES;
        }
        if (needed > MESSAGE_LIMIT + PREFIX_BYTES)
            return nghttp2_submit_rst_stream(session, 0, id, NGHTTP2_CANCEL);
        uint8_t *grown = malloc(needed);
        if (!grown)
            die("malloc");
        memcpy(grown, s->body, s->length);
        if (s->body != s->small)
            free(s->body);
        s->body = grown;
        s->capacity = needed;
    }
    memcpy(s->body + s->length, data, length);
    s->length += length;
    return 0;
}

/* Announces the whole body as one frame where the peer's limits allow it; the bytes go out in send_data. */
static ssize_t read_body(nghttp2_session *session, int32_t id, uint8_t *buffer, size_t room, uint32_t *data_flags,
                         nghttp2_data_source *source, void *user) {
    (void)buffer, (void)user;
    struct stream *s = source->ptr;
    size_t left = s->length - s->sent;
    *data_flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (left > room)
        return room;
    *data_flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    if (nghttp2_submit_trailer(session, id, ok_trailers, 1))
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    return left;
}

static ssize_t frame_length(nghttp2_session *session, uint8_t type, int32_t id, int32_t session_window,
                            int32_t stream_window, uint32_t max_frame, void *user) {
    (void)session, (void)type, (void)id, (void)session_window, (void)stream_window, (void)user;
    return max_frame; /* nghttp2 takes the least of this and the windows; its own default is 16 KiB */
}

/* Adds bytes of c->out[used..] to the last part when they touch it, else as a new part. The caller checked the room. */
static void append_copied(struct connection *c, const uint8_t *data, size_t length) {
    uint8_t *at = c->out + c->used;
    memcpy(at, data, length);
    c->used += length;
    struct iovec *last = c->part_count ? &c->parts[c->part_count - 1] : NULL;
    if (last && (uint8_t *)last->iov_base + last->iov_len == at) {
        last->iov_len += length;
        return;
    }
    c->owners[c->part_count] = NULL;
    c->parts[c->part_count++] = (struct iovec){at, length};
}

static int has_room(const struct connection *c, size_t copied) {
    return OUT_BYTES - c->used >= copied && OUT_PARTS - c->part_count >= 2;
}

static ssize_t send_frame(nghttp2_session *session, const uint8_t *data, size_t length, int flags, void *user) {
    (void)session, (void)flags;
    struct connection *c = user;
    if (!has_room(c, length))
        return NGHTTP2_ERR_WOULDBLOCK;
    append_copied(c, data, length);
    return length;
}

static int send_data(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *frame_header, size_t length,
                     nghttp2_data_source *source, void *user) {
    (void)session, (void)frame;
    struct connection *c = user;
    struct stream *s = source->ptr;
    size_t copied = length <= COPY_LIMIT ? length : 0;
    if (!has_room(c, 9 + copied))
        return NGHTTP2_ERR_WOULDBLOCK;
    append_copied(c, frame_header, 9);
    if (copied)
        append_copied(c, s->body + s->sent, length);
    else {
        c->owners[c->part_count] = s;
        c->parts[c->part_count++] = (struct iovec){s->body + s->sent, length};
        s->references++;
    }
    s->sent += length;
    return 0;
}

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    if (!(frame->hd.flags & NGHTTP2_FLAG_END_STREAM) ||
        (frame->hd.type != NGHTTP2_DATA && frame->hd.type != NGHTTP2_HEADERS))
        return 0;
    struct stream *s = stream_of(user, frame->hd.stream_id);
    if (!s)
        return 0;
    if (!s->known_path || s->length < PREFIX_BYTES)
        return nghttp2_submit_response(session, frame->hd.stream_id, unknown_method, 3, NULL);
    nghttp2_data_provider body = {.source = {.ptr = s}, .read_callback = read_body};
    return nghttp2_submit_response(session, frame->hd.stream_id, response_headers, 2, &body);
}

static int on_stream_close(nghttp2_session *session, int32_t id, uint32_t error, void *user) {
    (void)error;
    struct connection *c = user;
    struct stream *s = c->last_id == id ? c->last : nghttp2_session_get_stream_user_data(session, id);
    if (c->last_id == id) {
        c->last_id = 0;
        c->last = NULL;
    }
    if (s)
        stream_release(s);
    return 0;
}

static void arm(struct connection *c, int write) {
    struct epoll_event event = {.events = EPOLLIN | (write ? EPOLLOUT : 0), .data.ptr = c};
    if (c->wants_write == write)
        return;
    c->wants_write = write;
    if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event))
        die("epoll_ctl");
}

static void connection_close(struct connection *c) {
    /* nghttp2 does not call the close callback for streams that are open when a session is deleted. They are few
     * and the run ends soon after: their memory is given up rather than tracked in a list of its own. */
    for (size_t i = c->first_part; i < c->part_count; i++)
        if (c->owners[i])
            stream_release(c->owners[i]);
    close(c->fd);
    nghttp2_session_del(c->session);
    free(c);
}

/* Sends what is buffered. 1: all gone, 0: the socket is full, -1: the connection broke. */
static int drain(struct connection *c) {
    while (c->first_part < c->part_count) {
        struct msghdr message = {.msg_iov = c->parts + c->first_part, .msg_iovlen = c->part_count - c->first_part};
        ssize_t sent = sendmsg(c->fd, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EAGAIN)
                return 0;
            if (errno == EINTR)
                continue;
            return -1;
        }
        while (sent && (size_t)sent >= c->parts[c->first_part].iov_len) {
            sent -= c->parts[c->first_part].iov_len;
            if (c->owners[c->first_part])
                stream_release(c->owners[c->first_part]);
            c->first_part++;
        }
        if (sent) {
            c->parts[c->first_part].iov_base = (uint8_t *)c->parts[c->first_part].iov_base + sent;
            c->parts[c->first_part].iov_len -= sent;
        }
    }
    c->first_part = c->part_count = c->used = 0;
    return 1;
}

/* Lets nghttp2 fill the output buffer and sends it, until neither has anything left. */
static int flush(struct connection *c) {
    for (;;) {
        int drained = drain(c);
        if (drained <= 0) {
            if (!drained)
                arm(c, 1);
            return drained;
        }
        if (nghttp2_session_send(c->session))
            return -1;
        if (!c->part_count)
            break;
    }
    arm(c, 0);
    return nghttp2_session_want_read(c->session) || nghttp2_session_want_write(c->session) ? 0 : -1;
}

static int receive(struct connection *c) {
    for (;;) {
        ssize_t got = recv(c->fd, read_buffer, READ_BYTES, 0);
        if (got < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -1;
        if (got == 0)
            return -1;
        if (nghttp2_session_mem_recv(c->session, read_buffer, got) < 0)
            return -1;
        if (got < READ_BYTES)
            return 0;
    }
}

static void connection_new(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct connection *c = malloc(sizeof *c);
    if (!c)
        die("malloc");
    memset(c, 0, offsetof(struct connection, parts));
    c->fd = fd;
    nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, 1024},
                                         {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW_BYTES},
                                         {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, FRAME_BYTES}};
    if (nghttp2_session_server_new2(&c->session, callbacks, c, option) ||
        nghttp2_submit_settings(c->session, 0, settings, 3) ||
        nghttp2_session_set_local_window_size(c->session, 0, 0, CONNECTION_WINDOW_BYTES))
        die("nghttp2");
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event))
        die("epoll_ctl");
    if (flush(c))
        connection_close(c);
}

static int listen_on(const char *host, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    socklen_t length = sizeof address;
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || inet_pton(AF_INET, host, &address.sin_addr) != 1)
        die("address");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 256) ||
        getsockname(fd, (struct sockaddr *)&address, &length))
        die("listen");
    printf("{\"event\":\"ready\",\"grpc\":\"%s:%d\"}\n", host, ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static void prepare_nghttp2(void) {
    if (nghttp2_session_callbacks_new(&callbacks) || nghttp2_option_new(&option))
        die("nghttp2");
    nghttp2_option_set_no_closed_streams(option, 1);
    nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data_chunk);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_stream_close);
    nghttp2_session_callbacks_set_send_callback(callbacks, send_frame);
    nghttp2_session_callbacks_set_send_data_callback(callbacks, send_data);
    nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, frame_length);
}

int main(int argc, char **argv) {
    /* Large bodies stay on the heap, so that their pages are not given back and faulted in again for every call. */
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    signal(SIGPIPE, SIG_IGN);
    prepare_nghttp2();
    if ((epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0)
        die("epoll_create1");
    int listener = listen_on(argc > 1 ? argv[1] : "127.0.0.1", argc > 2 ? atoi(argv[2]) : 0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[64];
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event))
        die("epoll_ctl");
    for (;;) {
        int ready = epoll_wait(epoll_fd, events, 64, -1);
        if (ready < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) {
                int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (fd >= 0)
                    connection_new(fd);
            } else if ((events[i].events & ~(uint32_t)EPOLLOUT && receive(c)) || flush(c)) {
                connection_close(c);
            }
        }
    }
}
