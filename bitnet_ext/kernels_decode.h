/* One token through a whole model: generation.

   Letters: H hidden, F width of the feed-forward, V words, D width of a head, N heads of
   queries, of which N / K each share one of K heads of keys and values.

   Weights are at 2 bits a value (`kernels_gemv.h`), the head is int8 (`kernels_head.h`),
   all else float32. Every variant gives the same bits, and every number of threads. */
#ifndef BITNET_KERNELS_DECODE_H
#define BITNET_KERNELS_DECODE_H

#include "kernels_core.h"

/* Positions whose keys lie side by side. */
enum { SIDE = 16 };

/* A weight (N, K) in blocks. */
struct packed {
    const uint8_t *blocks;
    ptrdiff_t num_n, num_k;
    float scale;
};

enum layer_weight { W_Q, W_K, W_V, W_O, W_GATE, W_UP, W_DOWN, NUM_WEIGHTS };
enum layer_norm { ATTN_NORM, ATTN_SUB_NORM, FFN_NORM, FFN_SUB_NORM, NUM_NORMS };

struct decoder_layer {
    const float *norms[NUM_NORMS];
    struct packed weights[NUM_WEIGHTS];
    float *keys;   /* (K, C / 16, D, 16): turned, for C positions, a multiple of 16 */
    float *values; /* (K, C, D) */
};

struct decoder {
    const struct decoder_layer *layers;
    const float *embeddings, *final_norm;  /* (V, H), (H) */
    const float *cosines, *sines;          /* (C, D / 2) */
    const uint8_t *words;                  /* int8 (V, H) plus 128, in tiles */
    const float *word_scale;               /* (V) */
    ptrdiff_t num_layers, num_h, num_f, num_v, num_d, num_heads, num_shared, num_c;
    float eps;
    int gate;
};

struct decode_loops {
    /* Keeps the key and value of one shared head at `position`, and writes what the
       queries that share it gather. `scores` holds C + 1 numbers. */
    void (*attend)(const struct decoder *d, const struct decoder_layer *layer,
                   ptrdiff_t shared, ptrdiff_t position, const float *q, const float *k,
                   const float *v, float *scores, float *mixed);
};

extern const struct decode_loops decode_portable;
#if defined(__x86_64__)
extern const struct decode_loops decode_avx2, decode_avx512;
#endif

/* Logits (V) of what follows the token `id` at `position`, whose predecessors are kept. */
int decode(const struct decoder *d, int64_t id, ptrdiff_t position, float *logits,
           int threads);
/* The same for a final hidden state (H) that is known. */
int decode_head(const struct decoder *d, const float *hidden, float *logits, int threads);

#endif
