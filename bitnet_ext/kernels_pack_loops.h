/* Packing of ternary values, 2 bits each or 5 to a byte, once for each vector level.

   Included by `kernels_codec.c` as `kernels_codec_loops.h` is. A level may bring the
   pieces, which are whole; parts of any length are the same everywhere. */

/* Four bytes -1, 0, 1 to one: 0 -> 0b00, +1 -> 0b01, -1 -> 0b10, lowest bits first. */
static inline __attribute__((always_inline)) uint8_t NAME(pack_four)(const int8_t *values)
{
    uint32_t four;
    memcpy(&four, values, 4);
    /* 0b11 -> 0b10, and the four places together. */
    four &= 0x03030303;
    four ^= four >> 1 & 0x01010101;
    return (uint8_t)(four | four >> 6 | four >> 12 | four >> 18);
}

/* Whether a value is not ternary. */
static inline __attribute__((always_inline)) uint8_t NAME(pack_bad)(int8_t value)
{
    return (uint8_t)(value + 1) > 2;
}

TARGET static inline __attribute__((always_inline)) uint8_t
NAME(pack2_part)(const int8_t *values, ptrdiff_t count, uint8_t *out)
{
    uint8_t bad = 0;
    for (ptrdiff_t i = 0; i < count; i++)
        bad |= NAME(pack_bad)(values[i]);
    for (ptrdiff_t b = 0; b < count / 4; b++)
        out[b] = NAME(pack_four)(values + 4 * b);
    if (count % 4) {
        int8_t last[4] = {0};
        memcpy(last, values + count / 4 * 4, (size_t)(count % 4));
        out[count / 4] = NAME(pack_four)(last);
    }
    return bad;
}

static inline __attribute__((always_inline)) void NAME(unpack_four)(uint8_t code,
                                                                    int8_t *values)
{
    uint32_t four = code;
    four = (four | four << 6 | four << 12 | four << 18) & 0x03030303;
    uint32_t minus = four >> 1 & 0x01010101;
    /* 255 where the value is -1; no byte carries into the next. */
    four = (four & 0x01010101) | ((minus << 8) - minus);
    memcpy(values, &four, 4);
}

TARGET static inline __attribute__((always_inline)) uint8_t
NAME(unpack2_part)(const uint8_t *codes, ptrdiff_t count, int8_t *out)
{
    uint8_t bad = 0;
    ptrdiff_t whole = count / 4, left = count % 4;
    for (ptrdiff_t b = 0; b < whole; b++)
        bad |= codes[b] & codes[b] >> 1 & 0x55;
    for (ptrdiff_t b = 0; b < whole; b++)
        NAME(unpack_four)(codes[b], out + 4 * b);
    if (left) {
        int8_t last[4];
        bad |= codes[whole] & codes[whole] >> 1 & 0x55;
        bad |= codes[whole] >> (2 * left);
        NAME(unpack_four)(codes[whole], last);
        memcpy(out + 4 * whole, last, (size_t)left);
    }
    return bad;
}

/* Five planes, `width` values apart, to `width` bytes: with v the number whose base-3
   digits are the values plus one, first plane first, ceil(v * 256 / 243). So the top
   digit of a byte is what carries out when it is tripled. */
TARGET static inline __attribute__((always_inline)) uint8_t
NAME(pack3_part)(const int8_t *values, ptrdiff_t width, uint8_t *out)
{
    uint8_t bad = 0;
    for (ptrdiff_t i = 0; i < PLANES * width; i++)
        bad |= NAME(pack_bad)(values[i]);
    for (ptrdiff_t i = 0; i < width; i++) {
        const int8_t *at = values + i;
        int v = 81 * at[0] + 27 * at[width] + 9 * at[2 * width] + 3 * at[3 * width] +
                at[4 * width] + 121;
        out[i] = (uint8_t)(v + ((13 * v + 242) * 4316 >> 20));
    }
    return bad;
}

TARGET static inline __attribute__((always_inline)) uint8_t
NAME(unpack3_part)(const uint8_t *codes, ptrdiff_t width, int8_t *out)
{
    uint8_t furthest = 0;
    for (ptrdiff_t i = 0; i < width; i++) {
        uint8_t rest = codes[i];
        for (int plane = 0; plane < PLANES; plane++) {
            unsigned tripled = 3u * rest;
            out[plane * width + i] = (int8_t)((int)(tripled >> 8) - 1);
            rest = (uint8_t)tripled;
        }
        furthest = rest > furthest ? rest : furthest;
    }
    /* 243 * q is 256 * v and less than 243 for each q that a packing writes. */
    return furthest >= 243;
}

