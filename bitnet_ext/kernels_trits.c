/* Ternary payloads: a size for each block, a bit for each number, a sign for each that is
   large. `trits.py` says what the bytes are; sums are of doubles, in one order. */
#include "kernels_codec.h"

#include "kernels_bits.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define MAX_SIZE 0x1p100f
#define LARGE_FROM 0.7f

enum { SIGN_BYTES = MOST_LARGE / 8, BIT_BYTES = BLOCK / 8 };

/* The three parts of a payload. */
struct trit_parts {
    uint8_t *sizes, *bits, *signs;
};

static struct trit_parts parts_of(const uint8_t *payload, ptrdiff_t count)
{
    uint8_t *start = (uint8_t *)payload;
    ptrdiff_t num_blocks = (count + BLOCK - 1) / BLOCK;
    return (struct trit_parts){start, start + 2 * num_blocks,
                               start + 2 * num_blocks + (count + 7) / 8};
}

/* Halves onto halves; what is in `terms` is used up. */
static double tree_sum(double *terms)
{
    for (int half = BLOCK / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            terms[i] += terms[i + half];
    return terms[0];
}

static int count_from(const int32_t *heights, int32_t bound)
{
    int32_t count = 0;
    for (int i = 0; i < BLOCK; i++)
        count += heights[i] >= bound;
    return count;
}

/* Heights are those of floats, as bits, which have the same order; at least MOST_LARGE
   are from `low` to `highest`. Returns a bound that exactly so many reach; or, where
   equals make that impossible, the highest that more of them reach. Each turn finds
   the bound's bucket of 256, which the next one divides. */
static int32_t bound_of(const int32_t *heights, int32_t low, int32_t highest)
{
    int32_t width = highest - low + 1, needed = MOST_LARGE;
    for (;;) {
        int32_t counts[256] = {0}, bucket = 255;
        int shift = 0;
        while ((width - 1) >> shift > 255)
            shift++;
        for (int i = 0; i < BLOCK; i++) {
            uint32_t above = (uint32_t)heights[i] - (uint32_t)low;
            if (above < (uint32_t)width)
                counts[above >> shift]++;
        }
        while (counts[bucket] < needed)
            needed -= counts[bucket--];
        low += bucket << shift;
        if (counts[bucket] == needed || shift == 0)
            return low;
        /* The last bucket may be cut short by the old width: nothing is there. */
        width = 1 << shift;
    }
}

/* Set which numbers are large, and return how many. */
static int find_large(const int32_t *heights, int32_t highest, float threshold,
                      int32_t *large)
{
    int32_t bound = bits_of(threshold) + 1;
    int count = count_from(heights, bound);
    if (count > MOST_LARGE) {
        bound = bound_of(heights, bound, highest);
        count = count_from(heights, bound);
    }
    for (int i = 0; i < BLOCK; i++)
        large[i] = heights[i] >= bound;
    /* Of equals the last ones go. */
    for (int i = BLOCK - 1; count > MOST_LARGE; i--)
        if (heights[i] == bound)
            large[i] = 0, count--;
    return count;
}

static float bf16_of(float x)
{
    uint32_t bits = (uint32_t)bits_of(x);
    return float_of((int32_t)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u));
}

/* One block of `count` numbers, filled up with zeros; `lost` may be NULL. */
static int encode_block(float *x, int count, struct trit_parts to, float *lost)
{
    int32_t heights[BLOCK], large[BLOCK], highest = 0;
    double terms[BLOCK];
    uint8_t bits[BIT_BYTES] = {0}, signs[SIGN_BYTES + 1] = {0};
    for (int i = 0; i < BLOCK; i++) {
        heights[i] = bits_of(x[i]) & SIZE_MASK;
        highest = heights[i] > highest ? heights[i] : highest;
        terms[i] = float_of(heights[i]);
    }
    if (highest >= INFINITE)
        return NOT_FINITE;
    float mean = (float)(tree_sum(terms) / count);
    int num_large = find_large(heights, highest, LARGE_FROM * mean, large);
    for (int i = 0; i < BLOCK; i++)
        terms[i] = large[i] ? float_of(heights[i]) : 0.0f;
    float size = bf16_of((float)(tree_sum(terms) / (num_large ? num_large : 1)));
    if (size < FLT_MIN) {
        size = 0;
        memset(large, 0, sizeof large);
    }
    if (size > MAX_SIZE)
        return TOO_LARGE;
    int place = 0;
    for (int i = 0; i < BLOCK; i++) {
        int is_negative = (uint32_t)bits_of(x[i]) >> 31;
        bits[i / 8] |= (uint8_t)(large[i] << i % 8);
        signs[place / 8] |= (uint8_t)((large[i] & is_negative) << place % 8);
        place += large[i];
    }
    uint32_t size_bits = (uint32_t)bits_of(size) >> 16;
    to.sizes[0] = (uint8_t)size_bits;
    to.sizes[1] = (uint8_t)(size_bits >> 8);
    memcpy(to.bits, bits, (size_t)(count + 7) / 8);
    memcpy(to.signs, signs, SIGN_BYTES);
    for (int i = 0; lost && i < count; i++)
        lost[i] = x[i] - (large[i] ? copysignf(size, x[i]) : 0.0f);
    return OK;
}

