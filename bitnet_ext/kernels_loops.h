/* Elementwise loops and reductions, compiled once for each vector level.

   Included by `kernels_loops.c` with TARGET (an attribute) and LEVEL (a suffix).
   Written so that a compiler vectorises them without changing one bit: maxima are
   taken on bit patterns, sums have a fixed order of lanes, and nothing is fused. */

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)

/* Bits of the largest |x|; at least INFINITE where any is not finite. */
TARGET static inline int32_t NAME(largest)(const float *x, ptrdiff_t count)
{
    int32_t largest = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        int32_t bits = bits_of(x[i]) & SIZE_MASK;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

/* q = x / scale to nearest, halves to even, where scale = largest / 127. */
TARGET static inline void NAME(round_values)(const float *x, ptrdiff_t count,
                                             float largest, float scale, int8_t *q)
{
    float inverse = 127.0f / largest;
    int32_t furthest = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        float ratio = x[i] * inverse, shifted = ratio + ROUNDER;
        int32_t off = bits_of(ratio - (shifted - ROUNDER)) & SIZE_MASK;
        furthest = off > furthest ? off : furthest;
        q[i] = (int8_t)bits_of(shifted);
    }
    /* The product is within 127 * 2^-22 of the quotient: they differ only near a half. */
    if (float_of(furthest) < 0.49996f)
        return;
    for (ptrdiff_t i = 0; i < count; i++)
        q[i] = (int8_t)bits_of(x[i] / scale + ROUNDER);
}

TARGET static inline float NAME(quantise)(const float *x, ptrdiff_t count, int8_t *q)
{
    int32_t bits = NAME(largest)(x, count);
    float largest = float_of(bits), scale = largest / 127.0f;
    if (bits >= INFINITE || scale < FLT_MIN) {
        memset(q, 0, (size_t)count);
        return bits >= INFINITE ? NAN : 0.0f;
    }
    NAME(round_values)(x, count, largest, scale, q);
    return scale;
}

TARGET static void NAME(quantise_rows)(const float *x, ptrdiff_t num_m, ptrdiff_t num_k,
                                       ptrdiff_t group, int8_t *q, float *scale)
{
    for (ptrdiff_t m = 0; m < num_m; m++)
        for (ptrdiff_t k = 0; k < num_k; k += group) {
            ptrdiff_t count = num_k - k < group ? num_k - k : group;
            /* The next group: the caches fetch it while this one is rounded. */
            for (ptrdiff_t i = 0; i < count && m + 1 < num_m; i += 16)
                __builtin_prefetch(x + m * num_k + k + group + i);
            *scale++ = NAME(quantise)(x + m * num_k + k, count, q + m * num_k + k);
        }
}

/* Where the sums of a product start: what the bytes of tiles are too large by. */
TARGET static void NAME(row_starts)(const int8_t *q, ptrdiff_t num_m, ptrdiff_t num_k,
                                    ptrdiff_t group, int32_t *starts)
{
    for (ptrdiff_t m = 0; m < num_m; m++)
        for (ptrdiff_t k = 0; k < num_k; k += group) {
            ptrdiff_t end = num_k - k < group ? num_k : k + group;
            *starts++ = -NAME(sum)(q + m * num_k + k, end - k);
        }
}

/* Scales and inverses of a strip of columns; a column that is not plain becomes zeros. */
TARGET static inline void NAME(column_scales)(float values[][STRIP], ptrdiff_t count,
                                              const int32_t *largest, float *inverse,
                                              float *scale)
{
    for (int i = 0; i < STRIP; i++) {
        scale[i] = float_of(largest[i]) / 127.0f;
        inverse[i] = 127.0f / float_of(largest[i]);
        if (largest[i] < INFINITE && scale[i] >= FLT_MIN)
            continue;
        scale[i] = largest[i] >= INFINITE ? NAN : 0.0f;
        inverse[i] = 0.0f;
        for (ptrdiff_t m = 0; m < count; m++)
            values[m][i] = 0.0f;
    }
}

