/* A relay of bytes: what comes on a connection goes to TARGET and back, unread. What no proxy on the same core can
 * beat that the bytes pass by TCP: it has the kernel's copies, its wake-ups, and nothing else.
 *
 * A thread for each direction of a connection, which reads what is there, 256 KiB at the most, and writes it on.
 *
 * Usage: relay IPV4:PORT. Prints the ready line of the bench peers and runs until killed.
 */

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define BUFFER_BYTES (256 * 1024)

struct pair {
    int client, server;
    atomic_int open; /* directions */
};

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void copy(int from, int to) {
    char *buffer = malloc(BUFFER_BYTES);
    ssize_t length, sent = 0;
    if (buffer == NULL)
        fail("malloc");
    while (sent >= 0 && (length = recv(from, buffer, BUFFER_BYTES, 0)) > 0)
        for (ssize_t done = 0; done < length && sent >= 0; done += sent)
            sent = send(to, buffer + done, length - done, MSG_NOSIGNAL);
    free(buffer);
    shutdown(to, SHUT_WR);
}

static void end(struct pair *pair) {
    if (atomic_fetch_sub(&pair->open, 1) > 1)
        return;
    close(pair->client);
    close(pair->server);
    free(pair);
}

static void *forth(void *given) {
    struct pair *pair = given;
    copy(pair->client, pair->server);
    end(pair);
    return NULL;
}

static void *back(void *given) {
    struct pair *pair = given;
    copy(pair->server, pair->client);
    end(pair);
    return NULL;
}

static void start(void *(*work)(void *), struct pair *pair) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, pair) != 0)
        fail("pthread_create");
    pthread_detach(thread);
}

static void set_no_delay(int fd) {
    int on = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) != 0)
        fail("TCP_NODELAY");
}

int main(int argc, char **argv) {
    struct sockaddr_in target = {.sin_family = AF_INET};
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof own;
    char host[64];
    int port, listener = socket(AF_INET, SOCK_STREAM, 0);
    if (argc != 2 || sscanf(argv[1], "%63[^:]:%d", host, &port) != 2 ||
        inet_pton(AF_INET, host, &target.sin_addr) != 1) {
        fprintf(stderr, "usage: relay IPV4:PORT\n");
        return 2;
    }
    target.sin_port = htons(port);
    if (listener < 0 || bind(listener, (struct sockaddr *)&own, sizeof own) != 0 || listen(listener, 64) != 0)
        fail("listen");
    getsockname(listener, (struct sockaddr *)&own, &length);
    printf("{\"event\":\"ready\",\"grpc\":\"127.0.0.1:%d\"}\n", ntohs(own.sin_port));
    fflush(stdout);
    for (;;) {
        struct pair *pair = malloc(sizeof *pair);
        if (pair == NULL)
            fail("malloc");
        pair->client = accept(listener, NULL, NULL);
        pair->server = socket(AF_INET, SOCK_STREAM, 0);
        atomic_init(&pair->open, 2);
        if (pair->client < 0 || pair->server < 0 ||
            connect(pair->server, (struct sockaddr *)&target, sizeof target) != 0)
            fail("connect");
        set_no_delay(pair->client);
        set_no_delay(pair->server);
        start(forth, pair);
        start(back, pair);
    }
}
