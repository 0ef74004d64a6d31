/* The rows of `kernels_fused.h`, compiled once for each vector level.

   Included by `kernels_fused.c` with TARGET (an attribute), LEVEL (a suffix) and WIDTH
   (floats in a register). A row is walked LANES numbers at a time, in PARTS registers
   with a sum each, so that sums have the same lanes and the same bits everywhere. */

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)
#define INLINE TARGET static inline __attribute__((always_inline))
#define VEC NAME(floats)
#define IVEC NAME(ints)
#define PARTS (LANES / WIDTH)
#define EACH_PART for (int part = 0; part < PARTS; part++)

typedef float VEC __attribute__((vector_size(4 * WIDTH)));
typedef int32_t IVEC __attribute__((vector_size(4 * WIDTH)));

INLINE VEC NAME(pick)(IVEC mask, VEC yes, VEC no)
{
    return (VEC)((mask & (IVEC)yes) | (~mask & (IVEC)no));
}

/* The first `left` numbers, then zeros. */
INLINE VEC NAME(load)(const float *x, ptrdiff_t left)
{
    VEC value = {0};
    if (left >= WIDTH)
        memcpy(&value, x, sizeof value);
    else if (left > 0)
        memcpy(&value, x, (size_t)left * sizeof *x);
    return value;
}

INLINE void NAME(store)(float *x, ptrdiff_t left, VEC value)
{
    if (left >= WIDTH)
        memcpy(x, &value, sizeof value);
    else if (left > 0)
        memcpy(x, &value, (size_t)left * sizeof *x);
}

/* Lanes 8 apart first, then 4, 2, 1. */
INLINE float NAME(total)(VEC *sums)
{
    IVEC order;
    for (int i = 0; i < WIDTH; i++)
        order[i] = i;
    for (int parts = PARTS / 2; parts > 0; parts /= 2)
        for (int part = 0; part < parts; part++)
            sums[part] += sums[part + parts];
    for (int step = WIDTH / 2; step > 0; step /= 2)
        sums[0] += __builtin_shuffle(sums[0], order ^ step);
    return sums[0][0];
}

/* e^x to 2 ulp for x from -87 to 88; outside, and for NaN, the value at an end. */
INLINE VEC NAME(exponential)(VEC x)
{
    x = NAME(pick)(x > -87.0f, x, (VEC){0} - 87.0f);
    x = NAME(pick)(x < 88.0f, x, (VEC){0} + 88.0f);
    VEC shifted = x * 1.44269504f + ROUNDER, n = shifted - ROUNDER;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    VEC y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    return (VEC)((IVEC)y + ((IVEC)shifted << 23));
}

/* What the norm reads at column k of a row. */
INLINE VEC NAME(input)(const float *x, const float *up, int gate, ptrdiff_t left)
{
    VEC value = NAME(load)(x, left);
    if (gate == NO_GATE)
        return value;
    if (gate == SILU)
        value = value / (NAME(exponential)(-value) + 1.0f);
    else
        value = NAME(pick)(value < 0.0f, (VEC){0}, value * value);
    return value * NAME(load)(up, left);
}

