/* What the int8 codec does by hand on AVX-512: one block of 256 in 16 registers. */

#define EACH_16(DO)                                                                    \
    DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12)   \
    DO(13) DO(14) DO(15)

/* The exact quotients of a block in which one lies near a half. */
TARGET static __attribute__((noinline)) void
exact_quotients(const float *values, float scale, int8_t *q)
{
    for (ptrdiff_t i = 0; i < BLOCK; i++)
        q[i] = (int8_t)bits_of(values[i] / scale + ROUNDER);
}

/* Four times 16 integers as 64 bytes, in order. */
TARGET static inline __attribute__((always_inline)) __m512i
narrow(__m512i a, __m512i b, __m512i c, __m512i d)
{
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd));
}

/* Quantises the registers; returns whether a quotient lies near a half. */
TARGET static inline __attribute__((always_inline)) int
round_block(const __m512 *values, float inverse, float scale, int8_t *q, float *lost)
{
    __m512 times = _mm512_set1_ps(inverse), step = _mm512_set1_ps(scale);
    __m512 furthest = _mm512_setzero_ps();
    for (int i = 0; i < 16; i += 4) {
        __m512i whole[4];
        for (int j = 0; j < 4; j++) {
            __m512 ratio = _mm512_mul_ps(values[i + j], times);
            whole[j] = _mm512_cvt_roundps_epi32(
                ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            __m512 back = _mm512_cvtepi32_ps(whole[j]);
            __m512 off = _mm512_abs_ps(_mm512_sub_ps(ratio, back));
            furthest = _mm512_max_ps(furthest, off);
            if (lost)
                _mm512_storeu_ps(lost + 16 * (i + j),
                                 _mm512_sub_ps(values[i + j], _mm512_mul_ps(step, back)));
        }
        _mm512_storeu_si512(q + 16 * i, narrow(whole[0], whole[1], whole[2], whole[3]));
    }
    return _mm512_cmp_ps_mask(furthest, _mm512_set1_ps(SURE_BELOW), _CMP_GE_OQ) != 0;
}

TARGET static inline __attribute__((always_inline)) float
encode_values(const float *x, const float *minus, const float *residual, int8_t *q,
              float *lost)
{
    __m512 v[16];
    __m512i size = _mm512_set1_epi32(SIZE_MASK), most = _mm512_setzero_si512();
#define LOAD(i)                                                                        \
    v[i] = _mm512_loadu_ps(x + 16 * i);                                                \
    if (minus)                                                                         \
        v[i] = _mm512_sub_ps(v[i], _mm512_loadu_ps(minus + 16 * i));                   \
    if (residual)                                                                      \
        v[i] = _mm512_add_ps(v[i], _mm512_loadu_ps(residual + 16 * i));                \
    most = _mm512_max_epi32(most, _mm512_and_si512(size, _mm512_castps_si512(v[i])));
    EACH_16(LOAD)
#undef LOAD
    int32_t largest = _mm512_reduce_max_epi32(most);
    if (largest >= INFINITE)
        return NAN;
    float scale = float_of(largest) / 127.0f, inverse = 127.0f / float_of(largest);
    if (scale < FLT_MIN)
        scale = inverse = 0.0f;
    if (!round_block(v, inverse, scale, q, lost))
        return scale;
    float values[BLOCK];
    for (int i = 0; i < 16; i++)
        _mm512_storeu_ps(values + 16 * i, v[i]);
    exact_quotients(values, scale, q);
    for (ptrdiff_t i = 0; lost && i < BLOCK; i++)
        lost[i] = values[i] - scale * (float)q[i];
    return scale;
}

/* One branch a block, and none inside. */
TARGET static float encode_block_avx512(const float *x, const float *minus,
                                        const float *residual, int8_t *q, float *lost)
{
    if (minus && residual && lost)
        return encode_values(x, minus, residual, q, lost);
    if (residual && lost && !minus)
        return encode_values(x, NULL, residual, q, lost);
    if (!minus && !residual && !lost)
        return encode_values(x, NULL, NULL, q, NULL);
    return encode_part_avx512(x, minus, residual, BLOCK, q, lost);
}
