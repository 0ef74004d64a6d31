# Causal attention with its rotary embedding; a part of _kernels.pyx.

cdef extern from "kernels_attention.h" nogil:
    cdef struct attention:
        const float *q
        const float *k
        const float *v
        const float *cosines
        const float *sines
        float *mixed
        float *lse
        Py_ssize_t num_b
        Py_ssize_t num_t
        Py_ssize_t num_d
        Py_ssize_t num_heads
        Py_ssize_t num_shared

    cdef struct attention_gradients:
        const float *dmixed
        float *dq
        float *dk
        float *dv

    int c_attend "attend"(const attention *a, int threads)
    int c_attend_backward "attend_backward"(
        const attention *a, const attention_gradients *g, int threads
    )


cdef int _fill_attention(
    attention *a,
    const float[:, ::1] q,
    const float[:, ::1] k,
    const float[:, ::1] v,
    const float[:, ::1] cosines,
    const float[:, ::1] sines,
    const float[:, ::1] mixed,
    const float[:, ::1] lse,
) except -1:
    """Point at the arrays of an attention; rows are one or more."""
    a.num_t, a.num_d = cosines.shape[0], 2 * cosines.shape[1]
    _must(a.num_t > 0 and a.num_d > 0, "cosines")
    _must(sines.shape[0] == a.num_t and 2 * sines.shape[1] == a.num_d, "sines")
    _must(q.shape[0] > 0 and q.shape[0] % a.num_t == 0, "q")
    a.num_b = q.shape[0] // a.num_t
    a.num_heads, a.num_shared = q.shape[1] // a.num_d, k.shape[1] // a.num_d
    _must(a.num_heads > 0 and q.shape[1] == a.num_heads * a.num_d, "q")
    _must(
        a.num_shared > 0 and a.num_heads % a.num_shared == 0
        and k.shape[0] == q.shape[0] and k.shape[1] == a.num_shared * a.num_d,
        "k",
    )
    _must(v.shape[0] == k.shape[0] and v.shape[1] == k.shape[1], "v")
    _must(mixed.shape[0] == q.shape[0] and mixed.shape[1] == q.shape[1], "mixed")
    _must(lse.shape[0] == a.num_b * a.num_heads and lse.shape[1] == a.num_t, "lse")
    a.q, a.k, a.v = &q[0, 0], &k[0, 0], &v[0, 0]
    a.cosines, a.sines = &cosines[0, 0], &sines[0, 0]
    a.mixed, a.lse = <float *>&mixed[0, 0], <float *>&lse[0, 0]
    return 0


def attend(
    const float[:, ::1] q not None,
    const float[:, ::1] k not None,
    const float[:, ::1] v not None,
    const float[:, ::1] cosines not None,
    const float[:, ::1] sines not None,
    float[:, ::1] mixed not None,
    float[:, ::1] lse not None,
    int threads,
):
    """Write what each query gathers, and the logs of sums; return the status."""
    cdef attention a
    cdef int status
    _fill_attention(&a, q, k, v, cosines, sines, mixed, lse)
    with nogil:
        status = c_attend(&a, threads)
    return status


def attend_backward(
    const float[:, ::1] q not None,
    const float[:, ::1] k not None,
    const float[:, ::1] v not None,
    const float[:, ::1] cosines not None,
    const float[:, ::1] sines not None,
    const float[:, ::1] mixed not None,
    const float[:, ::1] lse not None,
    const float[:, ::1] dmixed not None,
    float[:, ::1] dq not None,
    float[:, ::1] dk not None,
    float[:, ::1] dv not None,
    int threads,
):
    """Write the gradients of queries, keys and values; return the status."""
    cdef attention a
    cdef attention_gradients g
    cdef int status
    _fill_attention(&a, q, k, v, cosines, sines, mixed, lse)
    _must(dmixed.shape[0] == q.shape[0] and dmixed.shape[1] == q.shape[1], "dmixed")
    _must(dq.shape[0] == q.shape[0] and dq.shape[1] == q.shape[1], "dq")
    _must(dk.shape[0] == k.shape[0] and dk.shape[1] == k.shape[1], "dk")
    _must(dv.shape[0] == v.shape[0] and dv.shape[1] == v.shape[1], "dv")
    g.dmixed, g.dq, g.dk, g.dv = &dmixed[0, 0], &dq[0, 0], &dk[0, 0], &dv[0, 0]
    with nogil:
        status = c_attend_backward(&a, &g, threads)
    return status
