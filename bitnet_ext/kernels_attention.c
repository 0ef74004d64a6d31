/* Instances of `kernels_attention_loops.h`, and the walk over heads on several threads. */
#include "kernels_attention.h"

#include <math.h>
#include <string.h>

/* Adding 1.5 * 2^23 leaves the nearest integer in the low bits. */
#define ROUNDER 12582912.0f
/* Queries, or keys, of one tile; queries whose scores are held at once. */
enum { TILE_ROWS = 12, BLOCK_ROWS = 4 * TILE_ROWS };
/* Floats of the longest vector. */
enum { MOST_LANES = 16 };

static ptrdiff_t up(ptrdiff_t count, ptrdiff_t step) { return (count + step - 1) / step; }

static ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* One product: C (num_m, num_n) (+)= A (num_m, num_k) times B (num_k, num_n). */
struct piece {
    const float *a, *b;
    float *c;
    ptrdiff_t a_row, a_k, b_k, c_row, num_m, num_n, num_k;
    int add;
};

typedef void tile(const struct piece *p, const float *a, const float *w, float *c);

struct tiles {
    ptrdiff_t rows;
    tile *narrow, *wide;
};

/* The memory of one item: matrices (T, depth) of one head, their transposes (depth,
   width), and scores in rows of `row` numbers. Columns past D hold zeros. */
struct room {
    float *q, *k, *v, *dmixed, *dq, *dk, *dv, *k_columns, *v_columns;
    float *scores, *dscores, *delta;
    ptrdiff_t num_d, depth, width, row;
    float scale;
};

/* Numbers of a room. */
static size_t room_size(const struct attention *a)
{
    ptrdiff_t depth = up(a->num_d, MOST_LANES) * MOST_LANES;
    ptrdiff_t width = up(a->num_t + TILE_ROWS, MOST_LANES) * MOST_LANES;
    return (size_t)(9 * depth * width + 2 * BLOCK_ROWS * (width + MOST_LANES) + width);
}

static struct room room_of(const struct attention *a, float *space)
{
    struct room r = {.num_d = a->num_d, .scale = 1.0f / sqrtf((float)a->num_d)};
    r.depth = up(a->num_d, MOST_LANES) * MOST_LANES;
    r.width = up(a->num_t + TILE_ROWS, MOST_LANES) * MOST_LANES;
    r.row = r.width + MOST_LANES;
    float **parts[] = {&r.q,  &r.k,  &r.v,         &r.dmixed,   &r.dq,
                       &r.dk, &r.dv, &r.k_columns, &r.v_columns};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++, space += r.depth * r.width)
        *parts[i] = space;
    r.scores = space;
    r.dscores = r.scores + BLOCK_ROWS * r.row;
    r.delta = r.dscores + BLOCK_ROWS * r.row;
    return r;
}

/* Rows as a base and a small multiple of `step`, which an address can hold. */
#define A_0 (a0)
#define A_1 (a0 + step)
#define A_2 (a0 + 2 * step)
#define A_3 (a0 + step3)
#define A_4 (a4)
#define A_5 (a4 + step)
#define A_6 (a4 + 2 * step)
#define A_7 (a4 + step3)
#define A_8 (a8)
#define A_9 (a8 + step)
#define A_10 (a8 + 2 * step)
#define A_11 (a8 + step3)
#define ROWS_1(DO) DO(0)
#define ROWS_2(DO) ROWS_1(DO) DO(1)
#define ROWS_4(DO) ROWS_2(DO) DO(2) DO(3)
#define ROWS_6(DO) ROWS_4(DO) DO(4) DO(5)
#define ROWS_8(DO) ROWS_6(DO) DO(6) DO(7)
#define ROWS_12(DO) ROWS_8(DO) DO(8) DO(9) DO(10) DO(11)

typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

/* Four rows of four numbers as four columns. */
static inline __attribute__((always_inline)) void
weave_four(const float *rows, ptrdiff_t row_step, float *columns, ptrdiff_t column_step)
{
    v4 a, b, c, d;
    memcpy(&a, rows, 16);
    memcpy(&b, rows + row_step, 16);
    memcpy(&c, rows + 2 * row_step, 16);
    memcpy(&d, rows + 3 * row_step, 16);
    v4 ab = __builtin_shuffle(a, b, (i4){0, 4, 1, 5});
    v4 ab2 = __builtin_shuffle(a, b, (i4){2, 6, 3, 7});
    v4 cd = __builtin_shuffle(c, d, (i4){0, 4, 1, 5});
    v4 cd2 = __builtin_shuffle(c, d, (i4){2, 6, 3, 7});
    a = __builtin_shuffle(ab, cd, (i4){0, 1, 4, 5});
    b = __builtin_shuffle(ab, cd, (i4){2, 3, 6, 7});
    c = __builtin_shuffle(ab2, cd2, (i4){0, 1, 4, 5});
    d = __builtin_shuffle(ab2, cd2, (i4){2, 3, 6, 7});
    memcpy(columns, &a, 16);
    memcpy(columns + column_step, &b, 16);
    memcpy(columns + 2 * column_step, &c, 16);
    memcpy(columns + 3 * column_step, &d, 16);
}

