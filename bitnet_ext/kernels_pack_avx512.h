/* Pieces of the packings by hand on AVX-512. */

#define LOAD_512(at) _mm512_loadu_si512(at)

/* The four values of each 32-bit lane as a number of base 4, plus one each: 0, 1, 2. */
TARGET static inline __attribute__((always_inline)) __m512i pack_lanes(__m512i plus_one)
{
    const __m512i pairs = _mm512_set1_epi16(0x0401), fours = _mm512_set1_epi32(0x00100001);
    return _mm512_madd_epi16(_mm512_maddubs_epi16(plus_one, pairs), fours);
}

TARGET static inline uint8_t pack2_piece_avx512(const int8_t *values, uint8_t *out)
{
    const __m512i one = _mm512_set1_epi8(1), high = _mm512_set1_epi8((char)0xfc);
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i a = _mm512_add_epi8(LOAD_512(values), one);
    __m512i b = _mm512_add_epi8(LOAD_512(values + 64), one);
    __m512i c = _mm512_add_epi8(LOAD_512(values + 128), one);
    __m512i d = _mm512_add_epi8(LOAD_512(values + 192), one);
    /* (a | b | c) and then | d, with only the high bits kept. */
    __m512i bad = _mm512_ternarylogic_epi64(a, b, c, 0xfe);
    bad = _mm512_ternarylogic_epi64(bad, d, high, 0xa8);
    __m512i ab = _mm512_packus_epi32(pack_lanes(a), pack_lanes(b));
    __m512i cd = _mm512_packus_epi32(pack_lanes(c), pack_lanes(d));
    __m512i codes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd));
    /* Pairs of bits 0, 1, 2 stand for -1, 0, +1, whose codes are 2, 0, 1. */
    const __m512i low = _mm512_set1_epi8(0x55);
    __m512i upper = _mm512_and_si512(_mm512_srli_epi16(codes, 1), low);
    /* 3 is no value: both bits. */
    bad = _mm512_ternarylogic_epi64(bad, codes, _mm512_and_si512(upper, low), 0xf8);
    /* low bit: the upper one; upper bit: neither. */
    __m512i neither = _mm512_ternarylogic_epi64(codes, upper, low, 0x02);
    _mm512_storeu_si512(out, _mm512_or_si512(upper, _mm512_add_epi8(neither, neither)));
    return _mm512_test_epi8_mask(bad, bad) != 0;
}

/* 16 bytes to 64 values: each byte four times, its own pair of bits, and a table. */
TARGET static inline __attribute__((always_inline)) void unpack_sixteen(const uint8_t *codes,
                                                                         int8_t *out)
{
    const __m512i four_times = _mm512_set_epi32(
        0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909,
        0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202,
        0x01010101, 0x00000000);
    const __m512i own = _mm512_set1_epi32((int)0xc0300c03);
    const __m512i shift = _mm512_set1_epi32(0x00040000);
    /* Indices are 0 to 2, or those times 4. */
    const __m512i table = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, -1, 0, 1, 0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0));
    __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)codes));
    x = _mm512_and_si512(_mm512_shuffle_epi8(x, four_times), own);
    _mm512_storeu_si512(out, _mm512_shuffle_epi8(table, _mm512_srlv_epi16(x, shift)));
}

TARGET static inline uint8_t unpack2_piece_avx512(const uint8_t *codes, int8_t *out)
{
    const __m512i low = _mm512_set1_epi8(0x55);
    __m512i all = LOAD_512(codes);
    __m512i both = _mm512_ternarylogic_epi64(all, _mm512_srli_epi16(all, 1), low, 0x80);
    /* Else the stores wait for the lines that they overwrite. */
    for (int i = 0; i < 4; i++)
        __builtin_prefetch(out + 64 * i + 1024, 1);
    for (int i = 0; i < 4; i++)
        unpack_sixteen(codes + 16 * i, out + 64 * i);
    return _mm512_test_epi8_mask(both, both) != 0;
}

TARGET static inline __attribute__((always_inline)) __m512i triple(__m512i x)
{
    return _mm512_add_epi8(_mm512_add_epi8(x, x), x);
}

TARGET static inline uint8_t pack3_piece_avx512(const int8_t *values, uint8_t *out)
{
    __m512i v = _mm512_setzero_si512(), furthest = v;
    for (int plane = 0; plane < PLANES; plane++) {
        __m512i x = LOAD_512(values + PLANE * plane);
        furthest = _mm512_max_epu8(furthest, _mm512_add_epi8(x, _mm512_set1_epi8(1)));
        v = _mm512_add_epi8(triple(v), x);
    }
    v = _mm512_add_epi8(v, _mm512_set1_epi8(121));
    /* ceil(13 v / 243), 16 bits at a time: the even bytes, then the odd ones. */
    const __m512i times = _mm512_set1_epi16(13 * 16), plus = _mm512_set1_epi16(242 * 16);
    const __m512i over = _mm512_set1_epi16(4316);
    __m512i even = _mm512_and_si512(v, _mm512_set1_epi16(0xff));
    __m512i odd = _mm512_srli_epi16(v, 8);
    even = _mm512_add_epi16(_mm512_mullo_epi16(even, times), plus);
    odd = _mm512_add_epi16(_mm512_mullo_epi16(odd, times), plus);
    even = _mm512_srli_epi16(_mm512_mulhi_epu16(even, over), 8);
    odd = _mm512_mulhi_epu16(odd, over);
    /* The odd ones stand in the high bytes already. */
    __m512i both = _mm512_ternarylogic_epi64(_mm512_set1_epi16((short)0xff00), odd, even,
                                             0xea);
    _mm512_storeu_si512(out, _mm512_add_epi8(v, both));
    return _mm512_cmpgt_epu8_mask(furthest, _mm512_set1_epi8(2)) != 0;
}

TARGET static inline uint8_t unpack3_piece_avx512(const uint8_t *codes, int8_t *out)
{
    const __m512i minus = _mm512_set1_epi8(-1), zero = _mm512_setzero_si512();
    const __m512i one = _mm512_set1_epi8(1);
    __m512i rest = LOAD_512(codes);
    for (int plane = 0; plane < PLANES; plane++) {
        /* The digit: 3 * rest reaches 256 from 86 on, 512 from 171 on. */
        __mmask64 some = _mm512_cmpge_epu8_mask(rest, _mm512_set1_epi8(86));
        __mmask64 two = _mm512_cmpge_epu8_mask(rest, _mm512_set1_epi8((char)171));
        __m512i x = _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(minus, some, zero), two, one);
        _mm512_storeu_si512(out + PLANE * plane, x);
        rest = triple(rest);
    }
    return _mm512_cmpge_epu8_mask(rest, _mm512_set1_epi8((char)243)) != 0;
}
