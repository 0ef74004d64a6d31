/* Payload codecs, conversions and packings; nothing here knows Python.

   Callers have checked every length; no kernel reads or writes past an end. A
   function that returns a status looks at everything it is given, and may have
   written some of its output before it refuses. */
#ifndef BITNET_KERNELS_CODEC_H
#define BITNET_KERNELS_CODEC_H

#include "kernels_core.h"

/* Outputs from this size on go past the caches: no reader finds them there anyway,
   and a line that is written whole need not be read first. */
enum { STREAM_FROM = 8 << 20 };
/* Numbers that the outer step and products take at a time. */
enum { STEP_BLOCK = 4096 };
/* A block of base-3 packing: five planes of 64 values, a byte for one of each. */
enum { PLANES = 5, PLANE = 64, TRITS = PLANES * PLANE };

/* One submission of a round. */
struct part {
    const uint8_t *payload;
    float share;
    int is_int8; /* else float32 */
};

/* weights - rate * (decay * v + G), where v = decay * momentum + G is the new momentum
   and G is `mean` (NULL counts as zeros) plus share times numbers, part by part. */
struct outer {
    const struct part *parts;
    ptrdiff_t num_parts, count;
    const float *mean, *weights, *momentum;
    float rate, decay;
    float *new_weights, *new_momentum;
    int status;    /* of the payloads: set where one is not in order */
    int overflows; /* set where a new number is not finite */
};

struct codecs {
    /* payload of x - minus + residual, and what it rounded away; all but x may be
       NULL. */
    int (*encode_int8)(const float *x, const float *minus, const float *residual,
                       ptrdiff_t count, uint8_t *payload, float *lost);
    int (*decode_int8)(const uint8_t *payload, ptrdiff_t count, float *out);
    /* Scales and numbers apart, so that a caller may begin at any block. */
    int (*check_int8)(const uint8_t *scales, const int8_t *q, ptrdiff_t count);
    void (*add_int8)(const uint8_t *scales, const int8_t *q, ptrdiff_t count,
                     float weight, float *into);
    int (*check_fp32)(const uint8_t *values, ptrdiff_t count);
    void (*add_fp32)(const uint8_t *values, ptrdiff_t count, float weight, float *into);
    /* As the conversions of bf16 in `struct loops`. */
    int (*to_fp16)(const float *x, ptrdiff_t count, uint16_t *out);
    int (*from_fp16)(const uint16_t *x, ptrdiff_t count, float *out);
    int (*pack2)(const int8_t *values, ptrdiff_t num_n, ptrdiff_t num_k, uint8_t *out);
    int (*unpack2)(const uint8_t *codes, ptrdiff_t num_n, ptrdiff_t num_k, int8_t *out);
    int (*pack3)(const int8_t *values, ptrdiff_t count, uint8_t *out);
    int (*unpack3)(const uint8_t *codes, ptrdiff_t count, int8_t *out);
    /* Numbers first..end of the outer step; `first` is a multiple of STEP_BLOCK. */
    void (*outer_stretch)(struct outer *o, ptrdiff_t first, ptrdiff_t end);
    /* Sum of products, in lanes of doubles; of STEP_BLOCK numbers at most. */
    double (*dot)(const float *x, const float *y, ptrdiff_t count);
};

/* bf16 is also for those who know `struct loops` only. */
int to_bf16_portable(const float *x, ptrdiff_t count, uint16_t *out);
int from_bf16_portable(const uint16_t *x, ptrdiff_t count, float *out);
extern const struct codecs codecs_portable;
#if defined(__x86_64__)
int to_bf16_avx2(const float *x, ptrdiff_t count, uint16_t *out);
int from_bf16_avx2(const uint16_t *x, ptrdiff_t count, float *out);
int to_bf16_avx512(const float *x, ptrdiff_t count, uint16_t *out);
int from_bf16_avx512(const uint16_t *x, ptrdiff_t count, float *out);
extern const struct codecs codecs_avx2, codecs_avx512;
#endif

/* Of the variant that runs. */
const struct codecs *active_codecs(void);

void outer_step(struct outer *o, int threads);

/* Large numbers in a block of a ternary payload at most. */
enum { MOST_LARGE = 96 };
/* As the int8 codec's; a payload that is added has been checked. */
int encode_trits(const float *x, const float *minus, const float *residual,
                 ptrdiff_t count, uint8_t *payload, float *lost);
int check_trits(const uint8_t *payload, ptrdiff_t count);
/* Numbers first..first + size of `count`; `first` is a multiple of BLOCK. */
void add_trits(const uint8_t *payload, ptrdiff_t count, ptrdiff_t first,
               ptrdiff_t size, float weight, float *into);

/* Products of the numbers of a checked payload with those of a vector, summed. */
double dot_int8(const uint8_t *payload, ptrdiff_t count, const float *vector);
double dot_fp32(const uint8_t *payload, ptrdiff_t count, const float *vector);
double dot_trits(const uint8_t *payload, ptrdiff_t count, const float *vector);

#endif
