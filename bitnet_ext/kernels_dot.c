/* The product of a payload with a vector: decoded a piece at a time, then multiplied.

   Pieces are the same everywhere and summed in their order, and so are the lanes of
   one: the same bits for every variant. */
#include "kernels_codec.h"

/* Adds numbers first..first + size of a payload to `into`. */
typedef void adder(const uint8_t *payload, ptrdiff_t count, ptrdiff_t first,
                   ptrdiff_t size, float *into);

static void add_int8(const uint8_t *payload, ptrdiff_t count, ptrdiff_t first,
                     ptrdiff_t size, float *into)
{
    const uint8_t *q = payload + 4 * ((count + BLOCK - 1) / BLOCK);
    active_codecs()->add_int8(payload + 4 * (first / BLOCK), (const int8_t *)q + first,
                              size, 1.0f, into);
}

static void add_fp32(const uint8_t *payload, ptrdiff_t count, ptrdiff_t first,
                     ptrdiff_t size, float *into)
{
    (void)count;
    active_codecs()->add_fp32(payload + 4 * first, size, 1.0f, into);
}

static void add_ternary(const uint8_t *payload, ptrdiff_t count, ptrdiff_t first,
                        ptrdiff_t size, float *into)
{
    add_trits(payload, count, first, size, 1.0f, into);
}

static double dot(adder *add, const uint8_t *payload, ptrdiff_t count,
                  const float *vector)
{
    double sum = 0;
    for (ptrdiff_t first = 0; first < count; first += STEP_BLOCK) {
        ptrdiff_t left = count - first, size = left < STEP_BLOCK ? left : STEP_BLOCK;
        float numbers[STEP_BLOCK] = {0};
        add(payload, count, first, size, numbers);
        sum += active_codecs()->dot(numbers, vector + first, size);
    }
    return sum;
}

double dot_int8(const uint8_t *payload, ptrdiff_t count, const float *vector)
{
    return dot(add_int8, payload, count, vector);
}

double dot_fp32(const uint8_t *payload, ptrdiff_t count, const float *vector)
{
    return dot(add_fp32, payload, count, vector);
}

double dot_trits(const uint8_t *payload, ptrdiff_t count, const float *vector)
{
    return dot(add_ternary, payload, count, vector);
}
