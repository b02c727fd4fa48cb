/* Clients of a relay: they send requests, follow the answers and tell how late each token came.
 *
 *   load PORT PATH CLIENTS REQUESTS SECONDS STREAM(0|1) RATE TOKENS [RAMP]
 *
 * CLIENTS connections are opened within RAMP seconds and send REQUESTS each, one after the other;
 * all ends after SECONDS. Every 100 ms a line "N" tells the tokens so far; the last line is JSON.
 * The token for the Authorization header is in $TOKEN. Times are in microseconds.
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

enum { HEAD = 4096, PIECE = 1 << 18, BATCH = 512, KEPT = 4000000 };

struct client {
    int fd, requests, head_size, in_body, is_chunked, has_first;
    long left;    /* bytes of the body or chunk */
    int state;    /* of the chunks: 0 size, 1 data, 2 end of data, 3 last line */
    int mark;     /* of the time in the text: 0 none, 1 in it */
    int64_t asked, time;
    char head[HEAD];
};

struct samples { uint32_t *values; long count; };

static struct samples delays, firsts;
static long tokens, completed, errors, not_ok;
static char request[4096];
static int request_size, epoll, port;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void note(struct samples *samples, int64_t nanoseconds) {
    if (samples->count < KEPT) samples->values[samples->count++] = nanoseconds > 0 ? nanoseconds / 1000 : 0;
}

static int ascending(const void *a, const void *b) {
    uint32_t one = *(const uint32_t *)a, other = *(const uint32_t *)b;
    return one < other ? -1 : one > other;
}

static void tell(const char *name, struct samples *s) {
    qsort(s->values, s->count, sizeof *s->values, ascending);
    if (!s->count) { printf(",\"%s\":null", name); return; }
    printf(",\"%s\":{\"p50\":%u,\"p99\":%u,\"max\":%u}", name, s->values[s->count / 2],
           s->values[s->count * 99 / 100], s->values[s->count - 1]);
}

static void ask(struct client *c) {
    c->head_size = c->in_body = c->has_first = c->state = c->mark = 0;
    c->left = 0;
    c->asked = now();
    if (send(c->fd, request, request_size, MSG_NOSIGNAL) != request_size) errors++;
}

static int open_client(struct client *c) {
    int on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, (void *)&address, sizeof address)) { close(c->fd); c->fd = -1; return 0; }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
    ask(c);
    return 1;
}

/* Look in a piece of a body for "@nanoseconds@". */
static void read_text(struct client *c, const char *text, long size, int64_t time) {
    for (const char *end = text + size; text < end; text++) {
        if (*text != '@') {
            if (c->mark) c->time = c->time * 10 + *text - '0';
        } else if (!c->mark) {
            c->mark = 1;
            c->time = 0;
        } else {
            c->mark = 0;
            tokens++;
            note(&delays, time - c->time);
            if (!c->has_first) note(&firsts, time - c->asked);
            c->has_first = 1;
        }
    }
}

/* Read of a chunked body; return what is left of the piece, and whether the body has ended. */
static int read_chunks(struct client *c, const char **data, long *size, int64_t time) {
    while (*size > 0) {
        if (c->state == 1) {
            long part = c->left < *size ? c->left : *size;
            read_text(c, *data, part, time);
            *data += part; *size -= part; c->left -= part;
            if (!c->left) c->state = 2;
            continue;
        }
        char byte = *(*data)++;
        (*size)--;
        if (c->state == 0 && byte != '\r' && byte != '\n')
            c->left = c->left * 16 + (byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10);
        else if (byte == '\n') {
            if (c->state == 3) return 1;
            c->state = c->state == 2 ? 0 : c->left ? 1 : 3;
        }
    }
    return 0;
}

