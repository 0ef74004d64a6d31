/* The int8 codec and conversions, compiled once for each vector level.

   Included by `kernels_codec.c` with TARGET, LEVEL and NAME as in `kernels_loops.h`.
   A level may bring blocks of its own; those here are for the others and for what is
   shorter than a block. All give the same bits: maxima are taken on bit patterns, and
   nothing is fused. */

/* q of one block, its scale, and what is lost; NaN for a block that is not finite. */
TARGET static inline __attribute__((always_inline)) float
NAME(encode_part)(const float *x, const float *minus, const float *residual,
                  ptrdiff_t count, int8_t *q, float *lost)
{
    float values[BLOCK];
    int32_t largest = 0, furthest = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        float value = minus ? x[i] - minus[i] : x[i];
        values[i] = residual ? value + residual[i] : value;
    }
    for (ptrdiff_t i = 0; i < count; i++) {
        int32_t bits = bits_of(values[i]) & SIZE_MASK;
        largest = bits > largest ? bits : largest;
    }
    float scale = float_of(largest) / 127.0f, inverse = 127.0f / float_of(largest);
    if (largest >= INFINITE)
        return NAN;
    if (scale < FLT_MIN)
        scale = inverse = 0.0f;
    for (ptrdiff_t i = 0; i < count; i++) {
        float ratio = values[i] * inverse, shifted = ratio + ROUNDER;
        int32_t off = bits_of(ratio - (shifted - ROUNDER)) & SIZE_MASK;
        furthest = off > furthest ? off : furthest;
        q[i] = (int8_t)bits_of(shifted);
    }
    /* The product is within 127 * 2^-22 of the quotient: they differ only near a half. */
    if (float_of(furthest) >= SURE_BELOW)
        for (ptrdiff_t i = 0; i < count; i++)
            q[i] = (int8_t)bits_of(values[i] / scale + ROUNDER);
    if (lost)
        for (ptrdiff_t i = 0; i < count; i++)
            lost[i] = values[i] - scale * (float)q[i];
    return scale;
}

#ifndef OWN_BLOCKS
TARGET static float NAME(encode_block)(const float *x, const float *minus,
                                       const float *residual, int8_t *q, float *lost)
{
    return NAME(encode_part)(x, minus, residual, BLOCK, q, lost);
}
#endif

static inline const float *NAME(from)(const float *x, ptrdiff_t start)
{
    return x ? x + start : NULL;
}

TARGET static int NAME(encode_int8)(const float *x, const float *minus,
                                    const float *residual, ptrdiff_t count,
                                    uint8_t *payload, float *lost)
{
    ptrdiff_t num_blocks = (count + BLOCK - 1) / BLOCK;
    struct sink to_q, to_lost;
    float scale = 0.0f;
    sink_open(&to_q, payload + 4 * num_blocks, (size_t)count);
    sink_open(&to_lost, lost, lost ? 4 * (size_t)count : 0);
    for (ptrdiff_t start = 0; start < count && scale <= MAX_SCALE; start += BLOCK) {
        const float *here = x + start;
        const float *less = NAME(from)(minus, start), *more = NAME(from)(residual, start);
        ptrdiff_t size = count - start < BLOCK ? count - start : BLOCK;
        int8_t *q = sink_at(&to_q);
        float *rest = lost ? sink_at(&to_lost) : NULL;
        NAME(fetch_near)(&to_q, here, sizeof(float) * BLOCK);
        if (minus)
            NAME(fetch_near)(&to_q, less, sizeof(float) * BLOCK);
        if (residual)
            NAME(fetch_near)(&to_q, more, sizeof(float) * BLOCK);
        scale = size == BLOCK ? NAME(encode_block)(here, less, more, q, rest)
                              : NAME(encode_part)(here, less, more, size, q, rest);
        memcpy(payload + 4 * (start / BLOCK), &scale, 4);
        NAME(sink_move)(&to_q, (size_t)size);
        if (lost)
            NAME(sink_move)(&to_lost, sizeof(float) * (size_t)size);
    }
    NAME(sink_close)(&to_q);
    NAME(sink_close)(&to_lost);
    return scale <= MAX_SCALE ? OK : isnan(scale) ? NOT_FINITE : TOO_LARGE;
}

