/* Pure loops that show what the core can do: the peaks that benchmarks divide by.

   Compiled when a benchmark starts, never shipped. The loops are assembly, so that
   no compiler can spill, reorder or drop what is to be counted; 16 independent
   accumulators hide the latency of every instruction here. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum probe { VNNI_512, VNNI_256, FMA_512, FMA_256, BF16_512, NUM_PROBES };
enum { UNROLL = 16, MAX_THREADS = 64 };

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define SIXTEEN(X) \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define CLEAR(i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n\t"
#define WRITTEN                                                                       \
    "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",     \
        "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

/* `ONE(i)` adds to register i; %1 and %2 are the factors. */
#define LOOP(name, isa, vector, constraint, value, ONE)                               \
    __attribute__((target(isa))) static void name(long count)                         \
    {                                                                                 \
        vector a = value, b = value;                                                  \
        __asm__ volatile(SIXTEEN(CLEAR) "1:\n\t" SIXTEEN(ONE) "dec %0\n\tjnz 1b\n\t"  \
                         : "+r"(count)                                                \
                         : constraint(a), constraint(b)                               \
                         : WRITTEN);                                                  \
    }

#define DP_512(i) "vpdpbusd %1, %2, %%zmm" #i "\n\t"
#define FMA_512_(i) "vfmadd231ps %1, %2, %%zmm" #i "\n\t"
#define BF16_512_(i) "vdpbf16ps %1, %2, %%zmm" #i "\n\t"
LOOP(vnni_512, "avx512f,avx512vnni", __m512i, "v", _mm512_set1_epi8(1), DP_512)
LOOP(fma_512, "avx512f", __m512, "v", _mm512_set1_ps(1.0f), FMA_512_)
LOOP(bf16_512, "avx512f,avx512bf16", __m512i, "v", _mm512_set1_epi16(0x3f80), BF16_512_)

/* Only 16 registers without AVX-512: the last two hold the factors. */
#define FOURTEEN(X) \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13)
#define LOOP_256(name, isa, load, ONE)                                                \
    __attribute__((target(isa))) static void name(long count)                         \
    {                                                                                 \
        int32_t value = load;                                                         \
        __asm__ volatile("vmovd %1, %%xmm14\n\tvpbroadcastd %%xmm14, %%ymm14\n\t"     \
                         "vmovdqa %%ymm14, %%ymm15\n\t" FOURTEEN(CLEAR)               \
                         "1:\n\t" FOURTEEN(ONE) "dec %0\n\tjnz 1b\n\t"                \
                         : "+r"(count)                                                \
                         : "r"(value)                                                 \
                         : WRITTEN);                                                  \
    }
#define DP_256(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define FMA_256_(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n\t"
LOOP_256(vnni_256, "avx2", 0x01010101, DP_256)
LOOP_256(fma_256, "avx2,fma", 0x3f800000, FMA_256_)

static int has_avx_vnni(void)
{
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
           (a >> 4 & 1);
}

static int has_avx512_bf16(void)
{
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx512f") &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

int probe_supported(int probe)
{
    switch (probe) {
    case VNNI_512:
        return __builtin_cpu_supports("avx512vnni") != 0;
    case VNNI_256:
        return has_avx_vnni();
    case FMA_512:
        return __builtin_cpu_supports("avx512f") != 0;
    case FMA_256:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case BF16_512:
        return has_avx512_bf16();
    default:
        return 0;
    }
}

static void (*const loops[NUM_PROBES])(long) = {vnni_512, vnni_256, fma_512, fma_256,
                                                bf16_512};
/* Multiplications and additions of one turn of the loop. */
static const long turn_ops[NUM_PROBES] = {UNROLL * 128, 14 * 64, UNROLL * 32, 14 * 16,
                                          UNROLL * 64};

/* Write out and forget every cached line of a buffer; 1 when that was done. */
int probe_evict(const char *start, size_t size)
{
    for (size_t at = 0; at < size; at += 64)
        _mm_clflush(start + at);
    if (size)
        _mm_clflush(start + size - 1);
    _mm_mfence();
    return 1;
}
#else
int probe_supported(int probe)
{
    (void)probe;
    return 0;
}
static void (*const loops[NUM_PROBES])(long);
static const long turn_ops[NUM_PROBES];
int probe_evict(const char *start, size_t size)
{
    (void)start, (void)size;
    return 0;
}
#endif

/* Operations of one turn; multiply by the turns given to `probe_run`. */
long probe_turn_ops(int probe) { return turn_ops[probe]; }

struct runner {
    pthread_t thread;
    pthread_barrier_t *start;
    int probe, cpu;
    long turns;
    double began_s, ended_s;
};

static void *run_pinned(void *argument)
{
    struct runner *r = argument;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(r->cpu, &one);
    /* Refused only where the CPU was just taken away: then it runs unpinned. */
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    pthread_barrier_wait(r->start);
    r->began_s = now_s();
    loops[r->probe](r->turns);
    r->ended_s = now_s();
    return NULL;
}

static int nth_cpu(const cpu_set_t *allowed, int n)
{
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, allowed) && n-- == 0)
            return cpu;
    return -1;
}

/* Seconds from the first start to the last end of `threads` loops, each on a CPU of
   its own; one thread is the caller, unpinned. Negative when there are too few CPUs
   or no thread could be made. */
double probe_run(int probe, int threads, long turns)
{
    if (threads == 1) {
        double began_s = now_s();
        loops[probe](turns);
        return now_s() - began_s;
    }
    cpu_set_t allowed;
    struct runner runners[MAX_THREADS];
    pthread_barrier_t start;
    if (threads > MAX_THREADS || sched_getaffinity(0, sizeof allowed, &allowed) ||
        CPU_COUNT(&allowed) < threads)
        return -1.0;
    pthread_barrier_init(&start, NULL, (unsigned)threads);
    for (int i = 0; i < threads; i++) {
        runners[i] = (struct runner){
            .start = &start, .probe = probe, .cpu = nth_cpu(&allowed, i), .turns = turns};
        /* Those already made would wait at the barrier forever. */
        if (pthread_create(&runners[i].thread, NULL, run_pinned, &runners[i]))
            return -1.0;
    }
    double began_s = 0.0, ended_s = 0.0;
    for (int i = 0; i < threads; i++) {
        pthread_join(runners[i].thread, NULL);
        if (i == 0 || runners[i].began_s < began_s)
            began_s = runners[i].began_s;
        if (i == 0 || runners[i].ended_s > ended_s)
            ended_s = runners[i].ended_s;
    }
    pthread_barrier_destroy(&start);
    return ended_s - began_s;
}

/* Seconds of `repeats` copies of `size` bytes. */
double probe_memcpy(char *to, const char *from, size_t size, long repeats)
{
    double began_s = now_s();
    for (long i = 0; i < repeats; i++) {
        memcpy(to, from, size);
        __asm__ volatile("" ::"r"(to) : "memory");
    }
    return now_s() - began_s;
}
