/* What surrounds the matrix products of a training step, each in one pass over memory.

   Letters: M rows, K columns. Callers have checked every length; sizes may be zero.
   Every variant gives the same bits, and so does every number of threads. */
#ifndef BITNET_KERNELS_FUSED_H
#define BITNET_KERNELS_FUSED_H

#include "kernels_core.h"

enum gate { NO_GATE = 0, SILU = 1, SQUARED_RELU = 2 };

/* An RMSNorm and what it reads: x, or act(x) * up where there is a gate. */
struct norm {
    const float *x, *up; /* (M, K); `up` is NULL without a gate */
    const float *gain;   /* (K) */
    float *inverse;      /* (M): one over the root mean square of a row */
    ptrdiff_t num_m, num_k;
    float eps;
    int gate;
};

/* AdamW on a stretch of numbers that share their decay. Leaves zeros for gradients: to
   write them while they are at hand costs less than another pass. */
struct adamw {
    float *value, *mean, *square, *grad;
    /* factor on the gradient (clip), 1 - rate * decay, rate over the correction of
       the mean, one over the root of the correction of the square. */
    float clip, keep, rate, root;
    float beta1, beta2, eps;
};

/* What logits are made of: floats, or bits of bf16. */
enum logits_kind { LOGITS_FP32 = 0, LOGITS_BF16 = 1 };

struct logits {
    void *values; /* (M, V) */
    ptrdiff_t num_m, num_v;
    int kind;
};

struct fused_loops {
    /* y = gain * x * inverse for rows m..m + count, (count, K); writes `inverse`. */
    void (*norm_rows)(const struct norm *n, ptrdiff_t m, ptrdiff_t count, float *y);
    /* One row: dx from dy (K); adds to `dgain`, and to `dx` where `add`. With a gate
       dx and dup are those of its two inputs, and may be the inputs themselves.
       `scratch` holds 2 * K numbers. */
    void (*norm_row_backward)(const struct norm *n, ptrdiff_t m, const float *dy,
                              float *dx, float *dup, int add, float *scratch,
                              float *dgain);
    /* One row of logits becomes its gradient times `scale`; returns nats. */
    float (*softmax)(float *logits, ptrdiff_t count, ptrdiff_t target, float scale);
    double (*sum_of_squares)(const float *x, ptrdiff_t count);
    void (*adamw)(const struct adamw *a, ptrdiff_t start, ptrdiff_t count);
};

extern const struct fused_loops fused_portable;
#if defined(__x86_64__)
extern const struct fused_loops fused_avx2, fused_avx512;
#endif
const struct fused_loops *active_fused(void);

/* Writes q (M, K), its scale (M) and `n->inverse`. */
int norm_quantise(struct norm *n, int8_t *q, float *scale, int threads);
/* Writes y (M, K) and `n->inverse`. */
int norm_forward(struct norm *n, float *y, int threads);
/* Writes dx and dup (see above), adds to dgain (K). */
int norm_backward(const struct norm *n, const float *dy, float *dx, float *dup, int add,
                  float *dgain, int threads);
/* Logits become scale * (softmax - onehot), in place. A negative target gives zeros. Writes the nats of each row. */
int softmax_backward(const struct logits *logits, const int64_t *targets, float scale,
                     float *nats, int threads);
/* The sum of squares, in blocks of fixed size and order. */
int square_sum(const float *x, ptrdiff_t count, double *sum, int threads);
void adamw_step(const struct adamw *a, ptrdiff_t count, int threads);
/* into[ids[m]] += x[m] for rows of K numbers, in order. */
void add_rows(const float *x, const int64_t *ids, ptrdiff_t num_m, ptrdiff_t num_k,
              float *into);

#endif
