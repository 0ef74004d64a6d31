/* Attention of one position, compiled once for each vector level.

   Included by `kernels_decode.c` with TARGET (an attribute) and LEVEL (a suffix).
   Vectors are the compiler's own, 16 floats on every machine: the same sums. */

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)
#define INLINE TARGET static inline __attribute__((always_inline))

INLINE v16 NAME(load)(const float *x)
{
    v16 value;
    memcpy(&value, x, sizeof value);
    return value;
}

/* Turns a head by the angles of a position, times `factor`; writes `step` apart. */
INLINE void NAME(turn)(const float *from, const float *cosines, const float *sines,
                       ptrdiff_t half, float factor, float *to, ptrdiff_t step)
{
    for (ptrdiff_t i = 0; i < half; i++) {
        float first = from[i], second = from[half + i];
        to[i * step] = (first * cosines[i] - second * sines[i]) * factor;
        to[(half + i) * step] = (second * cosines[i] + first * sines[i]) * factor;
    }
}

/* Four sums at a time, so that additions do not wait for each other. */
#define FOUR_SUMS(count, term)                                                         \
    v16 a = {0}, b = {0}, c = {0}, e = {0};                                            \
    ptrdiff_t i = 0;                                                                   \
    for (; i + 4 <= (count); i += 4) {                                                 \
        a += term(i);                                                                  \
        b += term(i + 1);                                                              \
        c += term(i + 2);                                                              \
        e += term(i + 3);                                                              \
    }                                                                                  \
    for (; i < (count); i++)                                                           \
        a += term(i);                                                                  \
    v16 sum = (a + b) + (c + e);

TARGET static void NAME(find_scores)(const float *q, const float *keys, ptrdiff_t num_d,
                                     ptrdiff_t count, float *scores)
{
    for (ptrdiff_t t = 0; t < count; t += SIDE, keys += SIDE * num_d) {
#define TERM(i) q[i] * NAME(load)(keys + SIDE * (i))
        FOUR_SUMS(num_d, TERM)
#undef TERM
        memcpy(scores + t, &sum, sizeof sum);
    }
}

TARGET static void NAME(mix)(const float *odds, const float *values, ptrdiff_t num_d,
                             ptrdiff_t count, float *mixed)
{
    ptrdiff_t d = 0;
    for (; d + SIDE <= num_d; d += SIDE) {
#define TERM(i) odds[i] * NAME(load)(values + (i) * num_d + d)
        FOUR_SUMS(count, TERM)
#undef TERM
        memcpy(mixed + d, &sum, sizeof sum);
    }
    for (; d < num_d; d++) {
        float sum = 0.0f;
        for (ptrdiff_t i = 0; i < count; i++)
            sum += odds[i] * values[i * num_d + d];
        mixed[d] = sum;
    }
}

TARGET static void NAME(attend)(const struct decoder *d,
                                const struct decoder_layer *layer, ptrdiff_t shared,
                                ptrdiff_t position, const float *q, const float *k,
                                const float *v, float *scores, float *mixed)
{
    ptrdiff_t num_d = d->num_d, half = num_d / 2, group = d->num_heads / d->num_shared;
    const float *cosines = d->cosines + position * half;
    const float *sines = d->sines + position * half;
    float *keys = layer->keys + shared * d->num_c * num_d;
    float *values = layer->values + shared * d->num_c * num_d;
    float turned[MOST_D];
    NAME(turn)(k + shared * num_d, cosines, sines, half, 1.0f,
               keys + position / SIDE * SIDE * num_d + position % SIDE, SIDE);
    memcpy(values + position * num_d, v + shared * num_d, (size_t)num_d * sizeof *v);
    for (ptrdiff_t head = shared * group; head < (shared + 1) * group; head++) {
        NAME(turn)(q + head * num_d, cosines, sines, half, 1.0f / sqrtf((float)num_d),
                   turned, 1);
        NAME(find_scores)(turned, keys, num_d, position + 1, scores);
        /* Past the end stands a target, which no one reads. */
        active_fused()->softmax(scores, position + 1, position + 1, 1.0f);
        NAME(mix)(scores, values, num_d, position + 1, mixed + head * num_d);
    }
}

const struct decode_loops NAME(decode) = {NAME(attend)};

#undef FOUR_SUMS
#undef PASTE_
#undef PASTE
#undef NAME
#undef INLINE
