/* Causal attention in float32, forward and backward, with its rotary embedding.

   Letters: B sequences of T tokens, D width of a head, N heads of queries, of which
   N / K each share one of K heads of keys and values. Rows lie as the projections
   write them: (B * T, heads * D). Scores of a block of queries are held whole, those of
   later blocks are not known to it, and none is kept: the gradient makes them again.

   Results do not depend on the number of threads, but variants round differently:
   those that can multiply and add in one rounding do. */
#ifndef BITNET_KERNELS_ATTENTION_H
#define BITNET_KERNELS_ATTENTION_H

#include "kernels_core.h"

struct attention {
    const float *q, *k, *v;      /* (B * T, N * D), (B * T, K * D) twice; not turned */
    const float *cosines, *sines; /* (T, D / 2) */
    float *mixed;                /* (B * T, N * D) */
    float *lse;                  /* (B * N, T): log of the sum of e^score */
    ptrdiff_t num_b, num_t, num_d, num_heads, num_shared; /* N, K */
};

/* Where gradients go and come from, shaped as what they are of. */
struct attention_gradients {
    const float *dmixed;
    float *dq, *dk, *dv;
};

struct attention_loops {
    /* All heads that share the keys of head `shared` of sequence `b`. `space` holds
       as many numbers as `attention_space` says. */
    void (*forward)(const struct attention *a, ptrdiff_t b, ptrdiff_t shared,
                    float *space);
    void (*backward)(const struct attention *a, const struct attention_gradients *g,
                     ptrdiff_t b, ptrdiff_t shared, float *space);
};

int attend(const struct attention *a, int threads);
int attend_backward(const struct attention *a, const struct attention_gradients *g,
                    int threads);

#endif
