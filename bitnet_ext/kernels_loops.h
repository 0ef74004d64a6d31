/* Elementwise loops and reductions, compiled once for each vector level.

   Included by `kernels_loops.c` with TARGET (an attribute), LEVEL (a suffix) and WIDTH
   (floats in a register).
   Written so that a compiler vectorises them without changing one bit: maxima are
   taken on bit patterns, sums have a fixed order of lanes, and nothing is fused. */

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)
#define VEC NAME(floats)
#define IVEC NAME(ints)
#define UVEC NAME(words)
#define STRIP_VECTORS (STRIP / WIDTH)

typedef float VEC __attribute__((vector_size(4 * WIDTH)));
typedef int32_t IVEC __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t UVEC __attribute__((vector_size(4 * WIDTH)));

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

/* q = x times 127 / largest, to nearest, halves to even; returns largest / 127. */
TARGET static inline float NAME(quantise)(const float *x, ptrdiff_t count, int8_t *q)
{
    int32_t bits = NAME(largest)(x, count);
    float scale = float_of(bits) / 127.0f, inverse = 127.0f / float_of(bits);
    if (bits >= INFINITE || scale < FLT_MIN) {
        memset(q, 0, (size_t)count);
        return bits >= INFINITE ? NAN : 0.0f;
    }
    for (ptrdiff_t i = 0; i < count; i++)
        q[i] = (int8_t)bits_of(x[i] * inverse + ROUNDER);
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

/* Each token times its scale, and the bits of the largest of each column. */
TARGET static inline __attribute__((always_inline)) void
NAME(scale_tokens)(const float *dy, ptrdiff_t num_n, const float *token_scale,
                   ptrdiff_t num_tokens, float values[][STRIP], int32_t *largest)
{
    IVEC most[STRIP_VECTORS] = {{0}};
    for (ptrdiff_t m = 0; m < num_tokens; m++, dy += num_n)
        for (int i = 0; i < STRIP_VECTORS; i++) {
            VEC value;
            memcpy(&value, dy + WIDTH * i, sizeof value);
            value *= token_scale[m];
            IVEC bits = (IVEC)value & SIZE_MASK;
            IVEC above = bits > most[i];
            most[i] = (above & bits) | (~above & most[i]);
            memcpy(values[m] + WIDTH * i, &value, sizeof value);
        }
    memcpy(largest, most, sizeof most);
}

/* The same for the last, narrower strip. */
TARGET static void NAME(scale_edge)(const float *dy, ptrdiff_t num_n, ptrdiff_t size,
                                    const float *token_scale, ptrdiff_t num_tokens,
                                    float values[][STRIP], int32_t *largest)
{
    for (ptrdiff_t m = 0; m < num_tokens; m++, dy += num_n)
        for (ptrdiff_t i = 0; i < size; i++) {
            float value = dy[i] * token_scale[m];
            int32_t bits = bits_of(value) & SIZE_MASK;
            largest[i] = bits > largest[i] ? bits : largest[i];
            values[m][i] = value;
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
    }
    for (int i = 0; i < STRIP; i++) {
        if (largest[i] < INFINITE && scale[i] >= FLT_MIN)
            continue;
        scale[i] = largest[i] >= INFINITE ? NAN : 0.0f;
        inverse[i] = 0.0f;
        for (ptrdiff_t m = 0; m < count; m++)
            values[m][i] = 0.0f;
    }
}

/* Tokens in fours as int8, side by side, in blocks of 12 columns; and their sums. The
   low byte of a number plus ROUNDER is the integer next to it. */
TARGET static inline __attribute__((always_inline)) void
NAME(round_fours)(float values[][STRIP], ptrdiff_t num_tokens, const float *inverses,
                  int8_t *blocks, ptrdiff_t size, ptrdiff_t block_step, int32_t *sums)
{
    VEC inverse[STRIP_VECTORS];
    UVEC sum[STRIP_VECTORS] = {{0}};
    uint32_t words[STRIP];
    memcpy(inverse, inverses, sizeof inverse);
    for (ptrdiff_t m = 0; m < num_tokens; m += 4, blocks += LEFT_BYTES) {
        for (int i = 0; i < STRIP_VECTORS; i++) {
            VEC four[4];
            UVEC a, b, c, d;
            for (int row = 0; row < 4; row++)
                memcpy(&four[row], values[m + row] + WIDTH * i, sizeof *four);
            a = (UVEC)(four[0] * inverse[i] + ROUNDER);
            b = (UVEC)(four[1] * inverse[i] + ROUNDER);
            c = (UVEC)(four[2] * inverse[i] + ROUNDER);
            d = (UVEC)(four[3] * inverse[i] + ROUNDER);
            sum[i] += (a + b) + (c + d) - 4 * ROUNDER_BITS;
            a = (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | (d << 24);
            memcpy(words + WIDTH * i, &a, sizeof a);
        }
        for (ptrdiff_t n = 0; n < size; n += LEFT_ROWS)
            memcpy(blocks + n / LEFT_ROWS * block_step, words + n, LEFT_BYTES);
    }
    memcpy(sums, sum, sizeof sum);
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
    int32_t largest[STRIP] = {0}, sums[STRIP];
    if (size < STRIP || num_tokens % 4)
        memset(values, 0, sizeof values);
    if (size == STRIP)
        NAME(scale_tokens)(dy, num_n, token_scale, num_tokens, values, largest);
    else
        NAME(scale_edge)(dy, num_n, size, token_scale, num_tokens, values, largest);
    NAME(column_scales)(values, num_tokens, largest, inverse, scales);
    if (size == STRIP)
        NAME(round_fours)(values, num_tokens, inverse, blocks, STRIP, block_step, sums);
    else
        NAME(round_fours)(values, num_tokens, inverse, blocks, size, block_step, sums);
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

const struct loops NAME(loops) = {
    NAME(quantise_rows), NAME(row_starts),   NAME(quantise_columns),
    NAME(interleave),    NAME(sum_of_sizes), NAME(ternary_strip),
    NAME(to_bf16),       NAME(from_bf16),
};

#undef PASTE_
#undef PASTE
#undef NAME
#undef VEC
#undef IVEC
#undef UVEC
#undef STRIP_VECTORS
