/* What the C kernels offer to `_kernels.pyx`; nothing here knows Python.

   Letters: M rows of activations, K their columns, N rows of a weight, G groups of
   a row. Callers have checked every length; sizes may be zero. Every variant of a
   kernel gives the same bits. */
#ifndef BITNET_KERNELS_CORE_H
#define BITNET_KERNELS_CORE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames are little-endian and so must this machine be"
#endif

/* A tile holds 32 rows of a weight by 4 of its columns, as bytes 0, 1, 2. */
enum { TILE_N = 32, TILE_K = 4, TILE_BYTES = TILE_N * TILE_K };
/* Values of the int8 codec that share a scale. */
enum { BLOCK = 256 };

enum status { OK = 0, NO_MEMORY = 1, NOT_FINITE = 2, TOO_LARGE = 3, BAD_VALUE = 4 };

/* Rows of the left operand that lie together where it is packed in blocks. */
enum { LEFT_ROWS = 12, LEFT_BYTES = LEFT_ROWS * TILE_K };
/* Rows of one item of work: they stay in L2, and whole kernels fit into them. */
enum { PRODUCT_ROWS = 8 * LEFT_ROWS };
/* Tokens of a weight gradient that share a scale, for each of its rows. */
enum { TOKENS = 128 };

/* One product: out[m, n] (+)= sum over k of q[m, k] * row_scale * scale * w[n, k],
   where w is the byte of a tile minus `zero`. */
struct product {
    const int8_t *q;        /* (M, K4 * 4), or blocks (ceil(M / 12), K4, 12, 4) */
    const float *row_scale; /* (M, G) */
    const int32_t *row_start; /* (M, G): minus `zero` times the sums of q */
    const uint8_t *tiles;   /* (ceil(N / 32), K4, 32, 4) */
    float *out;             /* (M, N) */
    ptrdiff_t num_m, num_n, num_k4, group_k4, num_groups;
    float scale;
    int accumulate; /* add to `out` instead of overwriting it */
    int in_blocks;  /* how `q` lies */
    int any_byte;   /* tiles hold more than 0, 1, 2; then no q is -128 ... */
    int no_negative; /* ... and none is below zero */
};

/* The loops that exist once for each level of vector instructions. */
struct loops {
    void (*quantise_rows)(const float *x, ptrdiff_t num_m, ptrdiff_t num_k,
                          ptrdiff_t group, int8_t *q, float *scale);
    void (*row_starts)(const int8_t *q, ptrdiff_t num_m, ptrdiff_t num_k,
                       ptrdiff_t group, int32_t *starts);
    void (*quantise_columns)(const float *dy, ptrdiff_t num_n, ptrdiff_t size,
                             const float *token_scale, ptrdiff_t num_tokens,
                             int8_t *blocks, ptrdiff_t block_step, float *scale,
                             int32_t *start, ptrdiff_t scale_step);
    void (*interleave)(const uint8_t *rows, ptrdiff_t row_step, ptrdiff_t num_panels,
                       uint8_t offset, uint8_t *tiles, ptrdiff_t panel_step);
    double (*sum_of_sizes)(const float *w, ptrdiff_t count);
    void (*ternary_strip)(const float *w, ptrdiff_t num_k, float half, uint8_t *codes);
    /* NOT_FINITE where a result is not; it is written all the same. */
    int (*to_bf16)(const float *x, ptrdiff_t count, uint16_t *out);
    int (*from_bf16)(const uint16_t *x, ptrdiff_t count, float *out);
};

/* Computes `num_m` rows from row `m` for the panels (32 columns) first..end. */
typedef void panel_kernel(const struct product *p, ptrdiff_t m, ptrdiff_t num_m,
                          ptrdiff_t first, ptrdiff_t end);

extern const struct loops loops_portable;
panel_kernel panels_portable;
#if defined(__x86_64__)
extern const struct loops loops_avx2, loops_avx512;
panel_kernel panels_avx2, panels_avx2_any, panels_avx2_positive, panels_avxvnni, panels_avx512vnni;
#endif

/* Instruction sets: how many are known, their names, whether this machine has them
   (best last), which one runs. */
int isa_count(void);
const char *isa_name(int index);
int isa_supported(int index);
int isa_active(void);
void isa_select(int index);
const struct loops *active_loops(void);

/* out = rows times weight; `threads` is at most what is used. */
int multiply(struct product *p, int threads);
/* The same for a product whose sums are known. */
void run_product(const struct product *p, int threads);
/* Writes tokens (M, K) as the right operand of a weight gradient; `tiles` are
   (ceil(K / 32), ceil(M / 4), 32, 4). */
void pack_tokens(const int8_t *q, ptrdiff_t num_m, ptrdiff_t num_k, uint8_t *tiles,
                 int threads);
/* Where rows go that are quantised in groups of columns. */
struct rounded_rows {
    int8_t *q;    /* (M, N) */
    float *scale; /* (M, ceil(N / group)) */
    ptrdiff_t group;
};
/* out (N, K) (+)= transpose of dy (M, N) times tokens: packed int8 and a scale each.
   Writes the rows of dy as int8 too, unless `rows` is NULL. */
int weight_gradient(const float *dy, const float *token_scale, const uint8_t *tiles,
                    ptrdiff_t num_m, ptrdiff_t num_n, ptrdiff_t num_k, float *out,
                    int accumulate, const struct rounded_rows *rows, int threads);
/* Memory for one call, at a cache line; kept for the next call. NULL: none left. */
void *take_scratch(size_t size);
void give_scratch(void *scratch);
/* Writes both orientations of a weight (N, K); `scale` is NaN where w is not finite. */
int quantise_weight(const float *w, ptrdiff_t num_n, ptrdiff_t num_k, float *scale,
                    uint8_t *forward, uint8_t *backward);

/* Runs work(context, i) for i in 0..count on up to `threads` threads. */
void run_parallel(void (*work)(void *context, ptrdiff_t item), void *context,
                  ptrdiff_t count, int threads);

#endif
