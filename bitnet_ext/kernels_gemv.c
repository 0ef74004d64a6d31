/* Few int8 rows times a ternary weight at 2 bits a value: generation.

   One row does a multiplication for each value that it reads, so what counts is how
   few bytes a weight has and that they come in one stream. The dot product takes bytes
   of which all but two bits are cleared: they count 1, 4, 16 or 64 times, in sums of
   their own that are divided in the end. So nothing is shifted in the loop. Sums are
   exact: every variant gives the bits of the product of tiles. */
#include "kernels_gemv.h"

#include <string.h>

/* Waking a thread costs more than this many multiply-adds. */
#define MIN_PARALLEL 500000.0
/* Panels that a thread takes at a time. */
enum { ITEM_PANELS = 4, ROWS_AT_ONCE = 8 };

static ptrdiff_t up(ptrdiff_t count, ptrdiff_t step) { return (count + step - 1) / step; }

void narrow_tiles(const uint8_t *tiles, ptrdiff_t num_n, ptrdiff_t num_k,
                  uint8_t *blocks)
{
    ptrdiff_t num_k4 = up(num_k, TILE_K), all = up(num_n, BLOCK_N);
    for (ptrdiff_t group = 0; group < all; group++) {
        ptrdiff_t first = group / GROUPS * GROUPS;
        ptrdiff_t side = all - first < GROUPS ? all - first : GROUPS;
        const uint8_t *tile =
            tiles + group / 2 * num_k4 * TILE_BYTES + group % 2 * NARROW_BYTES;
        uint8_t *to = blocks + (first * up(num_k, BLOCK_K) + group - first) * NARROW_BYTES;
        for (ptrdiff_t k4 = 0; k4 < num_k4; k4++, tile += TILE_BYTES) {
            for (int i = 0; i < NARROW_BYTES; i++)
                to[i] = (uint8_t)(tile[i] << 2 * (k4 % 4) | (k4 % 4 ? to[i] : 0));
            if (k4 % 4 == 3)
                to += side * NARROW_BYTES;
        }
    }
}

static void finish(const struct narrow *p, ptrdiff_t n, const int32_t *sums)
{
    ptrdiff_t count = p->num_n - n < PANEL_N ? p->num_n - n : PANEL_N;
    for (ptrdiff_t m = 0; m < p->num_m; m++, sums += PANEL_N) {
        float scale = p->row_scale[m] * p->scale;
        float *out = p->out + m * p->num_n + n;
        for (ptrdiff_t i = 0; i < count; i++) {
            float part = (float)(sums[i] + p->start[m]) * scale;
            out[i] = p->accumulate ? out[i] + part : part;
        }
    }
}

static void narrow_item(void *context, ptrdiff_t item)
{
    const struct narrow *p = context;
    narrow_kernel *kernel = active_narrow();
    int32_t sums[ROWS_AT_ONCE * PANEL_N];
    ptrdiff_t n = item * ITEM_PANELS * PANEL_N, end = n + ITEM_PANELS * PANEL_N;
    for (; n < end && n < p->num_n; n += PANEL_N) {
        ptrdiff_t left = up(p->num_n - n, BLOCK_N);
        const uint8_t *panel = p->blocks + n / BLOCK_N * p->num_k16 * NARROW_BYTES;
        kernel(p, panel, left < GROUPS ? left : GROUPS, sums);
        finish(p, n, sums);
    }
}

int multiply_narrow(struct narrow *p, int threads)
{
    p->num_k16 = up(p->num_k, BLOCK_K);
    size_t width = (size_t)(p->num_k16 * BLOCK_K), size = width * (size_t)p->num_m;
    p->padded = take_scratch(size);
    if (!p->padded)
        return NO_MEMORY;
    int32_t start[ROWS_AT_ONCE];
    p->start = start;
    active_loops()->row_starts(p->q, p->num_m, p->num_k, p->num_k, start);
    for (ptrdiff_t m = 0; m < p->num_m; m++) {
        int8_t *row = p->padded + (size_t)m * width;
        memcpy(row, p->q + m * p->num_k, (size_t)p->num_k);
        memset(row + p->num_k, 0, width - (size_t)p->num_k);
    }
    double work = (double)p->num_m * (double)p->num_n * (double)p->num_k;
    run_parallel(narrow_item, p, up(p->num_n, ITEM_PANELS * PANEL_N),
                 work < MIN_PARALLEL ? 1 : threads);
    give_scratch(p->padded);
    return OK;
}