/* The worst of the scales; `low` takes the lowest number of the blocks. */
TARGET static int NAME(scale_status)(const uint8_t *scales, ptrdiff_t count, int8_t low)
{
    int not_finite = 0, too_large = 0, bad = low == -128;
    for (ptrdiff_t block = 0; block < (count + BLOCK - 1) / BLOCK; block++) {
        float scale = load_float(scales + 4 * block);
        int32_t bits = bits_of(scale);
        not_finite |= (bits & SIZE_MASK) >= INFINITE;
        too_large |= scale > MAX_SCALE;
        /* Negative, minus zero or subnormal: no encoder writes that. */
        bad |= bits != 0 && bits < bits_of(FLT_MIN);
    }
    return not_finite ? NOT_FINITE : too_large ? TOO_LARGE : bad ? BAD_VALUE : OK;
}

TARGET static inline __attribute__((always_inline)) int8_t
NAME(lowest)(const int8_t *q, ptrdiff_t count, int8_t low)
{
    for (ptrdiff_t i = 0; i < count; i++)
        low = q[i] < low ? q[i] : low;
    return low;
}

TARGET static int NAME(check_int8)(const uint8_t *scales, const int8_t *q,
                                   ptrdiff_t count)
{
    return NAME(scale_status)(scales, count, NAME(lowest)(q, count, 0));
}

TARGET static int NAME(decode_int8)(const uint8_t *payload, ptrdiff_t count, float *out)
{
    ptrdiff_t num_blocks = (count + BLOCK - 1) / BLOCK;
    const int8_t *q = (const int8_t *)payload + 4 * num_blocks;
    int status = NAME(scale_status)(payload, count, 0);
    struct sink to;
    int8_t low = 0;
    sink_open(&to, out, sizeof *out * (size_t)count);
    for (ptrdiff_t start = 0; start < count && status == OK; start += BLOCK) {
        float scale = load_float(payload + 4 * (start / BLOCK));
        ptrdiff_t size = count - start < BLOCK ? count - start : BLOCK;
        float *here = sink_at(&to);
        NAME(fetch)(&to, q + start, BLOCK);
        for (ptrdiff_t i = 0; i < size; i++)
            here[i] = scale * (float)q[start + i];
        low = NAME(lowest)(q + start, size, low);
        NAME(sink_move)(&to, sizeof *out * (size_t)size);
    }
    NAME(sink_close)(&to);
    return status == OK && low == -128 ? BAD_VALUE : status;
}

TARGET static void NAME(add_int8)(const uint8_t *scales, const int8_t *q,
                                  ptrdiff_t count, float weight, float *into)
{
    for (ptrdiff_t start = 0; start < count; start += BLOCK) {
        float scale = load_float(scales + 4 * (start / BLOCK));
        ptrdiff_t end = count - start < BLOCK ? count : start + BLOCK;
        for (ptrdiff_t i = start; i < end; i++)
            into[i] += weight * (scale * (float)q[i]);
    }
}

TARGET static inline __attribute__((always_inline)) int32_t
NAME(largest_bits)(const uint8_t *values, ptrdiff_t count)
{
    int32_t largest = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        int32_t bits = bits_of(load_float(values + 4 * i)) & SIZE_MASK;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

TARGET static int NAME(check_fp32)(const uint8_t *values, ptrdiff_t count)
{
    int32_t largest = 0;
    ptrdiff_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK) {
        for (int line = 0; line < 4 * BLOCK; line += LINE)
            __builtin_prefetch(values + 4 * i + FETCH_AHEAD + line, 0, 2);
        int32_t bits = NAME(largest_bits)(values + 4 * i, BLOCK);
        largest = bits > largest ? bits : largest;
    }
    int32_t bits = NAME(largest_bits)(values + 4 * i, count - i);
    return bits >= INFINITE || largest >= INFINITE ? NOT_FINITE : OK;
}