/* Four tokens of a strip as int8, side by side. */
TARGET static inline __attribute__((always_inline)) void
NAME(round_four)(float values[][STRIP], const float *inverse, uint32_t *word,
                 int32_t *sum)
{
    for (int i = 0; i < STRIP; i++) {
        int32_t a = bits_of(values[0][i] * inverse[i] + ROUNDER) - bits_of(ROUNDER);
        int32_t b = bits_of(values[1][i] * inverse[i] + ROUNDER) - bits_of(ROUNDER);
        int32_t c = bits_of(values[2][i] * inverse[i] + ROUNDER) - bits_of(ROUNDER);
        int32_t d = bits_of(values[3][i] * inverse[i] + ROUNDER) - bits_of(ROUNDER);
        sum[i] += a + b + c + d;
        word[i] = ((uint32_t)a & 255) | ((uint32_t)b & 255) << 8 |
                  ((uint32_t)c & 255) << 16 | (uint32_t)d << 24;
    }
}

/* Each token times its scale; `largest` gets the bits of the largest of a column. */
TARGET static inline __attribute__((always_inline)) void
NAME(scale_tokens)(const float *dy, ptrdiff_t num_n, ptrdiff_t size,
                   const float *token_scale, ptrdiff_t num_tokens,
                   float values[][STRIP], int32_t *largest)
{
    for (ptrdiff_t m = 0; m < num_tokens; m++, dy += num_n) {
        /* The next strip: rows lie too far apart for the processor to see it come. */
        __builtin_prefetch(dy + STRIP);
        __builtin_prefetch(dy + STRIP + 16);
        __builtin_prefetch(dy + STRIP + 32);
        for (ptrdiff_t i = 0; i < size; i++) {
            float value = dy[i] * token_scale[m];
            int32_t bits = bits_of(value) & SIZE_MASK;
            largest[i] = bits > largest[i] ? bits : largest[i];
            values[m][i] = value;
        }
    }
}

/* A strip of columns of dy (tokens, N), each token times its scale, as int8 with a
   scale a column, in blocks of 12 columns by 4 tokens. */
TARGET static void NAME(quantise_columns)(const float *dy, ptrdiff_t num_n,
                                          ptrdiff_t size, const float *token_scale,
                                          ptrdiff_t num_tokens, int8_t *blocks,
                                          ptrdiff_t block_step, float *scale,
                                          int32_t *start, ptrdiff_t scale_step)
{
    float values[TOKENS][STRIP], inverse[STRIP], scales[STRIP];
    int32_t largest[STRIP] = {0}, sums[STRIP] = {0};
    uint32_t word[STRIP];
    if (size < STRIP || num_tokens % 4)
        memset(values, 0, sizeof values);
    if (size == STRIP)
        NAME(scale_tokens)(dy, num_n, STRIP, token_scale, num_tokens, values, largest);
    else
        NAME(scale_tokens)(dy, num_n, size, token_scale, num_tokens, values, largest);
    NAME(column_scales)(values, num_tokens, largest, inverse, scales);
    for (ptrdiff_t m = 0; m < num_tokens; m += 4, blocks += LEFT_BYTES) {
        NAME(round_four)(values + m, inverse, word, sums);
        for (ptrdiff_t n = 0; n < size; n += LEFT_ROWS)
            memcpy(blocks + n / LEFT_ROWS * block_step, word + n, LEFT_BYTES);
    }
    for (ptrdiff_t i = 0; i < size; i++) {
        scale[i * scale_step] = scales[i];
        start[i * scale_step] = -128 * sums[i];
    }
}

/* Four rows of whole tiles, plus an offset, as one tile of each of `num_panels`. */
TARGET static void NAME(interleave)(const uint8_t *rows, ptrdiff_t row_step,
                                    ptrdiff_t num_panels, uint8_t offset,
                                    uint8_t *tiles, ptrdiff_t panel_step)
{
    for (ptrdiff_t panel = 0; panel < num_panels; panel++)
        NAME(weave)(rows + panel * TILE_N, row_step, offset, tiles + panel * panel_step);
}