int encode_trits(const float *x, const float *minus, const float *residual,
                 ptrdiff_t count, uint8_t *payload, float *lost)
{
    struct trit_parts to = parts_of(payload, count);
    for (ptrdiff_t start = 0; start < count; start += BLOCK) {
        float block[BLOCK] = {0};
        int size = count - start < BLOCK ? (int)(count - start) : BLOCK;
        memcpy(block, x + start, (size_t)size * sizeof *x);
        for (int i = 0; minus && i < size; i++)
            block[i] -= minus[start + i];
        for (int i = 0; residual && i < size; i++)
            block[i] += residual[start + i];
        int status = encode_block(block, size, to, lost ? lost + start : NULL);
        if (status)
            return status;
        to.sizes += 2, to.bits += BIT_BYTES, to.signs += SIGN_BYTES;
    }
    return OK;
}

static float size_of(const uint8_t *sizes)
{
    return float_of((int32_t)((uint32_t)sizes[0] << 16 | (uint32_t)sizes[1] << 24));
}

static int check_block(struct trit_parts from, ptrdiff_t count)
{
    float size = size_of(from.sizes);
    int num_large = 0;
    if ((bits_of(size) & SIZE_MASK) >= INFINITE)
        return NOT_FINITE;
    for (ptrdiff_t i = 0; i < (count + 7) / 8; i++)
        num_large += __builtin_popcount(from.bits[i]);
    if (count % 8 && from.bits[count / 8] >> count % 8)
        return BAD_VALUE;
    if (num_large > MOST_LARGE || bits_of(size) < 0 || size > MAX_SIZE)
        return BAD_VALUE;
    /* A size where there is something large, and only there. */
    if (num_large ? size < FLT_MIN : bits_of(size) != 0)
        return BAD_VALUE;
    for (int place = num_large; place < MOST_LARGE; place++)
        if (from.signs[place / 8] >> place % 8 & 1)
            return BAD_VALUE;
    return OK;
}

int check_trits(const uint8_t *payload, ptrdiff_t count)
{
    struct trit_parts from = parts_of(payload, count);
    for (ptrdiff_t left = count; left > 0; left -= BLOCK) {
        int status = check_block(from, left < BLOCK ? left : BLOCK);
        if (status)
            return status;
        from.sizes += 2, from.bits += BIT_BYTES, from.signs += SIGN_BYTES;
    }
    return OK;
}

/* The bits of up to 64 numbers; zeros beyond the last. Whole words, because the end of
   a walk over their bits is a branch that no CPU foresees. */
static uint64_t word_of(const uint8_t *bits, ptrdiff_t num_bytes)
{
    uint64_t word = 0;
    if (num_bytes >= 8)
        memcpy(&word, bits, 8);
    else
        memcpy(&word, bits, (size_t)num_bytes);
    return word;
}

void add_trits(const uint8_t *payload, ptrdiff_t count, ptrdiff_t first,
               ptrdiff_t size, float weight, float *into)
{
    struct trit_parts from = parts_of(payload, count);
    ptrdiff_t block = first / BLOCK;
    from.sizes += 2 * block, from.bits += BIT_BYTES * block;
    from.signs += SIGN_BYTES * block;
    for (ptrdiff_t start = 0; start < size; start += BLOCK) {
        float values[2] = {size_of(from.sizes) * weight, 0};
        unsigned place = 0;
        values[1] = -values[0];
        for (ptrdiff_t i = 0; i < BLOCK && start + i < size; i += 64) {
            uint64_t bits = word_of(from.bits + i / 8, (size - start - i + 7) / 8);
            for (; bits; bits &= bits - 1, place++) {
                unsigned sign = from.signs[place / 8] >> place % 8 & 1;
                into[start + i + __builtin_ctzll(bits)] += values[sign];
            }
        }
        from.sizes += 2, from.bits += BIT_BYTES, from.signs += SIGN_BYTES;
    }
}
