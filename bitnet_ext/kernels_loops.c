/* Instances of `kernels_loops.h`: portable C, and what the compiler makes of the same
   text for AVX2 and AVX-512. */
#include "kernels_core.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Adding 1.5 * 2^23 leaves the nearest integer, halves to even, in the low bits. */
#define ROUNDER 12582912.0f
#define SIZE_MASK 0x7fffffff
/* Columns of dy that one pass quantises: TOKENS of them stay in L1. */
enum { STRIP = 32 };
#define INFINITE 0x7f800000
/* 2^100: 127 of it are far from overflow, and no training makes it. */
#define MAX_SCALE 0x1p100f

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

#define TARGET
#define LEVEL portable
#include "kernels_loops.h"
#undef TARGET
#undef LEVEL

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2")))
#define LEVEL avx2
#include "kernels_loops.h"
#undef TARGET
#undef LEVEL

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define LEVEL avx512
#include "kernels_loops.h"
#undef TARGET
#undef LEVEL
#endif
