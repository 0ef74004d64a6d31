/* int8 rows times tiles of bytes: int32 inside a group, then float32 over groups.

   Weights are the bytes 0, 1, 2, so each sum starts at minus the row's own sum. A
   weight gradient has int8 plus 128 there, and starts at minus 128 sums. A group's sum
   is exact; groups are added in order, and nothing is fused: every variant gives the
   same bits.

   A tile kernel computes a few rows by one panel of 32 columns. Its accumulators are
   named variables and its dot product is one line of assembly, because compilers
   keep arrays of vectors on the stack and copy registers around the intrinsic. */
#include "kernels_core.h"

#include <string.h>

/* Writes `rows` rows from row `m` of a panel to `out`, rows `step` numbers apart. */
struct tile_kernel {
    ptrdiff_t rows;
    void (*run)(const struct product *p, ptrdiff_t m, ptrdiff_t panel, float *out,
                ptrdiff_t step);
};

enum { MOST_ROWS = 12 };

/* The part of a product that one pass over a tile works on: one group. */
struct pass {
    const int8_t *q; /* first row, first column of the group */
    const uint8_t *tile;
    ptrdiff_t row_bytes, k4_bytes, num_k4;
    const float *row_scale; /* of the first row; rows are num_groups apart */
    const int32_t *row_start;
    int add;
};

static inline __attribute__((always_inline)) struct pass
pass_of(const struct product *p, ptrdiff_t m, ptrdiff_t panel, ptrdiff_t g)
{
    ptrdiff_t k4 = g * p->group_k4, left = p->num_k4 - k4;
    ptrdiff_t block = m / LEFT_ROWS * p->num_k4 + k4;
    struct pass pass = {
        .q = p->in_blocks ? p->q + block * LEFT_BYTES + m % LEFT_ROWS * TILE_K
                          : p->q + (m * p->num_k4 + k4) * TILE_K,
        .tile = p->tiles + (panel * p->num_k4 + k4) * TILE_BYTES,
        .row_bytes = p->in_blocks ? TILE_K : p->num_k4 * TILE_K,
        .k4_bytes = p->in_blocks ? LEFT_BYTES : TILE_K,
        .num_k4 = left < p->group_k4 ? left : p->group_k4,
        .row_scale = p->row_scale + m * p->num_groups + g,
        .row_start = p->row_start + m * p->num_groups + g,
        .add = g > 0 || p->accumulate,
    };
    return pass;
}

/* Runs a kernel on a panel that is narrower than its tile. */
static void run_edge(const struct product *p, ptrdiff_t m, ptrdiff_t panel, float *out,
                     const struct tile_kernel *kernel)
{
    float edge[MOST_ROWS * TILE_N] = {0};
    size_t size = (size_t)(p->num_n - panel * TILE_N) * sizeof *edge;
    for (ptrdiff_t row = 0; p->accumulate && row < kernel->rows; row++)
        memcpy(edge + row * TILE_N, out + row * p->num_n, size);
    kernel->run(p, m, panel, edge, TILE_N);
    for (ptrdiff_t row = 0; row < kernel->rows; row++)
        memcpy(out + row * p->num_n, edge + row * TILE_N, size);
}

/* Runs tile kernels over a block of rows; `kernels` go from most rows to one. The most
   divide LEFT_ROWS, so no kernel reaches over the end of a block. */
static void sweep(const struct product *p, ptrdiff_t m, ptrdiff_t num_m, ptrdiff_t panel,
                  const struct tile_kernel *kernels)
{
    ptrdiff_t end = m + num_m;
    int is_edge = p->num_n - panel * TILE_N < TILE_N;
    while (m < end) {
        while (kernels->rows > end - m)
            kernels++;
        float *out = p->out + m * p->num_n + panel * TILE_N;
        if (is_edge)
            run_edge(p, m, panel, out, kernels);
        else
            kernels->run(p, m, panel, out, p->num_n);
        m += kernels->rows;
    }
}