/* Sum of |w| in 16 lanes of doubles; lane i takes elements i, i + 16, ... */
TARGET static double NAME(sum_of_sizes)(const float *w, ptrdiff_t count)
{
    double lanes[16] = {0}, sum = 0;
    ptrdiff_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int lane = 0; lane < 16; lane++)
            lanes[lane] += fabs((double)w[i + lane]);
    for (int lane = 0; i < count; i++, lane++)
        lanes[lane] += fabs((double)w[i]);
    for (int lane = 0; lane < 16; lane++)
        sum += lanes[lane];
    return sum;
}

/* Codes 0, 1, 2 for -1, 0, +1. With half = scale / 2 the comparisons give what
   rounding w / scale to even and clipping gives: exactly a half goes to 0. */
TARGET static void NAME(ternary_strip)(const float *w, ptrdiff_t num_k, float half,
                                       uint8_t *codes)
{
    for (ptrdiff_t k = 0; k < num_k; k++)
        codes[k] = (uint8_t)(1 + (w[k] > half) - (w[k] < -half));
}

TARGET static int NAME(encode_int8)(const float *x, const float *residual,
                                    ptrdiff_t count, uint8_t *payload,
                                    float *new_residual)
{
    ptrdiff_t num_blocks = (count + BLOCK - 1) / BLOCK;
    int8_t *q = (int8_t *)payload + 4 * num_blocks;
    float values[BLOCK];
    for (ptrdiff_t block = 0; block < num_blocks; block++) {
        ptrdiff_t start = block * BLOCK;
        ptrdiff_t size = count - start < BLOCK ? count - start : BLOCK;
        for (ptrdiff_t i = 0; i < size; i++)
            values[i] = residual ? x[start + i] + residual[start + i] : x[start + i];
        float scale = NAME(quantise)(values, size, q + start);
        if (!(scale <= MAX_SCALE))
            return isnan(scale) ? NOT_FINITE : TOO_LARGE;
        memcpy(payload + 4 * block, &scale, 4);
        if (new_residual)
            for (ptrdiff_t i = 0; i < size; i++)
                new_residual[start + i] = values[i] - scale * (float)q[start + i];
    }
    return OK;
}

TARGET static int NAME(check_int8)(const uint8_t *payload, ptrdiff_t count)
{
    ptrdiff_t num_blocks = (count + BLOCK - 1) / BLOCK;
    const uint8_t *q = payload + 4 * num_blocks;
    int not_finite = 0, too_large = 0, bad = 0;
    for (ptrdiff_t block = 0; block < num_blocks; block++) {
        float scale = load_float(payload + 4 * block);
        int32_t bits = bits_of(scale);
        not_finite |= (bits & SIZE_MASK) >= INFINITE;
        too_large |= scale > MAX_SCALE;
        /* Negative, minus zero or subnormal: no encoder writes that. */
        bad |= bits != 0 && bits < bits_of(FLT_MIN);
    }
    for (ptrdiff_t i = 0; i < count; i++)
        bad |= q[i] == 128;
    return not_finite ? NOT_FINITE : too_large ? TOO_LARGE : bad ? BAD_VALUE : OK;
}

TARGET static void NAME(add_int8)(const uint8_t *payload, ptrdiff_t count, float weight,
                                  float *into)
{
    ptrdiff_t num_blocks = (count + BLOCK - 1) / BLOCK;
    const int8_t *q = (const int8_t *)payload + 4 * num_blocks;
    for (ptrdiff_t block = 0; block < num_blocks; block++) {
        float scale = load_float(payload + 4 * block);
        ptrdiff_t start = block * BLOCK;
        ptrdiff_t end = count - start < BLOCK ? count : start + BLOCK;
        for (ptrdiff_t i = start; i < end; i++)
            into[i] += weight * (scale * (float)q[i]);
    }
}

TARGET static int NAME(check_fp32)(const uint8_t *values, ptrdiff_t count)
{
    int32_t largest = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        int32_t bits = bits_of(load_float(values + 4 * i)) & SIZE_MASK;
        largest = bits > largest ? bits : largest;
    }
    return largest >= INFINITE ? NOT_FINITE : OK;
}

