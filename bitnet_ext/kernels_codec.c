/* Instances of `kernels_codec_loops.h` and `kernels_pack_loops.h`: portable C, and the
   same text for AVX2 and AVX-512 with the parts that compilers do not find. */
#include "kernels_codec.h"

#include "kernels_bits.h"

#include <float.h>
#include <math.h>

/* 2^100: 127 of it are far from overflow, and no training makes it. */
#define MAX_SCALE 0x1p100f
/* A ratio that is nearer to its integer rounds as the quotient does. */
#define SURE_BELOW 0.49996f
/* Bytes: far enough to hide memory, near enough to stay in the caches. */
enum { FETCH_AHEAD = 4096 };
/* Sums have so many lanes, and so the same bits, on every machine. */
enum { LANES = 16 };

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)

static inline __attribute__((always_inline)) uint16_t fp16_of(float x)
{
    int32_t bits = bits_of(x), size = bits & SIZE_MASK;
    /* Below 2^-14: a sum with 0.5 rounds at the last place of a subnormal. */
    int32_t small = bits_of(float_of(size) + 0.5f) - 0x3f000000;
    int32_t plain = (int32_t)((uint32_t)(size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
    int32_t large = size > INFINITE ? 0x7e00 | (size >> 13 & 0x3ff) : 0x7c00;
    int32_t half = size < 0x38800000 ? small : size < 0x47800000 ? plain : large;
    return (uint16_t)(half | (bits >> 16 & 0x8000));
}

static inline __attribute__((always_inline)) float float_of_fp16(uint16_t x)
{
    int32_t size = (x & 0x7fff) << 13, sign = (int32_t)((uint32_t)(x & 0x8000) << 16);
    int32_t plain = size + 0x38000000;
    int32_t small = bits_of(float_of(size + 0x38800000) - 0x1p-14f);
    int32_t quiet = size > 0x0f800000 ? 0x00400000 : 0;
    int32_t large = (size + 0x70000000) | quiet;
    int32_t bits = size < 0x00800000 ? small : size < 0x0f800000 ? plain : large;
    return float_of(bits | sign);
}

#define FP16_PARTS                                                                     \
    TARGET static inline __attribute__((always_inline)) int32_t NAME(to_fp16_part)(    \
        const float *x, ptrdiff_t count, uint16_t *out)                                \
    {                                                                                  \
        int32_t largest = 0;                                                           \
        ptrdiff_t i = 0;                                                               \
        TO_FP16_WIDE                                                                   \
        for (; i < count; i++) {                                                       \
            int32_t size = bits_of(x[i]) & SIZE_MASK;                                  \
            largest = size > largest ? size : largest;                                 \
            out[i] = fp16_of(x[i]);                                                    \
        }                                                                              \
        return largest;                                                                \
    }                                                                                  \
    TARGET static inline __attribute__((always_inline)) int32_t NAME(from_fp16_part)(  \
        const uint16_t *x, ptrdiff_t count, float *out)                                \
    {                                                                                  \
        int32_t largest = 0;                                                           \
        ptrdiff_t i = 0;                                                               \
        FROM_FP16_WIDE                                                                 \
        for (; i < count; i++) {                                                       \
            out[i] = float_of_fp16(x[i]);                                              \
            int32_t size = bits_of(out[i]) & SIZE_MASK;                                \
            largest = size > largest ? size : largest;                                 \
        }                                                                              \
        return largest;                                                                \
    }

#define TARGET
#define LEVEL portable
static void stream_portable(uint8_t *to, const uint8_t *from, size_t lines)
{
    memcpy(to, from, 64 * lines);
}
static void stream_end_portable(void) {}
#define TO_FP16_WIDE
#define FROM_FP16_WIDE
#include "kernels_sink.h"
FP16_PARTS
#include "kernels_codec_loops.h"
#include "kernels_pack_loops.h"
#include "kernels_outer_loops.h"
#undef TO_FP16_WIDE
#undef FROM_FP16_WIDE
#undef TARGET
#undef LEVEL

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))
#define LEVEL avx2
TARGET static inline __attribute__((always_inline)) void
stream_avx2(uint8_t *to, const uint8_t *from, size_t lines)
{
    for (size_t i = 0; i < 2 * lines; i++)
        _mm256_stream_si256((__m256i *)to + i,
                            _mm256_loadu_si256((const __m256i *)from + i));
}
static inline void stream_end_avx2(void) { _mm_sfence(); }
#define TO_FP16_WIDE                                                                   \
    __m256i most = _mm256_setzero_si256(), mask = _mm256_set1_epi32(SIZE_MASK);        \
    for (; i + 8 <= count; i += 8) {                                                   \
        __m256 v = _mm256_loadu_ps(x + i);                                             \
        most = _mm256_max_epi32(most, _mm256_and_si256(mask, _mm256_castps_si256(v))); \
        _mm_storeu_si128((__m128i *)(out + i),                                         \
                         _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));               \
    }                                                                                  \
    int32_t lanes[8];                                                                  \
    _mm256_storeu_si256((__m256i *)lanes, most);                                       \
    for (int j = 0; j < 8; j++)                                                        \
        largest = lanes[j] > largest ? lanes[j] : largest;