#define PANELS(name, ...)                                                              \
    void panels_##name(const struct product *p, ptrdiff_t m, ptrdiff_t num_m,          \
                       ptrdiff_t first, ptrdiff_t end)                                 \
    {                                                                                  \
        static const struct tile_kernel kernels[] = {__VA_ARGS__};                     \
        for (ptrdiff_t panel = first; panel < end; panel++)                            \
            sweep(p, m, num_m, panel, kernels);                                        \
    }

static void tile_portable(const struct product *p, ptrdiff_t m, ptrdiff_t panel,
                          float *out, ptrdiff_t step)
{
    (void)step;
    for (ptrdiff_t g = 0; g < p->num_groups; g++) {
        struct pass pass = pass_of(p, m, panel, g);
        int32_t sums[TILE_N];
        for (int n = 0; n < TILE_N; n++)
            sums[n] = *pass.row_start;
        for (ptrdiff_t k4 = 0; k4 < pass.num_k4; k4++) {
            const int8_t *q = pass.q + k4 * pass.k4_bytes;
            const uint8_t *w = pass.tile + k4 * TILE_BYTES;
            for (int n = 0; n < TILE_N; n++, w += TILE_K)
                sums[n] += q[0] * w[0] + q[1] * w[1] + q[2] * w[2] + q[3] * w[3];
        }
        for (int n = 0; n < TILE_N; n++) {
            float part = (float)sums[n] * (*pass.row_scale * p->scale);
            out[n] = pass.add ? out[n] + part : part;
        }
    }
}

PANELS(portable, {1, tile_portable})

#if defined(__x86_64__)
#include <immintrin.h>

#define ROWS_1(DO) DO(0)
#define ROWS_2(DO) ROWS_1(DO) DO(1)
#define ROWS_4(DO) ROWS_2(DO) DO(2) DO(3)
#define ROWS_6(DO) ROWS_4(DO) DO(4) DO(5)
#define ROWS_8(DO) ROWS_6(DO) DO(6) DO(7)
#define ROWS_12(DO) ROWS_8(DO) DO(8) DO(9) DO(10) DO(11)

/* Rows as a base and a small multiple of `step`, which an address can hold. */
#define Q_0 (q0)
#define Q_1 (q0 + step)
#define Q_2 (q0 + 2 * step)
#define Q_3 (q0 + step3)
#define Q_4 (q4)
#define Q_5 (q4 + step)
#define Q_6 (q4 + 2 * step)
#define Q_7 (q4 + step3)
#define Q_8 (q8)
#define Q_9 (q8 + step)
#define Q_10 (q8 + 2 * step)
#define Q_11 (q8 + step3)
#define POINT_AT_ROWS(pass)                                                            \
    ptrdiff_t step = (pass).row_bytes, step3 = 3 * step, next = (pass).k4_bytes;       \
    const int8_t *q0 = (pass).q, *q4 = q0 + 4 * step, *q8 = q4 + 4 * step;             \
    (void)step3, (void)q4, (void)q8

static inline __attribute__((always_inline)) int32_t load_int(const int8_t *at)
{
    int32_t four;
    memcpy(&four, at, 4);
    return four;
}

#define TARGET_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prfchw")))
#define TARGET_256 __attribute__((target("avx2,prfchw")))

TARGET_512 static inline __attribute__((always_inline)) void
finish_512(int add, float scale, __m512i sums, float *out)
{
    __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(scale));
    _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), part) : part);
}

TARGET_256 static inline __attribute__((always_inline)) void
finish_256(int add, float scale, __m256i sums, float *out)
{
    __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(scale));
    _mm256_storeu_ps(out, add ? _mm256_add_ps(_mm256_loadu_ps(out), part) : part);
}

/* What a tile kernel brings to L2 while it works: its share of the next panel, so that
   the kernels of a panel's first rows need not wait for it. */
