/* The rows of `kernels_head.h`, compiled once for each vector level.

   Included by `kernels_head.c` with TARGET (an attribute) and LEVEL (a suffix). */

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)

/* One group; numbers too small or not finite become zeros. Returns the scale. */
TARGET static inline __attribute__((always_inline)) float
NAME(split_group)(const float *p, const float *word_scale, ptrdiff_t count,
                  int8_t *restrict high, int8_t *restrict low, int32_t *high_sum,
                  int32_t *low_sum)
{
    float values[WORDS];
    int32_t largest = 0, sum = 0, fine_sum = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        values[i] = p[i] * word_scale[i];
        int32_t bits = bits_of(values[i]) & SIZE_MASK;
        largest = bits > largest ? bits : largest;
    }
    float scale = float_of(largest) / 127.0f, inverse = 127.0f / float_of(largest);
    if (largest >= INFINITE || scale < FLT_MIN) {
        for (ptrdiff_t i = 0; i < count; i++)
            high[i] = low[i] = 0;
        *high_sum = *low_sum = 0;
        return largest >= INFINITE ? NAN : 0.0f;
    }
    for (ptrdiff_t i = 0; i < count; i++) {
        float ratio = values[i] * inverse, shifted = ratio + ROUNDER;
        float rest = (ratio - (shifted - ROUNDER)) * FINER + ROUNDER;
        int32_t coarse = bits_of(shifted) - bits_of(ROUNDER);
        int32_t fine = bits_of(rest) - bits_of(ROUNDER);
        sum += coarse;
        fine_sum += fine;
        high[i] = (int8_t)coarse;
        low[i] = (int8_t)fine;
    }
    *high_sum = sum;
    *low_sum = fine_sum;
    return scale;
}

TARGET static void NAME(split)(const float *p, const float *word_scale, ptrdiff_t num_v,
                               int8_t *high, int8_t *low, float *scale,
                               int32_t *high_start, int32_t *low_start)
{
    ptrdiff_t v = 0;
    for (; v < num_v; v += WORDS, scale++, high_start++, low_start++) {
        int32_t sum, fine_sum;
        if (num_v - v >= WORDS)
            *scale = NAME(split_group)(p + v, word_scale + v, WORDS, high + v, low + v,
                                       &sum, &fine_sum);
        else
            *scale = NAME(split_group)(p + v, word_scale + v, num_v - v, high + v,
                                       low + v, &sum, &fine_sum);
        *high_start = -128 * sum;
        *low_start = -128 * fine_sum;
    }
    for (v = num_v; v % TILE_K; v++)
        high[v] = low[v] = 0;
}

TARGET static void NAME(scale_row)(float *restrict x, const float *restrict by,
                                   ptrdiff_t count)
{
    for (ptrdiff_t i = 0; i < count; i++)
        x[i] *= by[i];
}

TARGET static void NAME(add_row)(const float *restrict x, float factor, ptrdiff_t count,
                                 float *restrict y)
{
    for (ptrdiff_t i = 0; i < count; i++)
        y[i] += x[i] * factor;
}

TARGET static void NAME(add_rest)(const float *restrict x, const int8_t *restrict q,
                                  float scale, float factor, ptrdiff_t count,
                                  float *restrict y)
{
    for (ptrdiff_t i = 0; i < count; i++)
        y[i] += (x[i] - scale * (float)q[i]) * factor;
}

TARGET static void NAME(weave_rows)(const int8_t *q, ptrdiff_t num_rows,
                                    ptrdiff_t width, uint8_t *tiles)
{
    for (ptrdiff_t row = 0; row < TILE_N; row++)
        for (ptrdiff_t k4 = 0; k4 < width / TILE_K; k4++) {
            uint32_t word = 0;
            if (row < num_rows)
                memcpy(&word, q + row * width + k4 * TILE_K, TILE_K);
            word ^= 0x80808080u;
            memcpy(tiles + k4 * TILE_BYTES + row * TILE_K, &word, TILE_K);
        }
}

const struct head_loops NAME(head) = {
    NAME(split),
    NAME(scale_row),
    NAME(add_row),
    NAME(add_rest),
    NAME(weave_rows),
};

#undef PASTE_
#undef PASTE
#undef NAME
