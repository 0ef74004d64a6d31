/* Compiles the loops of the header LOOPS once for each vector level of this machine. */
#define TARGET
#define LEVEL portable
#include LOOPS
#undef TARGET
#undef LEVEL

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2")))
#define LEVEL avx2
#include LOOPS
#undef TARGET
#undef LEVEL

#define TARGET                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define LEVEL avx512
#include LOOPS
#undef TARGET
#undef LEVEL
#endif
