/* A worker that costs nothing: it answers OpenAI's chat completions and /execute at a set rate.
 *
 *   worker PORT
 *
 * "rate=R tokens=N" anywhere in a request's body say how many tokens a second a stream has, and how
 * many in all; a chat without "stream": true gets one short body. Each event carries the time
 * at which it was sent, as "@nanoseconds@" of CLOCK_MONOTONIC, and is one chunk and one write, as
 * vLLM's are. One thread, epoll; what a slow reader does not take is dropped with his connection.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { CONNECTIONS = 16384, REQUEST = 16384, BATCH = 512 };

struct connection {
    int fd;
    int length;             /* bytes of the request so far */
    int place;              /* among the streams that run, -1 for none */
    int is_job;             /* it speaks our own events */
    long sent, total;       /* tokens */
    int64_t began, between; /* nanoseconds */
    char request[REQUEST];
};

static struct connection *connections[CONNECTIONS];
static struct connection *running[CONNECTIONS];
static int streams;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void stop_stream(struct connection *c) {
    if (c->place < 0) return;
    running[c->place] = running[--streams];
    running[c->place]->place = c->place;
    c->place = -1;
}

static void drop(struct connection *c) {
    stop_stream(c);
    close(c->fd);
    connections[c->fd] = NULL;
    free(c);
}

static int put(struct connection *c, const char *data, int size) {
    return send(c->fd, data, size, MSG_NOSIGNAL) == size;
}

static int put_job_token(struct connection *c) {
    char event[128], chunk[160];
    int size = snprintf(event, sizeof event, "event: token\ndata: {\"t\":\" @%lld@\",\"i\":%ld}\n\n",
                        (long long)now(), ++c->sent);
    size = snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n", size, event);
    return put(c, chunk, size);
}

static int put_token(struct connection *c) {
    char event[512], chunk[600];
    int is_last = c->sent == c->total - 1;
    if (c->is_job) return put_job_token(c);
    int size = snprintf(event, sizeof event,
        "data: {\"id\":\"chatcmpl-0000000000000000000000000000\",\"object\":\"chat.completion.chunk\","
        "\"created\":1700000000,\"model\":\"words\",\"choices\":[{\"index\":0,\"delta\":"
        "{\"content\":\" @%lld@\"},\"logprobs\":null,\"finish_reason\":%s}]}\n\n",
        (long long)now(), is_last ? "\"length\"" : "null");
    size = snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n", size, event);
    c->sent++;
    return put(c, chunk, size);
}

/* Send what is due; 0 if the reader cannot be served any more. */
static int go_on(struct connection *c, int64_t time) {
    static const char end[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    static const char job_end[] = "68\r\nevent: end\ndata: {\"tokens_in\":1,\"tokens_out\":1,"
        "\"stop_reason\":\"length\",\"ttft_ms\":1.0,\"duration_ms\":1.0}\n\n\r\n0\r\n\r\n";
    while (c->sent < c->total && c->began + c->sent * c->between <= time)
        if (!put_token(c)) return 0;
    if (c->sent < c->total) return 1;
    stop_stream(c);
    return c->is_job ? put(c, job_end, sizeof job_end - 1) : put(c, end, sizeof end - 1);
}

static double number(const char *text, const char *key, double otherwise) {
    const char *found = strstr(text, key);
    return found ? atof(found + strlen(key)) : otherwise;
}

static int put_whole(struct connection *c) {
    char body[512], answer[700];
    int size = snprintf(body, sizeof body,
        "{\"id\":\"chatcmpl-0\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":"
        "\"words\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
        "\"@%lld@\"},\"logprobs\":null,\"finish_reason\":\"stop\"}]}", (long long)now());
    size = snprintf(answer, sizeof answer, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        "content-length: %d\r\n\r\n%s", size, body);
    return put(c, answer, size);
}

static int put_nothing(struct connection *c) {
    static const char head[] = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
    return put(c, head, sizeof head - 1);
}

static int answer(struct connection *c, const char *body) {
    static const char head[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                               "transfer-encoding: chunked\r\n\r\n";
    double rate = number(body, "rate=", 0);
    c->is_job = !strncmp(c->request, "POST /execute ", 14);
    if (!strncmp(c->request, "GET ", 4)) return put_whole(c);
    if (!c->is_job && !strstr(c->request, "/chat/completions HTTP/")) return put_nothing(c);
    if (!c->is_job && !strstr(body, "\"stream\":true") && !strstr(body, "\"stream\": true")) return put_whole(c);
    c->sent = 0;
    c->total = number(body, "tokens=", 16);
    c->between = rate > 0 ? 1e9 / rate : 0;
    c->began = now();
    c->place = streams;
    running[streams++] = c;
    return put(c, head, sizeof head - 1) && go_on(c, c->began);
}

/* Take what has come of a request; 0 if the connection is over. */
static int receive(struct connection *c) {
    ssize_t size = recv(c->fd, c->request + c->length, REQUEST - 1 - c->length, 0);
    if (size <= 0) return size < 0 && errno == EAGAIN;
    c->length += size;
    c->request[c->length] = 0;
    char *body = strstr(c->request, "\r\n\r\n");
    if (!body) return c->length < REQUEST - 1;
    body += 4;
    char *header = strcasestr(c->request, "content-length:");
    long wanted = header && header < body ? atol(header + 15) : 0;
    if (c->length - (body - c->request) < wanted) return c->length < REQUEST - 1;
    c->length = 0;
    return answer(c, body);
}

static void accept_all(int listener, int epoll) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct connection *c = fd < CONNECTIONS ? calloc(1, sizeof *c) : NULL;
        if (!c) { close(fd); continue; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        c->fd = fd;
        c->place = -1;
        connections[fd] = c;
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
    }
}

static int listen_at(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (void *)&address, sizeof address) || listen(fd, 4096)) {
        perror("listen");
        exit(1);
    }
    return fd;
}

int main(int count, char **arguments) {
    if (count != 2) return fprintf(stderr, "worker PORT\n"), 2;
    signal(SIGPIPE, SIG_IGN);
    int listener = listen_at(atoi(arguments[1])), epoll = epoll_create1(0);
    struct epoll_event events[BATCH] = {{.events = EPOLLIN, .data.fd = listener}};
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, events);
    for (;;) {
        int ready = epoll_wait(epoll, events, BATCH, streams ? 1 : -1);
        for (int i = 0; i < ready; i++) {
            if (events[i].data.fd == listener) { accept_all(listener, epoll); continue; }
            struct connection *c = connections[events[i].data.fd];
            if (c && !receive(c)) drop(c);
        }
        int64_t time = now();
        for (int i = streams - 1; i >= 0; i--)
            if (i < streams && !go_on(running[i], time)) drop(running[i]);
    }
}