TARGET static void NAME(add_fp32)(const uint8_t *values, ptrdiff_t count, float weight,
                                  float *into)
{
    for (ptrdiff_t i = 0; i < count; i++)
        into[i] += weight * load_float(values + 4 * i);
}

/* A product of two floats is exact as a double: only the order of sums matters. */
TARGET static double NAME(dot)(const float *x, const float *y, ptrdiff_t count)
{
    double lanes[LANES] = {0}, sum = 0;
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] += (double)x[i + lane] * (double)y[i + lane];
    for (int lane = 0; i < count; i++, lane++)
        lanes[lane] += (double)x[i] * (double)y[i];
    for (int lane = 0; lane < LANES; lane++)
        sum += lanes[lane];
    return sum;
}

/* To nearest, halves to even; a NaN keeps its sign and top bits and stays a NaN. The
   functions of a part return the bits of the largest of all sizes. */
TARGET static inline __attribute__((always_inline)) int32_t
NAME(to_bf16_part)(const float *x, ptrdiff_t count, uint16_t *out)
{
    int32_t largest = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)bits_of(x[i]);
        int32_t size = (int32_t)bits & SIZE_MASK;
        largest = size > largest ? size : largest;
        out[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    if (largest > INFINITE)
        for (ptrdiff_t i = 0; i < count; i++) {
            uint32_t bits = (uint32_t)bits_of(x[i]);
            if ((bits & SIZE_MASK) > INFINITE)
                out[i] = (uint16_t)(bits >> 16 | 0x40);
        }
    return largest;
}

TARGET static inline __attribute__((always_inline)) int32_t
NAME(from_bf16_part)(const uint16_t *x, ptrdiff_t count, float *out)
{
    int32_t largest = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        int32_t bits = (int32_t)((uint32_t)x[i] << 16), size = bits & SIZE_MASK;
        largest = size > largest ? size : largest;
        out[i] = float_of(bits);
    }
    return largest;
}

/* One pass of a conversion; results from the bits `first_bad` on are not finite. */
#define CONVERT(link, name, in, out_type, first_bad)                                   \
    TARGET link int NAME(name)(const in *x, ptrdiff_t count, out_type *out)          \
    {                                                                                  \
        struct sink to;                                                                \
        int32_t largest = 0;                                                           \
        sink_open(&to, out, sizeof *out * (size_t)count);                              \
        for (ptrdiff_t i = 0; i < count; i += BLOCK) {                                 \
            ptrdiff_t size = count - i < BLOCK ? count - i : BLOCK;                    \
            NAME(fetch)(&to, x + i, sizeof *x * BLOCK);                                \
            int32_t bits = size == BLOCK                                               \
                               ? NAME(name##_part)(x + i, BLOCK, sink_at(&to))         \
                               : NAME(name##_part)(x + i, size, sink_at(&to));         \
            largest = bits > largest ? bits : largest;                                 \
            NAME(sink_move)(&to, sizeof *out * (size_t)size);                          \
        }                                                                              \
        NAME(sink_close)(&to);                                                         \
        return largest >= first_bad ? NOT_FINITE : OK;                                 \
    }
/* What rounds to infinity begins half a step below it. */
CONVERT(, to_bf16, float, uint16_t, 0x7f7f8000)
CONVERT(, from_bf16, uint16_t, float, INFINITE)
CONVERT(static, to_fp16, float, uint16_t, 0x477ff000)
CONVERT(static, from_fp16, uint16_t, float, INFINITE)
#undef CONVERT