TARGET static void NAME(add_fp32)(const uint8_t *values, ptrdiff_t count, float weight,
                                  float *into)
{
    for (ptrdiff_t i = 0; i < count; i++)
        into[i] += weight * load_float(values + 4 * i);
}

/* To nearest, halves to even; a NaN keeps its sign and top bits and stays a NaN. */
TARGET static void NAME(to_bf16)(const float *x, ptrdiff_t count, uint16_t *out)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)bits_of(x[i]);
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        int is_nan = (bits & SIZE_MASK) > INFINITE;
        out[i] = (uint16_t)(is_nan ? bits >> 16 | 0x40 : rounded);
    }
}

TARGET static void NAME(from_bf16)(const uint16_t *x, ptrdiff_t count, float *out)
{
    for (ptrdiff_t i = 0; i < count; i++)
        out[i] = float_of((int32_t)((uint32_t)x[i] << 16));
}

/* 0 -> 0b00, +1 -> 0b01, -1 -> 0b10. */
TARGET static inline unsigned NAME(code_of)(int8_t value)
{
    return (unsigned)(value & 1) + (value < 0);
}

/* Four values to a byte, lowest bits first; each row on bytes of its own. */
TARGET static int NAME(pack)(const int8_t *values, ptrdiff_t num_n, ptrdiff_t num_k,
                             uint8_t *out)
{
    uint8_t bad = 0;
    for (ptrdiff_t i = 0; i < num_n * num_k; i++)
        bad |= (uint8_t)(values[i] + 1) > 2;
    for (ptrdiff_t n = 0; n < num_n; n++, values += num_k, out += (num_k + 3) / 4) {
        for (ptrdiff_t b = 0; b < num_k / 4; b++)
            out[b] = (uint8_t)(NAME(code_of)(values[4 * b]) |
                               NAME(code_of)(values[4 * b + 1]) << 2 |
                               NAME(code_of)(values[4 * b + 2]) << 4 |
                               NAME(code_of)(values[4 * b + 3]) << 6);
        unsigned last = 0;
        for (int i = 0; i < num_k % 4; i++)
            last |= NAME(code_of)(values[num_k / 4 * 4 + i]) << (2 * i);
        if (num_k % 4)
            out[num_k / 4] = (uint8_t)last;
    }
    return bad ? BAD_VALUE : OK;
}

TARGET static inline int8_t NAME(value_of)(unsigned byte, int place)
{
    unsigned code = byte >> (2 * place);
    return (int8_t)((int)(code & 1) - (int)(code >> 1 & 1));
}

TARGET static int NAME(unpack)(const uint8_t *codes, ptrdiff_t num_n, ptrdiff_t num_k,
                               int8_t *out)
{
    uint8_t bad = 0;
    ptrdiff_t width = (num_k + 3) / 4;
    for (ptrdiff_t i = 0; i < num_n * width; i++)
        bad |= codes[i] & codes[i] >> 1 & 0x55;
    for (ptrdiff_t n = 0; n < num_n; n++, codes += width, out += num_k) {
        for (ptrdiff_t b = 0; b < num_k / 4; b++) {
            out[4 * b] = NAME(value_of)(codes[b], 0);
            out[4 * b + 1] = NAME(value_of)(codes[b], 1);
            out[4 * b + 2] = NAME(value_of)(codes[b], 2);
            out[4 * b + 3] = NAME(value_of)(codes[b], 3);
        }
        if (num_k % 4)
            bad |= codes[width - 1] >> (2 * (num_k % 4));
        for (int i = 0; i < num_k % 4; i++)
            out[num_k / 4 * 4 + i] = NAME(value_of)(codes[width - 1], i);
    }
    return bad ? BAD_VALUE : OK;
}

const struct loops NAME(loops) = {
    NAME(quantise_rows), NAME(row_starts),   NAME(quantise_columns), NAME(interleave), NAME(sum_of_sizes), NAME(ternary_strip),
    NAME(encode_int8),   NAME(check_int8), NAME(add_int8),     NAME(check_fp32),
    NAME(add_fp32),      NAME(to_bf16),    NAME(from_bf16),    NAME(pack),
    NAME(unpack),
};

#undef PASTE_
#undef PASTE
#undef NAME