#ifndef OWN_PIECES
TARGET static uint8_t NAME(pack2_piece)(const int8_t *values, uint8_t *out)
{
    return NAME(pack2_part)(values, 4 * LINE, out);
}
TARGET static uint8_t NAME(unpack2_piece)(const uint8_t *codes, int8_t *out)
{
    return NAME(unpack2_part)(codes, 4 * LINE, out);
}
TARGET static uint8_t NAME(pack3_piece)(const int8_t *values, uint8_t *out)
{
    return NAME(pack3_part)(values, PLANE, out);
}
TARGET static uint8_t NAME(unpack3_piece)(const uint8_t *codes, int8_t *out)
{
    return NAME(unpack3_part)(codes, PLANE, out);
}
#endif

/* One row of any length; `to` has room from `sink_at`. */
TARGET static uint8_t NAME(pack2_row)(const int8_t *values, ptrdiff_t count,
                                      struct sink *to)
{
    uint8_t bad = 0;
    ptrdiff_t i = 0;
    for (; i + 4 * LINE <= count; i += 4 * LINE) {
        NAME(fetch)(to, values + i, 4 * LINE);
        bad |= NAME(pack2_piece)(values + i, sink_at(to));
        NAME(sink_move)(to, LINE);
    }
    bad |= NAME(pack2_part)(values + i, count - i, sink_at(to));
    NAME(sink_move)(to, (size_t)(count - i + 3) / 4);
    return bad;
}

TARGET static uint8_t NAME(unpack2_row)(const uint8_t *codes, ptrdiff_t count,
                                        struct sink *to)
{
    uint8_t bad = 0;
    ptrdiff_t i = 0;
    for (; i + 4 * LINE <= count; i += 4 * LINE, codes += LINE) {
        NAME(fetch)(to, codes, LINE);
        bad |= NAME(unpack2_piece)(codes, sink_at(to));
        NAME(sink_move)(to, 4 * LINE);
    }
    bad |= NAME(unpack2_part)(codes, count - i, sink_at(to));
    NAME(sink_move)(to, (size_t)(count - i));
    return bad;
}

/* Rows that fill their bytes lie as one. */
TARGET static int NAME(pack2)(const int8_t *values, ptrdiff_t num_n, ptrdiff_t num_k,
                              uint8_t *out)
{
    struct sink to;
    uint8_t bad = 0;
    if (num_k % 4 == 0)
        num_k *= num_n, num_n = 1;
    sink_open(&to, out, (size_t)(num_n * ((num_k + 3) / 4)));
    for (ptrdiff_t n = 0; n < num_n; n++)
        bad |= NAME(pack2_row)(values + n * num_k, num_k, &to);
    NAME(sink_close)(&to);
    return bad ? BAD_VALUE : OK;
}

TARGET static int NAME(unpack2)(const uint8_t *codes, ptrdiff_t num_n, ptrdiff_t num_k,
                                int8_t *out)
{
    struct sink to;
    uint8_t bad = 0;
    if (num_k % 4 == 0)
        num_k *= num_n, num_n = 1;
    sink_open(&to, out, (size_t)(num_n * num_k));
    for (ptrdiff_t n = 0; n < num_n; n++)
        bad |= NAME(unpack2_row)(codes + n * ((num_k + 3) / 4), num_k, &to);
    NAME(sink_close)(&to);
    return bad ? BAD_VALUE : OK;
}

/* The last block is as narrow as it can be, and what it lacks counts as zeros. */
TARGET static int NAME(pack3)(const int8_t *values, ptrdiff_t count, uint8_t *out)
{
    struct sink to;
    uint8_t bad = 0;
    int8_t last[TRITS] = {0};
    sink_open(&to, out, (size_t)((count + PLANES - 1) / PLANES));
    for (; count >= TRITS; count -= TRITS, values += TRITS) {
        NAME(fetch)(&to, values, TRITS);
        bad |= NAME(pack3_piece)(values, sink_at(&to));
        NAME(sink_move)(&to, PLANE);
    }
    if (count) {
        memcpy(last, values, (size_t)count);
        bad |= NAME(pack3_part)(last, (count + PLANES - 1) / PLANES, sink_at(&to));
        NAME(sink_move)(&to, (size_t)(count + PLANES - 1) / PLANES);
    }
    NAME(sink_close)(&to);
    return bad ? BAD_VALUE : OK;
}

TARGET static int NAME(unpack3)(const uint8_t *codes, ptrdiff_t count, int8_t *out)
{
    struct sink to;
    uint8_t bad = 0;
    int8_t last[TRITS];
    sink_open(&to, out, (size_t)count);
    for (; count >= TRITS; count -= TRITS, codes += PLANE) {
        NAME(fetch)(&to, codes, PLANE);
        bad |= NAME(unpack3_piece)(codes, sink_at(&to));
        NAME(sink_move)(&to, TRITS);
    }
    if (count) {
        ptrdiff_t width = (count + PLANES - 1) / PLANES;
        bad |= NAME(unpack3_part)(codes, width, last);
        for (ptrdiff_t i = count; i < PLANES * width; i++)
            bad |= last[i] != 0;
        memcpy(sink_at(&to), last, (size_t)count);
        NAME(sink_move)(&to, (size_t)count);
    }
    NAME(sink_close)(&to);
    return bad ? BAD_VALUE : OK;
}
