/* Compiles the loops of the header LOOPS once for each vector level of this machine.

   WIDTH is how many floats a register holds: of wider vectors compilers take comparisons
   and shuffles apart, number by number. */
#define TARGET
#define LEVEL portable
#define WIDTH 4
#include LOOPS
#undef TARGET
#undef LEVEL
#undef WIDTH

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2")))
#define LEVEL avx2
#define WIDTH 8
#include LOOPS
#undef TARGET
#undef LEVEL
#undef WIDTH

#define TARGET                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define LEVEL avx512
#define WIDTH 16
#include LOOPS
#undef TARGET
#undef LEVEL
#undef WIDTH
#endif
