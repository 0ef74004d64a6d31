/* Instances of `kernels_loops.h`: portable C, and what the compiler makes of the same
   text for AVX2 and AVX-512. */
#include "kernels_codec.h"

#include "kernels_bits.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Columns of dy that one pass quantises: TOKENS of them stay in L1. */
enum { STRIP = 4 * LEFT_ROWS };
#define ROUNDER_BITS 0x4b400000u

/* Sums of int8: compilers widen each number to int32 first. */
static int32_t sum_portable(const int8_t *q, ptrdiff_t count)
{
    int32_t sum = 0;
    for (ptrdiff_t i = 0; i < count; i++)
        sum += q[i];
    return sum;
}

/* Four rows of 32 bytes, side by side, with the bits of `offset` turned over. */
static void weave_portable(const uint8_t *rows, ptrdiff_t row_step, uint8_t offset,
                           uint8_t *tile)
{
    for (int i = 0; i < TILE_N; i++)
        for (int row = 0; row < 4; row++)
            tile[4 * i + row] = rows[row * row_step + i] ^ offset;
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) static inline void
weave_avx2(const uint8_t *rows, ptrdiff_t row_step, uint8_t offset, uint8_t *tile)
{
    const __m256i *a = (const __m256i *)rows, *b = (const __m256i *)(rows + row_step);
    const __m256i *c = (const __m256i *)(rows + 2 * row_step);
    const __m256i *d = (const __m256i *)(rows + 3 * row_step);
    __m256i turn = _mm256_set1_epi8((char)offset), *to = (__m256i *)tile;
    __m256i r0 = _mm256_xor_si256(_mm256_loadu_si256(a), turn);
    __m256i r1 = _mm256_xor_si256(_mm256_loadu_si256(b), turn);
    __m256i r2 = _mm256_xor_si256(_mm256_loadu_si256(c), turn);
    __m256i r3 = _mm256_xor_si256(_mm256_loadu_si256(d), turn);
    __m256i low = _mm256_unpacklo_epi8(r0, r1), high = _mm256_unpackhi_epi8(r0, r1);
    __m256i low2 = _mm256_unpacklo_epi8(r2, r3), high2 = _mm256_unpackhi_epi8(r2, r3);
    /* Columns 0-3 and 16-19, 4-7 and 20-23, and so on. */
    __m256i c0 = _mm256_unpacklo_epi16(low, low2), c4 = _mm256_unpackhi_epi16(low, low2);
    __m256i c8 = _mm256_unpacklo_epi16(high, high2);
    __m256i c12 = _mm256_unpackhi_epi16(high, high2);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(c0, c4, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(c8, c12, 0x20));
    _mm256_storeu_si256(to + 2, _mm256_permute2x128_si256(c0, c4, 0x31));
    _mm256_storeu_si256(to + 3, _mm256_permute2x128_si256(c8, c12, 0x31));
}

__attribute__((target("avx2"))) static inline void
weave_avx512(const uint8_t *rows, ptrdiff_t row_step, uint8_t offset, uint8_t *tile)
{
    weave_avx2(rows, row_step, offset, tile);
}

__attribute__((target("avx2"))) static int32_t sum_avx2(const int8_t *q, ptrdiff_t count)
{
    __m256i ones = _mm256_set1_epi8(1), pairs = _mm256_set1_epi16(1);
    __m256i sums = _mm256_setzero_si256();
    int32_t lanes[8];
    ptrdiff_t i = 0;
    for (; i + 32 <= count; i += 32) {
        __m256i part = _mm256_loadu_si256((const __m256i *)(q + i));
        part = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, part), pairs);
        sums = _mm256_add_epi32(sums, part);
    }
    _mm256_storeu_si256((__m256i *)lanes, sums);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] +
           lanes[7] + sum_portable(q + i, count - i);
}

__attribute__((target("avx512f,avx512bw"))) static int32_t sum_avx512(const int8_t *q,
                                                                      ptrdiff_t count)
{
    __m512i ones = _mm512_set1_epi8(1), pairs = _mm512_set1_epi16(1);
    __m512i sums = _mm512_setzero_si512();
    for (ptrdiff_t i = 0; i < count; i += 64) {
        __mmask64 mask = count - i >= 64 ? ~0ull : ~0ull >> (64 - (count - i));
        __m512i part = _mm512_maskz_loadu_epi8(mask, q + i);
        part = _mm512_madd_epi16(_mm512_maddubs_epi16(ones, part), pairs);
        sums = _mm512_add_epi32(sums, part);
    }
    return _mm512_reduce_add_epi32(sums);
}
#endif

#define LOOPS "kernels_loops.h"
#include "kernels_levels.h"