void narrow_portable(const struct narrow *p, const uint8_t *panel, ptrdiff_t num_groups,
                     int32_t *sums)
{
    memset(sums, 0, sizeof *sums * (size_t)(p->num_m * PANEL_N));
    for (ptrdiff_t m = 0; m < p->num_m; m++) {
        const uint8_t *block = panel;
        const int8_t *q = p->padded + m * p->num_k16 * BLOCK_K;
        for (ptrdiff_t k = 0; k < p->num_k16; k++, q += BLOCK_K)
            for (ptrdiff_t n = 0; n < num_groups * BLOCK_N; n++, block += 4)
                for (int i = 0; i < BLOCK_K; i++)
                    sums[m * PANEL_N + n] += q[i] * (block[i % 4] >> i / 4 * 2 & 3);
    }
}

#if defined(__x86_64__)
#include <immintrin.h>

static inline __attribute__((always_inline)) int32_t load_int(const int8_t *at)
{
    int32_t four;
    memcpy(&four, at, 4);
    return four;
}

/* 8 rows of the weight by one row of q; pairs of four products stay within int16. */
__attribute__((target("avx2"))) static inline __attribute__((always_inline)) __m256i
add_half(__m256i sums, const uint8_t *at, const __m256i *x)
{
    const __m256i pair = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256i w = _mm256_loadu_si256((const __m256i *)at);
    __m256i part = _mm256_maddubs_epi16(_mm256_and_si256(w, pair), x[0]);
    for (int j = 1; j < 4; j++) {
        __m256i values = _mm256_and_si256(_mm256_srli_epi16(w, 2 * j), pair);
        part = _mm256_add_epi16(part, _mm256_maddubs_epi16(values, x[j]));
    }
    return _mm256_add_epi32(sums, _mm256_madd_epi16(part, ones));
}

__attribute__((target("avx2"))) void narrow_avx2(const struct narrow *p,
                                                 const uint8_t *panel,
                                                 ptrdiff_t num_groups, int32_t *sums)
{
    for (ptrdiff_t m = 0; m < p->num_m; m++) {
        const uint8_t *block = panel;
        const int8_t *q = p->padded + m * p->num_k16 * BLOCK_K;
        __m256i total[2 * GROUPS];
        for (int i = 0; i < 2 * GROUPS; i++)
            total[i] = _mm256_setzero_si256();
        for (ptrdiff_t k = 0; k < p->num_k16; k++, q += BLOCK_K) {
            __m256i x[4];
            for (int j = 0; j < 4; j++)
                x[j] = _mm256_set1_epi32(load_int(q + 4 * j));
            for (ptrdiff_t i = 0; i < 2 * num_groups; i++, block += 32)
                total[i] = add_half(total[i], block, x);
        }
        for (int i = 0; i < 2 * GROUPS; i++)
            _mm256_storeu_si256((__m256i *)(sums + m * PANEL_N + 8 * i), total[i]);
    }
}

#define TARGET_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

/* Bytes that are asked for before they are read: a weight often comes from memory. */
enum { AHEAD = 8192 };

/* Four units, each one row of q by one block: rows u / wide, blocks u % wide. Named
   variables and assembly for the reasons of `kernels_gemm.c`. */
#define UNITS(DO) DO(0) DO(1) DO(2) DO(3)
#define START(u)                                                                       \
    __m512i a##u = _mm512_setzero_si512(), b##u = a##u, c##u = a##u, d##u = a##u;
