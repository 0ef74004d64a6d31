/* Floats as bits, for loops that every vector level compiles. */
#ifndef BITNET_KERNELS_BITS_H
#define BITNET_KERNELS_BITS_H

#include <stdint.h>
#include <string.h>

/* Adding 1.5 * 2^23 leaves the nearest integer, halves to even, in the low bits. */
#define ROUNDER 12582912.0f
#define SIZE_MASK 0x7fffffff
#define INFINITE 0x7f800000

static inline __attribute__((always_inline)) int32_t bits_of(float x)
{
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline __attribute__((always_inline)) float float_of(int32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* A float at any address: a payload may start anywhere. */
static inline __attribute__((always_inline)) float load_float(const uint8_t *at)
{
    float x;
    memcpy(&x, at, 4);
    return x;
}

#endif