#define FROM_FP16_WIDE                                                                 \
    __m256i most = _mm256_setzero_si256(), mask = _mm256_set1_epi32(SIZE_MASK);        \
    for (; i + 8 <= count; i += 8) {                                                   \
        __m256 v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i)));         \
        most = _mm256_max_epi32(most, _mm256_and_si256(mask, _mm256_castps_si256(v))); \
        _mm256_storeu_ps(out + i, v);                                                  \
    }                                                                                  \
    int32_t lanes[8];                                                                  \
    _mm256_storeu_si256((__m256i *)lanes, most);                                       \
    for (int j = 0; j < 8; j++)                                                        \
        largest = lanes[j] > largest ? lanes[j] : largest;
#include "kernels_sink.h"
FP16_PARTS
#include "kernels_codec_loops.h"
#include "kernels_pack_loops.h"
#include "kernels_outer_loops.h"
#undef TO_FP16_WIDE
#undef FROM_FP16_WIDE
#undef TARGET
#undef LEVEL

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,prfchw")))
#define LEVEL avx512
TARGET static inline __attribute__((always_inline)) void
stream_avx512(uint8_t *to, const uint8_t *from, size_t lines)
{
    for (size_t i = 0; i < lines; i++)
        _mm512_stream_si512((__m512i *)to + i, _mm512_loadu_si512(from + 64 * i));
}
static inline void stream_end_avx512(void) { _mm_sfence(); }
#define TO_FP16_WIDE                                                                   \
    __m512i most = _mm512_setzero_si512(), mask = _mm512_set1_epi32(SIZE_MASK);        \
    for (; i + 16 <= count; i += 16) {                                                 \
        __m512 v = _mm512_loadu_ps(x + i);                                             \
        most = _mm512_max_epi32(most, _mm512_and_si512(mask, _mm512_castps_si512(v))); \
        _mm256_storeu_si256((__m256i *)(out + i),                                      \
                            _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));            \
    }                                                                                  \
    largest = _mm512_reduce_max_epi32(most);
#define FROM_FP16_WIDE                                                                 \
    __m512i most = _mm512_setzero_si512(), mask = _mm512_set1_epi32(SIZE_MASK);        \
    for (; i + 16 <= count; i += 16) {                                                 \
        __m512 v = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + i)));      \
        most = _mm512_max_epi32(most, _mm512_and_si512(mask, _mm512_castps_si512(v))); \
        _mm512_storeu_ps(out + i, v);                                                  \
    }                                                                                  \
    largest = _mm512_reduce_max_epi32(most);
#define OWN_BLOCKS
#define OWN_PIECES
static float encode_block_avx512(const float *x, const float *minus,
                                 const float *residual, int8_t *q, float *lost);
#include "kernels_sink.h"
FP16_PARTS
#include "kernels_codec_loops.h"
#include "kernels_codec_avx512.h"
#include "kernels_pack_avx512.h"
#include "kernels_pack_loops.h"
#include "kernels_outer_loops.h"
#endif
