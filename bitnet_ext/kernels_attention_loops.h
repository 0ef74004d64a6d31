/* Products and rows of `kernels_attention.h`, compiled once for each vector level.

   Included by `kernels_attention.c` with TARGET (an attribute), LEVEL (a suffix), VEC
   (a vector of LANES floats), FMA, SPLAT and SIZES (heights of tiles, most first).
   Accumulators are named variables: compilers keep arrays of vectors on the stack. */

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)
#define INLINE TARGET static inline __attribute__((always_inline))

INLINE VEC NAME(load)(const float *x)
{
    VEC value;
    memcpy(&value, x, sizeof value);
    return value;
}

INLINE void NAME(store)(float *x, VEC value) { memcpy(x, &value, sizeof value); }

INLINE VEC NAME(pick)(IVEC mask, VEC yes, VEC no)
{
    return (VEC)((mask & (IVEC)yes) | (~mask & (IVEC)no));
}

/* A tile of C (+)= A B: `rows` rows by one or two vectors. */
#define START_1(i) VEC lo##i = SPLAT(0.0f);
#define START_2(i) VEC lo##i = SPLAT(0.0f), hi##i = lo##i;
#define STEP_1(i) lo##i = FMA(SPLAT(*A_##i), w0, lo##i);
#define STEP_2(i)                                                                      \
    {                                                                                  \
        VEC x = SPLAT(*A_##i);                                                         \
        lo##i = FMA(x, w0, lo##i);                                                       \
        hi##i = FMA(x, w1, hi##i);                                                       \
    }
#define PUT(i, at, sum)                                                                \
    NAME(store)(at, p->add ? (VEC)(NAME(load)(at) + sum) : sum);
#define FINISH_1(i) PUT(i, c + i * p->c_row, lo##i)
#define FINISH_2(i) FINISH_1(i) PUT(i, c + i * p->c_row + LANES, hi##i)
#define TILE(rows, width)                                                              \
    TARGET static void NAME(tile_##rows##_##width)(const struct piece *p,              \
                                                   const float *a0, const float *w,    \
                                                   float *c)                           \
    {                                                                                  \
        ptrdiff_t step = p->a_row, step3 = 3 * step, next = p->a_k;                    \
        const float *a4 = a0 + 4 * step, *a8 = a4 + 4 * step;                          \
        (void)step3, (void)a4, (void)a8;                                               \
        ROWS_##rows(START_##width)                                                     \
        for (ptrdiff_t k = 0; k < p->num_k; k++) {                                     \
            VEC w0 = NAME(load)(w), w1 = width > 1 ? NAME(load)(w + LANES) : w0;       \
            (void)w1;                                                                  \
            ROWS_##rows(STEP_##width)                                                  \
            a0 += next, a4 += next, a8 += next, w += p->b_k;                           \
        }                                                                              \
        ROWS_##rows(FINISH_##width)                                                    \
    }
#define BOTH(rows) TILE(rows, 1) TILE(rows, 2)
SIZES(BOTH)

/* C (+)= A B for any number of rows, and columns in whole vectors. */
TARGET static void NAME(product)(const struct piece *p)
{
#define LINE(rows) {rows, NAME(tile_##rows##_1), NAME(tile_##rows##_2)},
    static const struct tiles sizes[] = {SIZES(LINE)};
#undef LINE
    const struct tiles *size = sizes;
    for (ptrdiff_t m = 0; m < p->num_m; m += size->rows) {
        while (size->rows > p->num_m - m)
            size++;
        const float *a = p->a + m * p->a_row;
        float *c = p->c + m * p->c_row;
        ptrdiff_t n = 0;
        for (; n + 2 * LANES <= p->num_n; n += 2 * LANES)
            size->wide(p, a, p->b + n, c + n);
        for (; n < p->num_n; n += LANES)
            size->narrow(p, a, p->b + n, c + n);
    }
}

/* e^x for x up to 88; exactly 0 below -87; a NaN stays one. */
INLINE VEC NAME(exponential)(VEC x)
{
    IVEC gone = x < -87.0f;
    x = NAME(pick)(gone, SPLAT(0.0f), x);
    VEC shifted = FMA(x, SPLAT(1.44269504f), SPLAT(ROUNDER)), n = shifted - ROUNDER;
    x = FMA(n, SPLAT(-0.693359375f), x);
    x = FMA(n, SPLAT(2.12194440e-4f), x);
    VEC y = FMA(x, SPLAT(1.9875691500e-4f), SPLAT(1.3981999507e-3f));
    y = FMA(y, x, SPLAT(8.3334519073e-3f));
    y = FMA(y, x, SPLAT(4.1665795894e-2f));
    y = FMA(y, x, SPLAT(1.6666665459e-1f));
    y = FMA(y, x, SPLAT(5.0000001201e-1f));
    y = FMA(y, x * x, x + 1.0f);
    VEC power = (VEC)(((IVEC)shifted << 23) + 0x3f800000);
    return NAME(pick)(gone, SPLAT(0.0f), y * power);
}

/* Scores of `count` queries from position t become e^(score - largest), and zeros from
   the query's own position on up to `width`, in whole vectors. Stage by stage, so that
   rows do not wait for each other's sums. */
TARGET static void NAME(softmax_rows)(float *scores, ptrdiff_t row, ptrdiff_t t,
                                      ptrdiff_t count, ptrdiff_t width, float *lse,
                                      float *inverse)
{
    float largest[TILE_ROWS], sums[TILE_ROWS];
    for (ptrdiff_t i = 0; i < count; i++) {
        float *s = scores + i * row;
        VEC lanes = SPLAT(-INFINITY);
        for (ptrdiff_t j = t + i + 1; j < width; j++)
            s[j] = -INFINITY;
        for (ptrdiff_t j = 0; j < width; j += LANES) {
            VEC x = NAME(load)(s + j);
            lanes = NAME(pick)(x > lanes, x, lanes);
        }
        largest[i] = LARGEST(lanes);
    }
    for (ptrdiff_t i = 0; i < count; i++) {
        float *s = scores + i * row;
        VEC lanes = SPLAT(0.0f);
        for (ptrdiff_t j = 0; j < width; j += LANES) {
            VEC e = NAME(exponential)(NAME(load)(s + j) - largest[i]);
            lanes += e;
            NAME(store)(s + j, e);
        }
        sums[i] = TOTAL(lanes);
    }
    for (ptrdiff_t i = 0; i < count; i++) {
        inverse[i] = 1.0f / sums[i];
        lse[i] = largest[i] + logf(sums[i]);
    }
}

/* Scores become probabilities, and their gradient `d` that of the scores; both are
   zeros from `count` to `width`. */
TARGET static void NAME(softmax_row_backward)(float *s, float *d, ptrdiff_t count,
                                              ptrdiff_t width, float lse, float delta)
{
    for (ptrdiff_t j = count; j < width; j++)
        s[j] = -INFINITY, d[j] = 0.0f;
    for (ptrdiff_t j = 0; j < width; j += LANES) {
        VEC p = NAME(exponential)(NAME(load)(s + j) - lse);
        NAME(store)(s + j, p);
        NAME(store)(d + j, p * (NAME(load)(d + j) - delta));
    }
}

/* Rows of one head, turned by their angles (or back) and times `factor`, from rows
   `from_step` apart to rows `to_step` apart. */
TARGET static void NAME(turn)(const struct attention *a, const float *restrict from,
                              ptrdiff_t from_step, float *restrict to,
                              ptrdiff_t to_step, float sign, float factor)
{
    ptrdiff_t half = a->num_d / 2;
    for (ptrdiff_t t = 0; t < a->num_t; t++, from += from_step, to += to_step) {
        const float *cosines = a->cosines + t * half, *sines = a->sines + t * half;
        for (ptrdiff_t i = 0; i < half; i++) {
            float c = cosines[i] * factor, s = sines[i] * (sign * factor);
            to[i] = from[i] * c - from[half + i] * s;
            to[half + i] = from[half + i] * c + from[i] * s;
        }
    }
}

TARGET static void NAME(copy)(const struct attention *a, const float *restrict from,
                              ptrdiff_t from_step, float *restrict to,
                              ptrdiff_t to_step)
{
    for (ptrdiff_t t = 0; t < a->num_t; t++, from += from_step, to += to_step) {
        ptrdiff_t d = 0;
        for (; d + LANES <= a->num_d; d += LANES)
            NAME(store)(to + d, NAME(load)(from + d));
        for (; d < a->num_d; d++)
            to[d] = from[d];
    }
}

/* Rows (T, depth) of a room as columns (depth, T), 4 by 4, with zeros up to a whole
   vector. */
TARGET static void NAME(transpose)(const struct room *r, ptrdiff_t num_t, float *rows,
                                   float *restrict columns)
{
    ptrdiff_t depth = r->depth;
    memset(rows + num_t * depth, 0, (size_t)(-num_t & 15) * (size_t)depth * sizeof *rows);
    for (ptrdiff_t t = 0; t < num_t; t += 4)
        for (ptrdiff_t d = 0; d < depth; d += 4)
            weave_four(rows + t * depth + d, depth, columns + d * r->width + t, r->width);
}

/* The scores of a tile of queries, or their gradients: rows times transposed rows. */
INLINE void NAME(scores)(const struct room *r, const float *rows, const float *columns,
                         ptrdiff_t t, ptrdiff_t count, float *to)
{
    struct piece p = {.a = rows + t * r->depth, .a_row = r->depth, .a_k = 1,
                      .b = columns, .b_k = r->width, .c = to, .c_row = r->row,
                      .num_m = count, .num_n = up(t + count, LANES) * LANES,
                      .num_k = r->num_d};
    NAME(product)(&p);
}

TARGET static void NAME(forward)(const struct attention *a, ptrdiff_t b,
                                 ptrdiff_t shared, float *space)
{
    struct room r = room_of(a, space);
    ptrdiff_t k_step = a->num_shared * a->num_d, q_step = a->num_heads * a->num_d;
    ptrdiff_t group = a->num_heads / a->num_shared, first = b * a->num_t;
    NAME(turn)(a, a->k + first * k_step + shared * a->num_d, k_step, r.k, r.depth, 1.0f,
               1.0f);
    NAME(copy)(a, a->v + first * k_step + shared * a->num_d, k_step, r.v, r.depth);
    NAME(transpose)(&r, a->num_t, r.k, r.k_columns);
    for (ptrdiff_t head = shared * group; head < (shared + 1) * group; head++) {
        float *lse = a->lse + (b * a->num_heads + head) * a->num_t;
        NAME(turn)(a, a->q + first * q_step + head * a->num_d, q_step, r.q, r.depth,
                   1.0f, r.scale);
        for (ptrdiff_t t = 0; t < a->num_t; t += TILE_ROWS) {
            ptrdiff_t count = least(TILE_ROWS, a->num_t - t);
            float inverse[TILE_ROWS];
            NAME(scores)(&r, r.q, r.k_columns, t, count, r.scores);
            NAME(softmax_rows)(r.scores, r.row, t, count, up(t + count, LANES) * LANES,
                               lse + t, inverse);
            struct piece p = {.a = r.scores, .a_row = r.row, .a_k = 1, .b = r.v,
                              .b_k = r.depth, .c = r.dq, .c_row = r.depth,
                              .num_m = count, .num_n = r.depth, .num_k = t + count};
            NAME(product)(&p);
            float *out = a->mixed + (first + t) * q_step + head * a->num_d;
            for (ptrdiff_t i = 0; i < count; i++, out += q_step)
                for (ptrdiff_t d = 0; d < a->num_d; d++)
                    out[d] = r.dq[i * r.depth + d] * inverse[i];
        }
    }
}

/* Scores and their gradients for a block of queries, and the gradient of these. */
TARGET static void NAME(block_of_queries)(const struct room *r, ptrdiff_t t,
                                          ptrdiff_t end, const float *lse)
{
    for (ptrdiff_t i = t; i < end; i += TILE_ROWS) {
        ptrdiff_t count = least(TILE_ROWS, end - i);
        float *s = r->scores + (i - t) * r->row, *d = r->dscores + (i - t) * r->row;
        NAME(scores)(r, r->q, r->k_columns, i, count, s);
        NAME(scores)(r, r->dmixed, r->v_columns, i, count, d);
        /* Tiles of keys reach this far behind a query. */
        for (ptrdiff_t row = 0; row < count; row++)
            NAME(softmax_row_backward)(s + row * r->row, d + row * r->row, i + row + 1,
                                       up(i + row + TILE_ROWS, LANES) * LANES,
                                       lse[i + row], r->delta[i + row]);
        struct piece p = {.a = d, .a_row = r->row, .a_k = 1, .b = r->k, .b_k = r->depth,
                          .c = r->dq + i * r->depth, .c_row = r->depth, .num_m = count,
                          .num_n = r->depth, .num_k = i + count};
        NAME(product)(&p);
    }
}

/* What a block of queries adds to the gradients of the keys and values before it. */
TARGET static void NAME(block_of_keys)(const struct room *r, ptrdiff_t t, ptrdiff_t end)
{
    for (ptrdiff_t j = 0; j < end; j += TILE_ROWS) {
        ptrdiff_t from = j > t ? j : t;
        struct piece p = {.a = r->scores + (from - t) * r->row + j, .a_row = 1,
                          .a_k = r->row, .b = r->dmixed + from * r->depth,
                          .b_k = r->depth, .c = r->dv + j * r->depth, .c_row = r->depth,
                          .num_m = least(TILE_ROWS, end - j), .num_n = r->depth,
                          .num_k = end - from, .add = 1};
        NAME(product)(&p);
        p.a += r->dscores - r->scores;
        p.b = r->q + from * r->depth;
        p.c = r->dk + j * r->depth;
        NAME(product)(&p);
    }
}

TARGET static void NAME(backward)(const struct attention *a,
                                  const struct attention_gradients *g, ptrdiff_t b,
                                  ptrdiff_t shared, float *space)
{
    struct room r = room_of(a, space);
    ptrdiff_t k_step = a->num_shared * a->num_d, q_step = a->num_heads * a->num_d;
    ptrdiff_t group = a->num_heads / a->num_shared, first = b * a->num_t;
    ptrdiff_t own = first * k_step + shared * a->num_d;
    NAME(turn)(a, a->k + own, k_step, r.k, r.depth, 1.0f, 1.0f);
    NAME(copy)(a, a->v + own, k_step, r.v, r.depth);
    NAME(transpose)(&r, a->num_t, r.k, r.k_columns);
    NAME(transpose)(&r, a->num_t, r.v, r.v_columns);
    memset(r.dk, 0, (size_t)(a->num_t * r.depth) * sizeof *r.dk);
    memset(r.dv, 0, (size_t)(a->num_t * r.depth) * sizeof *r.dv);
    for (ptrdiff_t head = shared * group; head < (shared + 1) * group; head++) {
        ptrdiff_t at = first * q_step + head * a->num_d;
        NAME(turn)(a, a->q + at, q_step, r.q, r.depth, 1.0f, r.scale);
        NAME(copy)(a, g->dmixed + at, q_step, r.dmixed, r.depth);
        NAME(copy)(a, a->mixed + at, q_step, r.dq, r.depth);
        for (ptrdiff_t t = 0; t < a->num_t; t++) {
            VEC sums = SPLAT(0.0f);
            for (ptrdiff_t d = 0; d < r.depth; d += LANES)
                sums = FMA(NAME(load)(r.dmixed + t * r.depth + d),
                           NAME(load)(r.dq + t * r.depth + d), sums);
            r.delta[t] = TOTAL(sums);
        }
        for (ptrdiff_t t = 0; t < a->num_t; t += BLOCK_ROWS) {
            ptrdiff_t end = least(t + BLOCK_ROWS, a->num_t);
            NAME(block_of_queries)(&r, t, end,
                                   a->lse + (b * a->num_heads + head) * a->num_t);
            NAME(block_of_keys)(&r, t, end);
        }
        NAME(turn)(a, r.dq, r.depth, g->dq + at, q_step, -1.0f, r.scale);
    }
    NAME(turn)(a, r.dk, r.depth, g->dk + own, k_step, -1.0f, 1.0f);
    NAME(copy)(a, r.dv, r.depth, g->dv + own, k_step);
}

static const struct attention_loops NAME(attention) = {NAME(forward), NAME(backward)};

#undef PASTE_
#undef PASTE
#undef NAME
#undef INLINE
#undef START_1
#undef START_2
#undef STEP_1
#undef STEP_2
#undef PUT
#undef FINISH_1
#undef FINISH_2
#undef TILE
#undef BOTH
