/* Where a codec writes: straight to memory, or past the caches in whole lines.

   Included for each vector level, with TARGET and NAME as in `kernels_loops.h`; the
   level brings `NAME(stream)`, which writes lines of 64 bytes past the caches. A piece
   is written at `sink_at`, then `NAME(sink_move)` is told how long it was. */

#ifndef BITNET_SINK
#define BITNET_SINK
enum { LINE = 64, LARGEST_PIECE = 1024 };

struct sink {
    uint8_t *line;     /* the next to write; in direct mode, the next byte */
    size_t from, held; /* the first and the end of the bytes in `buffer` to be written */
    int direct;
    _Alignas(LINE) uint8_t buffer[2 * LINE + LARGEST_PIECE];
};

static inline void sink_open(struct sink *sink, void *to, size_t size)
{
    size_t off = (uintptr_t)to % LINE;
    sink->direct = size < (size_t)STREAM_FROM;
    sink->line = (uint8_t *)to - (sink->direct ? 0 : off);
    sink->from = sink->held = off;
}

static inline void *sink_at(struct sink *sink)
{
    return sink->direct ? sink->line : sink->buffer + sink->held;
}
#endif

TARGET static inline __attribute__((always_inline)) void
NAME(sink_move)(struct sink *sink, size_t size)
{
    if (sink->direct) {
        sink->line += size;
        return;
    }
    uint8_t *at = sink->buffer, *end = at + sink->held + size;
    if (sink->from && end - at >= LINE) {
        memcpy(sink->line + sink->from, at + sink->from, LINE - sink->from);
        sink->from = 0, sink->line += LINE, at += LINE;
    }
    size_t lines = (size_t)(end - at) / LINE;
    if (!sink->from) {
        NAME(stream)(sink->line, at, lines);
        sink->line += lines * LINE, at += lines * LINE;
    }
    if (at != sink->buffer && at != end)
        memcpy(sink->buffer, at, LINE);
    sink->held = (size_t)(end - at);
}

/* Ends what `sink_open` began; another thread may then read it. */
TARGET static inline void NAME(sink_close)(struct sink *sink)
{
    if (sink->direct)
        return;
    memcpy(sink->line + sink->from, sink->buffer + sink->from, sink->held - sink->from);
    NAME(stream_end)();
}

/* Asks for what will be read soon: into the second cache for loops that only stream,
   into the first for those that compute long between two reads. */
#define FETCH(name, level)                                                             \
    TARGET static inline __attribute__((always_inline)) void                           \
    NAME(name)(const struct sink *sink, const void *at, size_t size)                   \
    {                                                                                  \
        for (size_t i = 0; i < size && !sink->direct; i += LINE)                       \
            __builtin_prefetch((const char *)at + FETCH_AHEAD + i, 0, level);          \
    }
FETCH(fetch, 2)
FETCH(fetch_near, 3)
#undef FETCH
