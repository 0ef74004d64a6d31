/* Few int8 rows times a ternary weight at 2 bits a value; see `kernels_gemv.c`. */
#ifndef BITNET_KERNELS_GEMV_H
#define BITNET_KERNELS_GEMV_H

#include "kernels_core.h"

/* A block holds 16 rows of the weight by 16 of its columns: byte (n, c) has, lowest
   bits first, the values plus one of the columns c, 4 + c, 8 + c and 12 + c. A panel is
   4 blocks side by side, and the blocks of a panel lie along the columns. */
enum { BLOCK_N = 16, BLOCK_K = 16, NARROW_BYTES = 64, GROUPS = 4 };
enum { PANEL_N = GROUPS * BLOCK_N };
/* With longer rows, sums of values times 64 could leave int32. */
enum { NARROW_MOST_K = 1 << 16 };

struct narrow {
    const int8_t *q;        /* (M, K) */
    const float *row_scale; /* (M,) */
    const uint8_t *blocks;
    float *out; /* (M, N) */
    ptrdiff_t num_m, num_n, num_k;
    float scale;
    int accumulate;
    /* Set by `multiply_narrow`: q with rows of whole blocks, and minus its sums. */
    ptrdiff_t num_k16;
    int8_t *padded;
    int32_t *start;
};

/* Writes the sums (M, PANEL_N) of a panel of so many blocks side by side. */
typedef void narrow_kernel(const struct narrow *p, const uint8_t *panel,
                           ptrdiff_t num_groups, int32_t *sums);

narrow_kernel narrow_portable;
#if defined(__x86_64__)
narrow_kernel narrow_avx2, narrow_avx512vnni;
#endif
/* Of the variant that runs. */
narrow_kernel *active_narrow(void);

/* Writes the blocks of a weight (N, K) whose tiles are given. */
void narrow_tiles(const uint8_t *tiles, ptrdiff_t num_n, ptrdiff_t num_k,
                  uint8_t *blocks);
/* out = rows times weight; `threads` is at most what is used. */
int multiply_narrow(struct narrow *p, int threads);

#endif
