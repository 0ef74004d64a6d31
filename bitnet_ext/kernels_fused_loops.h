/* The rows of `kernels_fused.h`, compiled once for each vector level.

   Included by `kernels_fused.c` with TARGET (an attribute) and LEVEL (a suffix).
   Vectors of 16 floats are the compiler's own: wider than some machines have, so that
   sums have the same lanes and the same bits on all of them. */

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)
#define INLINE TARGET static inline __attribute__((always_inline))

INLINE v16 NAME(pick)(i16 mask, v16 yes, v16 no)
{
    return (v16)((mask & (i16)yes) | (~mask & (i16)no));
}

/* The first `left` numbers, then zeros. */
INLINE v16 NAME(load)(const float *x, ptrdiff_t left)
{
    v16 value = {0};
    if (left >= LANES)
        memcpy(&value, x, sizeof value);
    else
        memcpy(&value, x, (size_t)left * sizeof *x);
    return value;
}

INLINE void NAME(store)(float *x, ptrdiff_t left, v16 value)
{
    if (left >= LANES)
        memcpy(x, &value, sizeof value);
    else
        memcpy(x, &value, (size_t)left * sizeof *x);
}

/* Lanes 8 apart first, then 4, 2, 1. */
INLINE float NAME(total)(v16 lanes)
{
    const i16 order = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int step = LANES / 2; step > 0; step /= 2)
        lanes += __builtin_shuffle(lanes, order ^ step);
    return lanes[0];
}

/* e^x to 2 ulp for x from -87 to 88; outside, and for NaN, the value at an end. */
INLINE v16 NAME(exponential)(v16 x)
{
    x = NAME(pick)(x > -87.0f, x, (v16){0} - 87.0f);
    x = NAME(pick)(x < 88.0f, x, (v16){0} + 88.0f);
    v16 shifted = x * 1.44269504f + ROUNDER, n = shifted - ROUNDER;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    v16 y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    return (v16)((i16)y + ((i16)shifted << 23));
}

/* What the norm reads at column k of a row. */
INLINE v16 NAME(input)(const float *x, const float *up, int gate, ptrdiff_t left)
{
    v16 value = NAME(load)(x, left);
    if (gate == NO_GATE)
        return value;
    if (gate == SILU)
        value = value / (NAME(exponential)(-value) + 1.0f);
    else
        value = NAME(pick)(value < 0.0f, (v16){0}, value * value);
    return value * NAME(load)(up, left);
}

INLINE void NAME(norm_row)(const struct norm *n, const float *x, const float *up,
                           float *y, float *inverse, int gate)
{
    ptrdiff_t num_k = n->num_k;
    v16 sums = {0};
    for (ptrdiff_t k = 0; k < num_k; k += LANES) {
        __builtin_prefetch(x + num_k + k); /* the next row */
        __builtin_prefetch(up + num_k + k);
        v16 value = NAME(input)(x + k, up + k, gate, num_k - k);
        sums += value * value;
        NAME(store)(y + k, num_k - k, value);
    }
    *inverse = 1.0f / sqrtf(NAME(total)(sums) / (float)num_k + n->eps);
    for (ptrdiff_t k = 0; k < num_k; k += LANES) {
        v16 value = NAME(load)(y + k, num_k - k) * *inverse;
        NAME(store)(y + k, num_k - k, value * NAME(load)(n->gain + k, num_k - k));
    }
}

TARGET static void NAME(norm_rows)(const struct norm *n, ptrdiff_t m, ptrdiff_t count,
                                   float *y)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        const float *x = n->x + (m + i) * n->num_k;
        const float *up = n->gate ? n->up + (m + i) * n->num_k : x;
        float *to = y + i * n->num_k, *inverse = n->inverse + m + i;
        if (n->gate == NO_GATE)
            NAME(norm_row)(n, x, up, to, inverse, NO_GATE);
        else if (n->gate == SILU)
            NAME(norm_row)(n, x, up, to, inverse, SILU);
        else
            NAME(norm_row)(n, x, up, to, inverse, SQUARED_RELU);
    }
}

INLINE v16 NAME(sigmoid)(v16 x) { return 1.0f / (NAME(exponential)(-x) + 1.0f); }

/* From the gradient of act(x) * up to those of x and up. */
INLINE void NAME(gate_backward)(const float *x, const float *up, int gate, v16 sigmoid,
                                v16 d, float *dx, float *dup, ptrdiff_t left)
{
    v16 a = NAME(load)(x, left), b = NAME(load)(up, left), act, slope;
    if (gate == SILU) {
        act = a * sigmoid;
        slope = sigmoid + act * (1.0f - sigmoid);
    } else {
        v16 kept = NAME(pick)(a < 0.0f, (v16){0}, a);
        act = kept * kept;
        slope = kept + kept;
    }
    NAME(store)(dx, left, d * b * slope);
    NAME(store)(dup, left, d * act);
}

/* With x^ = x * inverse and d = gain * dy: dx = inverse * (d - x^ * mean(d * x^)).
   `scratch` keeps x^, and behind it sigmoids: an exponential and a division each. */