/* Halves folded onto each other: 4 lanes, or 8, or 16. */
static inline __attribute__((always_inline)) float total_4(v4 x)
{
    return (x[0] + x[2]) + (x[1] + x[3]);
}

static inline __attribute__((always_inline)) float more(float a, float b)
{
    return a > b ? a : b;
}

static inline __attribute__((always_inline)) float largest_4(v4 x)
{
    return more(more(x[0], x[2]), more(x[1], x[3]));
}

#define TARGET
#define LEVEL portable
#define VEC v4
#define IVEC i4
#define LANES 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define SPLAT(x) ((v4){(x), (x), (x), (x)})
#define TOTAL(x) total_4(x)
#define LARGEST(x) largest_4(x)
#define SIZES(DO) DO(4) DO(2) DO(1)
#include "kernels_attention_loops.h"
#undef TARGET
#undef LEVEL
#undef VEC
#undef IVEC
#undef LANES
#undef FMA
#undef SPLAT
#undef TOTAL
#undef LARGEST
#undef SIZES

#if defined(__x86_64__)
#include <immintrin.h>

typedef int32_t i8 __attribute__((vector_size(32)));
#define TARGET __attribute__((target("avx2,fma")))
#define LEVEL avx2
#define VEC __m256
#define IVEC i8
#define LANES 8
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SPLAT(x) _mm256_set1_ps(x)
#define TOTAL(x)                                                                        \
    total_4((v4)_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)))
#define LARGEST(x)                                                                      \
    largest_4((v4)_mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)))
#define SIZES(DO) DO(6) DO(4) DO(2) DO(1)
#include "kernels_attention_loops.h"
#undef TARGET
#undef LEVEL
#undef VEC
#undef IVEC
#undef LANES
#undef FMA
#undef SPLAT
#undef TOTAL
#undef LARGEST
#undef SIZES

typedef int32_t i16 __attribute__((vector_size(64)));
#define TARGET                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define LEVEL avx512
#define VEC __m512
#define IVEC i16
#define LANES 16
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SPLAT(x) _mm512_set1_ps(x)
#define TOTAL(x) _mm512_reduce_add_ps(x)
#define LARGEST(x) _mm512_reduce_max_ps(x)
#define SIZES(DO) DO(12) DO(8) DO(4) DO(2) DO(1)
#include "kernels_attention_loops.h"
#endif

static const struct attention_loops *active_attention(void)
{
#if defined(__x86_64__)
    if (active_loops() == &loops_avx512)
        return &attention_avx512;
    if (active_loops() == &loops_avx2 && __builtin_cpu_supports("fma"))
        return &attention_avx2;
#endif
    return &attention_portable;
}

struct attention_job {
    const struct attention *attention;
    const struct attention_gradients *gradients; /* NULL: forward */
    const struct attention_loops *loops;
    int failed;
};

static void attention_item(void *context, ptrdiff_t item)
{
    struct attention_job *job = context;
    const struct attention *a = job->attention;
    ptrdiff_t b = item / a->num_shared, shared = item % a->num_shared;
    float *space = take_scratch(room_size(a) * sizeof *space);
    if (!space) {
        __atomic_store_n(&job->failed, NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    if (a->num_d % MOST_LANES)
        memset(space, 0, room_size(a) * sizeof *space);
    if (job->gradients)
        job->loops->backward(a, job->gradients, b, shared, space);
    else
        job->loops->forward(a, b, shared, space);
    give_scratch(space);
}

static int run_attention(const struct attention *a, const struct attention_gradients *g,
                         int threads)
{
    struct attention_job job = {a, g, active_attention(), OK};
    run_parallel(attention_item, &job, a->num_b * a->num_shared, threads);
    return job.failed;
}

int attend(const struct attention *a, int threads) { return run_attention(a, NULL, threads); }

int attend_backward(const struct attention *a, const struct attention_gradients *g,
                    int threads)
{
    return run_attention(a, g, threads);
}