#define DOT(sum, w, x) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x))
#define STEP(u)                                                                        \
    {                                                                                  \
        __m512i w = _mm512_loadu_si512(block + u % wide * NARROW_BYTES);               \
        const int8_t *x = q + u / wide * row_bytes;                                    \
        if (u < wide)                                                                  \
            __builtin_prefetch(block + u * NARROW_BYTES + AHEAD);                      \
        DOT(a##u, _mm512_and_si512(w, ones), _mm512_set1_epi32(load_int(x)));          \
        DOT(b##u, _mm512_and_si512(w, fours), _mm512_set1_epi32(load_int(x + 4)));     \
        DOT(c##u, _mm512_and_si512(w, sixteens), _mm512_set1_epi32(load_int(x + 8)));  \
        DOT(d##u, _mm512_and_si512(w, rest), _mm512_set1_epi32(load_int(x + 12)));     \
    }
#define FINISH(u)                                                                      \
    a##u = _mm512_add_epi32(a##u, _mm512_srai_epi32(b##u, 2));                         \
    c##u = _mm512_add_epi32(_mm512_srai_epi32(c##u, 4), _mm512_srai_epi32(d##u, 6));   \
    _mm512_storeu_si512(sums + u / wide * PANEL_N + u % wide * BLOCK_N,                \
                        _mm512_add_epi32(a##u, c##u));

TARGET_512 static inline __attribute__((always_inline)) void
four_units(const int wide, const int8_t *q, ptrdiff_t row_bytes, const uint8_t *block,
           ptrdiff_t step, int32_t *sums)
{
    const __m512i ones = _mm512_set1_epi8(0x03), fours = _mm512_set1_epi8(0x0c);
    const __m512i sixteens = _mm512_set1_epi8(0x30), rest = _mm512_set1_epi8((char)0xc0);
    const int8_t *end = q + row_bytes;
    UNITS(START)
    for (; q < end; q += BLOCK_K, block += step) {
        UNITS(STEP)
    }
    UNITS(FINISH)
}

/* One row by what is left of a panel, or a row that is left by one block. */
TARGET_512 static void one_unit(const int8_t *q, ptrdiff_t row_bytes,
                                const uint8_t *block, ptrdiff_t step, int32_t *sums)
{
    const int wide = 1;
    const __m512i ones = _mm512_set1_epi8(0x03), fours = _mm512_set1_epi8(0x0c);
    const __m512i sixteens = _mm512_set1_epi8(0x30), rest = _mm512_set1_epi8((char)0xc0);
    const int8_t *end = q + row_bytes;
    START(0)
    for (; q < end; q += BLOCK_K, block += step)
        STEP(0)
    FINISH(0)
}

TARGET_512 void narrow_avx512vnni(const struct narrow *p, const uint8_t *panel,
                                  ptrdiff_t num_groups, int32_t *sums)
{
    ptrdiff_t row_bytes = p->num_k16 * BLOCK_K, step = num_groups * NARROW_BYTES;
    const int8_t *q = p->padded;
    ptrdiff_t m = 0;
    for (; m + 4 <= p->num_m; m += 4, q += 4 * row_bytes, sums += 4 * PANEL_N)
        for (ptrdiff_t g = 0; g < num_groups; g++)
            four_units(1, q, row_bytes, panel + g * NARROW_BYTES, step,
                       sums + g * BLOCK_N);
    for (; m + 2 <= p->num_m && num_groups == GROUPS; m += 2) {
        four_units(2, q, row_bytes, panel, step, sums);
        four_units(2, q, row_bytes, panel + 2 * NARROW_BYTES, step, sums + 2 * BLOCK_N);
        q += 2 * row_bytes, sums += 2 * PANEL_N;
    }
    for (; m < p->num_m; m++, q += row_bytes, sums += PANEL_N) {
        if (num_groups == GROUPS)
            four_units(4, q, row_bytes, panel, step, sums);
        for (ptrdiff_t g = 0; g < num_groups && num_groups < GROUPS; g++)
            one_unit(q, row_bytes, panel + g * NARROW_BYTES, step, sums + g * BLOCK_N);
    }
}
#endif