INLINE void NAME(row_backward)(const struct norm *n, ptrdiff_t m, const float *dy,
                               float *dx, float *dup, int add, float *scratch,
                               float *dgain, int gate)
{
    ptrdiff_t num_k = n->num_k;
    const float *x = n->x + m * num_k, *up = gate ? n->up + m * num_k : x;
    float inverse = n->inverse[m], *sigmoids = scratch + num_k;
    v16 sums = {0};
    for (ptrdiff_t k = 0; k < num_k; k += LANES) {
        ptrdiff_t left = num_k - k;
        v16 unit;
        __builtin_prefetch(x + num_k + k); /* the next row */
        __builtin_prefetch(up + num_k + k);
        __builtin_prefetch(dy + num_k + k);
        if (gate == SILU) {
            v16 a = NAME(load)(x + k, left), sigmoid = NAME(sigmoid)(a);
            NAME(store)(sigmoids + k, left, sigmoid);
            unit = a * sigmoid * NAME(load)(up + k, left) * inverse;
        } else {
            unit = NAME(input)(x + k, up + k, gate, left) * inverse;
        }
        v16 part = NAME(load)(dy + k, left) * unit;
        sums += part * NAME(load)(n->gain + k, left);
        NAME(store)(dgain + k, left, NAME(load)(dgain + k, left) + part);
        NAME(store)(scratch + k, left, unit);
    }
    float mean = NAME(total)(sums) / (float)num_k;
    for (ptrdiff_t k = 0; k < num_k; k += LANES) {
        ptrdiff_t left = num_k - k;
        v16 d = NAME(load)(dy + k, left) * NAME(load)(n->gain + k, left);
        d = (d - NAME(load)(scratch + k, left) * mean) * inverse;
        if (gate)
            NAME(gate_backward)(x + k, up + k, gate,
                                gate == SILU ? NAME(load)(sigmoids + k, left) : d, d,
                                dx + k, dup + k, left);
        else
            NAME(store)(dx + k, left, add ? d + NAME(load)(dx + k, left) : d);
    }
}

TARGET static void NAME(norm_row_backward)(const struct norm *n, ptrdiff_t m,
                                           const float *dy, float *dx, float *dup,
                                           int add, float *scratch, float *dgain)
{
    if (n->gate == NO_GATE)
        NAME(row_backward)(n, m, dy, dx, dup, add, scratch, dgain, NO_GATE);
    else if (n->gate == SILU)
        NAME(row_backward)(n, m, dy, dx, dup, add, scratch, dgain, SILU);
    else
        NAME(row_backward)(n, m, dy, dx, dup, add, scratch, dgain, SQUARED_RELU);
}

TARGET static float NAME(softmax)(float *logits, ptrdiff_t count, ptrdiff_t target,
                                  float scale)
{
    v16 lanes = (v16){0} - INFINITY, sums = {0}, wrong = {0};
    ptrdiff_t whole = count - count % LANES;
    for (ptrdiff_t i = 0; i < whole; i += LANES) {
        v16 x = NAME(load)(logits + i, LANES);
        lanes = NAME(pick)(x > lanes, x, lanes);
    }
    float largest = lanes[0];
    for (int lane = 1; lane < LANES; lane++)
        largest = lanes[lane] > largest ? lanes[lane] : largest;
    for (ptrdiff_t i = whole; i < count; i++)
        largest = logits[i] > largest ? logits[i] : largest;
    float known = logits[target];
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        ptrdiff_t left = count - i;
        v16 x = NAME(load)(logits + i, left) - largest, e = NAME(exponential)(x);
        wrong += x - x; /* zero, unless something is not finite */
        NAME(store)(logits + i, left, e);
        /* Past the end stands what no sum may hold. */
        sums += left >= LANES ? e : NAME(load)(logits + i, left);
    }
    float sum = NAME(total)(sums), bad = NAME(total)(wrong);
    float factor = scale / sum + bad;
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        v16 e = NAME(load)(logits + i, count - i);
        NAME(store)(logits + i, count - i, e * factor);
    }
    logits[target] -= scale;
    return logf(sum) - (known - largest) + bad;
}

/* In 16 lanes of doubles, as long as a block is: see `square_sum`. */
TARGET static double NAME(sum_of_squares)(const float *x, ptrdiff_t count)
{
    double lanes[LANES] = {0}, sum = 0;
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        __builtin_prefetch(x + i + AHEAD);
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] += (double)x[i + lane] * (double)x[i + lane];
    }
    for (int lane = 0; i < count; i++, lane++)
        lanes[lane] += (double)x[i] * (double)x[i];
    for (int lane = 0; lane < LANES; lane++)
        sum += lanes[lane];
    return sum;
}

TARGET static void NAME(adamw)(const struct adamw *a, ptrdiff_t start, ptrdiff_t count)
{
    struct adamw all = *a;
    float *restrict value = all.value + start, *restrict mean = all.mean + start;
    float *restrict square = all.square + start, *restrict grad = all.grad + start;
    for (ptrdiff_t i = 0; i < count; i++) {
        float g = grad[i] * all.clip;
        float m = mean[i] + (g - mean[i]) * (1.0f - all.beta1);
        float v = square[i] * all.beta2 + g * g * (1.0f - all.beta2);
        mean[i] = m;
        square[i] = v;
        value[i] = value[i] * all.keep - all.rate * m / (sqrtf(v) * all.root + all.eps);
        grad[i] = 0.0f;
    }
}

const struct fused_loops NAME(fused) = {
    NAME(norm_rows),  NAME(norm_row_backward), NAME(softmax),
    NAME(sum_of_squares), NAME(adamw),
};

#undef PASTE_
#undef PASTE
#undef NAME
#undef INLINE