INLINE void NAME(norm_row)(const struct norm *n, const float *x, const float *up,
                           float *y, float *inverse, int gate)
{
    ptrdiff_t num_k = n->num_k;
    VEC sums[PARTS] = {{0}};
    for (ptrdiff_t k = 0; k < num_k;) {
        __builtin_prefetch(x + num_k + k); /* the next row */
        __builtin_prefetch(up + num_k + k);
        EACH_PART {
            VEC value = NAME(input)(x + k, up + k, gate, num_k - k);
            sums[part] += value * value;
            NAME(store)(y + k, num_k - k, value);
            k += WIDTH;
        }
    }
    *inverse = 1.0f / sqrtf(NAME(total)(sums) / (float)num_k + n->eps);
    for (ptrdiff_t k = 0; k < num_k; k += WIDTH) {
        VEC value = NAME(load)(y + k, num_k - k) * *inverse;
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

INLINE VEC NAME(sigmoid)(VEC x) { return 1.0f / (NAME(exponential)(-x) + 1.0f); }

/* The input of the norm; with a SILU, its sigmoid is kept. */
INLINE VEC NAME(unit)(const float *x, const float *up, int gate, ptrdiff_t left,
                      VEC *sigmoid)
{
    if (gate != SILU)
        return NAME(input)(x, up, gate, left);
    VEC a = NAME(load)(x, left);
    *sigmoid = NAME(sigmoid)(a);
    return a * *sigmoid * NAME(load)(up, left);
}

/* From the gradient of act(x) * up to those of x and up. */
INLINE void NAME(gate_backward)(const float *x, const float *up, int gate, VEC sigmoid,
                                VEC d, float *dx, float *dup, ptrdiff_t left)
{
    VEC a = NAME(load)(x, left), b = NAME(load)(up, left), act, slope;
    if (gate == SILU) {
        act = a * sigmoid;
        slope = sigmoid + act * (1.0f - sigmoid);
    } else {
        VEC kept = NAME(pick)(a < 0.0f, (VEC){0}, a);
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
    VEC sums[PARTS] = {{0}};
    for (ptrdiff_t k = 0; k < num_k;) {
        __builtin_prefetch(x + num_k + k); /* the next row */
        __builtin_prefetch(up + num_k + k);
        __builtin_prefetch(dy + num_k + k);
        EACH_PART {
            ptrdiff_t left = num_k - k;
            VEC sigmoid = {0}, unit = NAME(unit)(x + k, up + k, gate, left, &sigmoid);
            unit *= inverse;
            VEC pull = NAME(load)(dy + k, left) * unit;
            sums[part] += pull * NAME(load)(n->gain + k, left);
            NAME(store)(dgain + k, left, NAME(load)(dgain + k, left) + pull);
            NAME(store)(scratch + k, left, unit);
            if (gate == SILU)
                NAME(store)(sigmoids + k, left, sigmoid);
            k += WIDTH;
        }
    }
    float mean = NAME(total)(sums) / (float)num_k;
    for (ptrdiff_t k = 0; k < num_k; k += WIDTH) {
        ptrdiff_t left = num_k - k;
        VEC d = NAME(load)(dy + k, left) * NAME(load)(n->gain + k, left);
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

INLINE float NAME(largest)(const float *x, ptrdiff_t count)
{
    VEC lanes = (VEC){0} - INFINITY;
    ptrdiff_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        VEC value = NAME(load)(x + i, WIDTH);
        lanes = NAME(pick)(value > lanes, value, lanes);
    }
    float largest = lanes[0];
    for (int lane = 1; lane < WIDTH; lane++)
        largest = lanes[lane] > largest ? lanes[lane] : largest;
    for (; i < count; i++)
        largest = x[i] > largest ? x[i] : largest;
    return largest;
}

TARGET static float NAME(softmax)(float *logits, ptrdiff_t count, ptrdiff_t target,
                                  float scale)
{
    VEC sums[PARTS] = {{0}}, wrong[PARTS] = {{0}};
    float largest = NAME(largest)(logits, count), known = logits[target];
    for (ptrdiff_t i = 0; i < count;) {
        EACH_PART {
            ptrdiff_t left = count - i;
            VEC x = NAME(load)(logits + i, left) - largest, e = NAME(exponential)(x);
            wrong[part] += x - x; /* zero, unless something is not finite */
            NAME(store)(logits + i, left, e);
            /* Past the end stands what no sum may hold. */
            sums[part] += left >= WIDTH ? e : NAME(load)(logits + i, left);
            i += WIDTH;
        }
    }
    float sum = NAME(total)(sums), bad = NAME(total)(wrong);
    float factor = scale / sum + bad;
    for (ptrdiff_t i = 0; i < count; i += WIDTH) {
        VEC e = NAME(load)(logits + i, count - i);
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
#undef VEC
#undef IVEC
#undef PARTS
#undef EACH_PART