static int read_head(struct client *c, const char **data, long *size) {
    while (*size > 0 && c->head_size < HEAD - 1) {
        c->head[c->head_size++] = *(*data)++;
        (*size)--;
        c->head[c->head_size] = 0;
        if (c->head_size < 4 || memcmp(c->head + c->head_size - 4, "\r\n\r\n", 4)) continue;
        char *length = strcasestr(c->head, "content-length:");
        c->in_body = 1;
        c->is_chunked = !length;
        c->left = length ? atol(length + 15) : 0;
        if (memcmp(c->head + 9, "200", 3)) not_ok++;
        return 1;
    }
    return 0;
}

/* Follow the answer; 1 once it has ended. */
static int follow(struct client *c, const char *data, long size, int64_t time) {
    if (!c->in_body && !read_head(c, &data, &size)) return 0;
    if (c->is_chunked) return read_chunks(c, &data, &size, time);
    read_text(c, data, size, time);
    c->left -= size;
    return c->left <= 0;
}

static void make_request(const char *path, int streams, const char *rate, const char *count) {
    char body[512], stream[32] = "";
    if (strncmp(path, "/v2/", 4)) snprintf(stream, sizeof stream, ",\"stream\":%s", streams ? "true" : "false");
    int size = snprintf(body, sizeof body,
        "{\"model\":\"words\",\"messages\":[{\"role\":\"user\",\"content\":\"rate=%s tokens=%s\"}],"
        "\"max_tokens\":%s%s}", rate, count, count, stream);
    const char *token = getenv("TOKEN");
    request_size = snprintf(request, sizeof request,
        "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAuthorization: Bearer %s\r\n"
        "Content-Type: application/json\r\nUser-Agent: load\r\nAccept: */*\r\n"
        "Content-Length: %d\r\n\r\n%s", path, port, token ? token : "", size, body);
}

int main(int count, char **arguments) {
    if (count < 9) return fprintf(stderr, "load PORT PATH CLIENTS REQUESTS SECONDS STREAM RATE TOKENS [RAMP]\n"), 2;
    port = atoi(arguments[1]);
    int clients = atoi(arguments[3]), opened = 0, over = 0;
    double seconds = atof(arguments[5]), ramp = count > 9 ? atof(arguments[9]) : 0;
    make_request(arguments[2], atoi(arguments[6]), arguments[7], arguments[8]);
    delays.values = malloc(KEPT * sizeof *delays.values);
    firsts.values = malloc(KEPT * sizeof *firsts.values);
    struct client *all = calloc(clients, sizeof *all);
    struct epoll_event events[BATCH];
    char *piece = malloc(PIECE);
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(0);
    int64_t began = now(), told = began, end = began + seconds * 1e9;
    for (int64_t time = began; over < clients && time < end; time = now()) {
        while (opened < clients && time - began >= ramp * 1e9 * opened / clients) {
            all[opened].requests = atoi(arguments[4]);
            if (!open_client(&all[opened++])) { errors++; over++; }
        }
        if (time - told >= 100000000) {
            told = time;
            printf("%ld\n", tokens);
            fflush(stdout);
        }
        int ready = epoll_wait(epoll, events, BATCH, opened < clients ? 1 : 20);
        for (int i = 0; i < ready; i++) {
            struct client *c = events[i].data.ptr;
            ssize_t size = recv(c->fd, piece, PIECE, MSG_DONTWAIT);
            if (size < 0 && errno == EAGAIN) continue;
            int is_done = size > 0 && follow(c, piece, size, now());
            completed += is_done;
            errors += size <= 0;
            if (is_done && --c->requests > 0) ask(c);
            else if (is_done || size <= 0) { close(c->fd); over++; }
        }
    }
    printf("{\"tokens\":%ld,\"completed\":%ld,\"errors\":%ld,\"not_ok\":%ld,\"seconds\":%.3f", tokens,
           completed, errors, not_ok, (now() - began) / 1e9);
    tell("first", &firsts);
    tell("delay", &delays);
    printf("}\n");
}