#define AHEAD(rows) ((TILE_BYTES * rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS)
static inline __attribute__((always_inline)) const char *
share_of_next(const struct product *p, ptrdiff_t m, ptrdiff_t panel)
{
    ptrdiff_t bytes = p->num_k4 * TILE_BYTES;
    return (const char *)p->tiles + (panel + 1) * bytes + m % PRODUCT_ROWS * bytes / PRODUCT_ROWS;
}

/* AVX-512 VNNI: rows by 32 columns, two accumulators a row. */
#define START_512(i)                                                                   \
    __m512i a##i = _mm512_set1_epi32(pass.row_start[i * p->num_groups]), b##i = a##i;
#define STEP_512(i)                                                                    \
    {                                                                                  \
        __m512i four = _mm512_set1_epi32(load_int(Q_##i));                             \
        __asm__("vpdpbusd %2, %1, %0" : "+v"(a##i) : "v"(w0), "v"(four));              \
        __asm__("vpdpbusd %2, %1, %0" : "+v"(b##i) : "v"(w1), "v"(four));              \
    }
#define FINISH_512(add, i)                                                             \
    {                                                                                  \
        float scale = pass.row_scale[i * p->num_groups] * p->scale;                    \
        finish_512(add, scale, a##i, out + i * out_step);                              \
        finish_512(add, scale, b##i, out + i * out_step + 16);                         \
    }
#define STORE_512(i) FINISH_512(0, i)
#define ADD_512(i) FINISH_512(1, i)
/* Else the stores wait for the lines that they overwrite. */
#define FETCH(i)                                                                       \
    __builtin_prefetch(out + i * out_step, 1);                                         \
    __builtin_prefetch(out + i * out_step + 16, 1);
#define TILE_512(rows)                                                                 \
    TARGET_512 static void tile_512_##rows(const struct product *p, ptrdiff_t m,       \
                                           ptrdiff_t panel, float *out,                \
                                           ptrdiff_t out_step)                         \
    {                                                                                  \
        const char *ahead = share_of_next(p, m, panel);                                \
        ROWS_##rows(FETCH)                                                             \
        for (ptrdiff_t g = 0; g < p->num_groups; g++) {                                \
            struct pass pass = pass_of(p, m, panel, g);                                \
            POINT_AT_ROWS(pass);                                                       \
            const uint8_t *w = pass.tile, *w_end = w + pass.num_k4 * TILE_BYTES;       \
            ROWS_##rows(START_512)                                                     \
            for (; w < w_end; w += TILE_BYTES, q0 += next, q4 += next, q8 += next) {            \
                __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);   \
                _mm_prefetch(ahead, _MM_HINT_T1);                                      \
                ahead += AHEAD(rows);                                                  \
                ROWS_##rows(STEP_512)                                                  \
            }                                                                          \
            if (pass.add) {                                                            \
                ROWS_##rows(ADD_512)                                                   \
            } else {                                                                   \
                ROWS_##rows(STORE_512)                                                 \
            }                                                                          \
        }                                                                              \
    }
TILE_512(12)
TILE_512(8)
TILE_512(4)
TILE_512(2)
TILE_512(1)
PANELS(avx512vnni, {12, tile_512_12}, {8, tile_512_8}, {4, tile_512_4}, {2, tile_512_2},
       {1, tile_512_1})

/* 256 bits: rows by 16 columns, so two halves of a panel, one after the other. */
#define START_256(i)                                                                   \
    __m256i a##i = _mm256_set1_epi32(pass.row_start[i * p->num_groups]), b##i = a##i;
#define FINISH_256(i)                                                                  \
    {                                                                                  \
        float scale = pass.row_scale[i * p->num_groups] * p->scale;                    \
        finish_256(pass.add, scale, a##i, to + i * out_step);                          \
        finish_256(pass.add, scale, b##i, to + i * out_step + 8);                      \
    }
#define TILE_256(level, target, rows, SUM)                                             \
    target static void tile_##level##_##rows(const struct product *p, ptrdiff_t m,     \
                                             ptrdiff_t panel, float *out,              \
                                             ptrdiff_t out_step)                       \
    {                                                                                  \
        for (int half = 0; half < 2; half++)                                           \
            for (ptrdiff_t g = 0; g < p->num_groups; g++) {                            \
                struct pass pass = pass_of(p, m, panel, g);                            \
                POINT_AT_ROWS(pass);                                                   \
                float *to = out + 16 * half;                                           \
                const uint8_t *w = pass.tile + 64 * half;                              \
                const uint8_t *w_end = w + pass.num_k4 * TILE_BYTES;                   \
                ROWS_##rows(START_256)                                                 \
                SUM(rows)                                                              \
                ROWS_##rows(FINISH_256)                                                \
            }                                                                          \
    }
#define WALK(rows, end, STEP)                                                          \
    for (; w < end; w += TILE_BYTES, q0 += next, q4 += next, q8 += next) {                      \
        __m256i w0 = _mm256_loadu_si256((const __m256i *)w);                           \
        __m256i w1 = _mm256_loadu_si256((const __m256i *)(w + 32));                    \
        ROWS_##rows(STEP)                                                              \
    }

/* One line of assembly, else compilers copy the sums around, and spill them. */
#define ADD_IN_PLACE(name, sum, part) __asm__(name " %1, %0, %0" : "+x"(sum) : "x"(part))

/* AVX2: sums of pairs stay within int16 for 64 steps: 64 * 2 * 2 * -128 = -32768. */
#define START_SHORT(i) __m256i c##i = _mm256_setzero_si256(), d##i = c##i;
#define STEP_SHORT(i)                                                                  \
    {                                                                                  \
        __m256i four = _mm256_set1_epi32(load_int(Q_##i));                             \
        ADD_IN_PLACE("vpaddw", c##i, _mm256_maddubs_epi16(w0, four));                  \
        ADD_IN_PLACE("vpaddw", d##i, _mm256_maddubs_epi16(w1, four));                  \
    }
#define WIDEN_SHORT(i)                                                                 \
    a##i = _mm256_add_epi32(a##i, _mm256_madd_epi16(c##i, ones));                      \
    b##i = _mm256_add_epi32(b##i, _mm256_madd_epi16(d##i, ones));
#define SUM_AVX2(rows)                                                                 \
    const __m256i ones = _mm256_set1_epi16(1);                                         \
    while (w < w_end) {                                                                \
        const uint8_t *stop = w_end - w > 64 * TILE_BYTES ? w + 64 * TILE_BYTES : w_end; \
        ROWS_##rows(START_SHORT)                                                       \
        WALK(rows, stop, STEP_SHORT)                                                   \
        ROWS_##rows(WIDEN_SHORT)                                                       \
    }
TILE_256(avx2, TARGET_256, 6, SUM_AVX2)
TILE_256(avx2, TARGET_256, 4, SUM_AVX2)
TILE_256(avx2, TARGET_256, 2, SUM_AVX2)
TILE_256(avx2, TARGET_256, 1, SUM_AVX2)
PANELS(avx2, {6, tile_avx2_6}, {4, tile_avx2_4}, {2, tile_avx2_2}, {1, tile_avx2_1})

/* AVX2 and any byte: as signed values, size times sign keeps pairs within int16:
   2 * 128 * 127 = 32512, because no left operand holds -128 here. */
#define STEP_SIGNED(i)                                                                 \
    {                                                                                  \
        __m256i four = _mm256_set1_epi32(load_int(Q_##i));                             \
        __m256i pair = _mm256_maddubs_epi16(size0, _mm256_sign_epi8(four, s0));        \
        ADD_IN_PLACE("vpaddd", a##i, _mm256_madd_epi16(pair, ones));                   \
        pair = _mm256_maddubs_epi16(size1, _mm256_sign_epi8(four, s1));                \
        ADD_IN_PLACE("vpaddd", b##i, _mm256_madd_epi16(pair, ones));                   \
    }
#define ZERO_SUM(i) a##i = b##i = _mm256_setzero_si256();
#define SUM_AVX2_ANY(rows)                                                             \
    const __m256i ones = _mm256_set1_epi16(1), top = _mm256_set1_epi8(-128);           \
    ROWS_##rows(ZERO_SUM)                                                              \
    for (; w < w_end; w += TILE_BYTES, q0 += next, q4 += next, q8 += next) {           \
        __m256i s0 = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)w), top);    \
        __m256i s1 = _mm256_loadu_si256((const __m256i *)(w + 32));                    \
        s1 = _mm256_xor_si256(s1, top);                                                \
        __m256i size0 = _mm256_abs_epi8(s0), size1 = _mm256_abs_epi8(s1);              \
        ROWS_##rows(STEP_SIGNED)                                                       \
    }
TILE_256(avx2_any, TARGET_256, 2, SUM_AVX2_ANY)
TILE_256(avx2_any, TARGET_256, 1, SUM_AVX2_ANY)
TILE_256(avx2_any, TARGET_256, 4, SUM_AVX2_ANY)
PANELS(avx2_any, {4, tile_avx2_any_4}, {2, tile_avx2_any_2}, {1, tile_avx2_any_1})

/* Where no left operand is below zero, it may be the unsigned one, and needs no sign. */
#define STEP_POSITIVE(i)                                                               \
    {                                                                                  \
        __m256i four = _mm256_set1_epi32(load_int(Q_##i));                             \
        __m256i pair = _mm256_maddubs_epi16(four, s0);                                 \
        ADD_IN_PLACE("vpaddd", a##i, _mm256_madd_epi16(pair, ones));                   \
        pair = _mm256_maddubs_epi16(four, s1);                                         \
        ADD_IN_PLACE("vpaddd", b##i, _mm256_madd_epi16(pair, ones));                   \
    }
#define SUM_AVX2_POSITIVE(rows)                                                        \
    const __m256i ones = _mm256_set1_epi16(1), top = _mm256_set1_epi8(-128);           \
    ROWS_##rows(ZERO_SUM)                                                              \
    for (; w < w_end; w += TILE_BYTES, q0 += next, q4 += next, q8 += next) {           \
        __m256i s0 = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)w), top);    \
        __m256i s1 = _mm256_loadu_si256((const __m256i *)(w + 32));                    \
        s1 = _mm256_xor_si256(s1, top);                                                \
        ROWS_##rows(STEP_POSITIVE)                                                     \
    }
TILE_256(avx2_positive, TARGET_256, 4, SUM_AVX2_POSITIVE)
TILE_256(avx2_positive, TARGET_256, 2, SUM_AVX2_POSITIVE)
TILE_256(avx2_positive, TARGET_256, 1, SUM_AVX2_POSITIVE)
PANELS(avx2_positive, {4, tile_avx2_positive_4}, {2, tile_avx2_positive_2},
       {1, tile_avx2_positive_1})

#define STEP_VNNI(i)                                                                   \
    {                                                                                  \
        __m256i four = _mm256_set1_epi32(load_int(Q_##i));                             \
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(a##i) : "x"(w0), "x"(four));        \
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(b##i) : "x"(w1), "x"(four));        \
    }
#define SUM_AVXVNNI(rows) WALK(rows, w_end, STEP_VNNI)
TILE_256(avxvnni, TARGET_256, 6, SUM_AVXVNNI)
TILE_256(avxvnni, TARGET_256, 4, SUM_AVXVNNI)
TILE_256(avxvnni, TARGET_256, 2, SUM_AVXVNNI)
TILE_256(avxvnni, TARGET_256, 1, SUM_AVXVNNI)
PANELS(avxvnni, {6, tile_avxvnni_6}, {4, tile_avxvnni_4}, {2, tile_avxvnni_2},
       {1, tile_avxvnni_1})
#endif
