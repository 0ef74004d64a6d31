/* The head of a training step in int8: logits, softmax, and both gradients.

   Letters: M tokens, H hidden, V words, H4 = ceil(H / 4), V4 = ceil(V / 4), G groups
   of TOKENS tokens. The gradient of the logits is scale * (P - onehot). What belongs
   to a target stays float32, because it stands a hundred times above the rest and
   would round it away. Of the rest:

       dhidden   P times the scales of words, to int8 twice: in groups of WORDS words,
                 and what that rounded away once more, 254 times finer; one rounding
                 alone loses the many small probabilities
       dtable    P times the scales of tokens, to int8 by word and TOKENS tokens

   Rounding the words themselves pulls the gradient of every token the same way, which
   sums over tokens would collect; so the pull of the mean token is taken back.

   Every variant gives the same bits, and so does every number of threads. */
#ifndef BITNET_KERNELS_HEAD_H
#define BITNET_KERNELS_HEAD_H

#include "kernels_core.h"

/* Words that share a scale in `dhidden`. */
enum { WORDS = 256 };
/* Steps of the finer rounding in one of the coarser. */
#define FINER 254.0f

/* The embeddings as the kernels read them; a scale for each word. */
struct head_table {
    const float *values;     /* (V, H) */
    const float *word_scale; /* (V) */
    const int8_t *q;         /* (V, 4 * H4) */
    const uint8_t *forward;  /* (ceil(V / 32), H4, 32, 4) */
    const uint8_t *backward; /* (ceil(H / 32), V4, 32, 4) */
    ptrdiff_t num_v, num_h;
};

/* What `head_table_gradient` needs of the tokens, written by `head_loss`. */
struct head_tokens {
    float *at_target; /* (M): gradient of the logit of the target */
    float *scale;     /* (M) */
    int8_t *q;        /* (M, 4 * H4) */
    int8_t *blocks;   /* (ceil(V / 12), ceil(M / 4), 12, 4) */
    float *word_scale; /* (V, G) */
    int32_t *start;    /* (V, G) */
    ptrdiff_t num_m;
};

struct head_loops {
    /* One row of probabilities times the scales of words, twice to int8 (4 * V4). */
    void (*split)(const float *p, const float *word_scale, ptrdiff_t num_v, int8_t *high,
                  int8_t *low, float *scale, int32_t *high_start, int32_t *low_start);
    /* x *= by */
    void (*scale_row)(float *x, const float *by, ptrdiff_t count);
    /* y += x * factor */
    void (*add_row)(const float *x, float factor, ptrdiff_t count, float *y);
    /* y += (x - scale * q) * factor */
    void (*add_rest)(const float *x, const int8_t *q, float scale, float factor,
                     ptrdiff_t count, float *y);
    /* Up to 32 rows of q, `width` bytes each, as one panel of tiles. */
    void (*weave_rows)(const int8_t *q, ptrdiff_t num_rows, ptrdiff_t width,
                       uint8_t *tiles);
};

extern const struct head_loops head_portable;
#if defined(__x86_64__)
extern const struct head_loops head_avx2, head_avx512;
#endif

/* Writes scales, rows and both orientations of a table that has values and sizes. */
void pack_table(const struct head_table *table, float *word_scale, int8_t *q,
                uint8_t *forward, uint8_t *backward, int threads);
/* Writes nats (M), dhidden (M, H) and all of `tokens`; negative targets take no part.
   `scale` is not negative. */
int head_loss(const struct head_table *table, const float *hidden,
              const int64_t *targets, float scale, struct head_tokens *tokens,
              float *nats, float *dhidden, int threads);
/* Adds factor times the gradient of the table to `into` (V, H). */
int head_table_gradient(const struct head_tokens *tokens, const float *hidden,
                        const int64_t *targets, ptrdiff_t num_v, ptrdiff_t num_h,
                        float factor, float *into, int threads);

#endif
