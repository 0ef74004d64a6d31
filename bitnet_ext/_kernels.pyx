"""The C kernels, as functions of contiguous arrays; they run without the GIL.

Callers go through `ternary`, `packing` and `codecs`. Here lengths are checked once
more, because a wrong one would read or write foreign memory. Statuses are returned.
"""

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t


cdef extern from "kernels_core.h" nogil:
    cdef enum:
        TILE_N
        TILE_BYTES
        LEFT_ROWS
        LEFT_BYTES
        TOKENS

    cdef struct product:
        const int8_t *q
        const float *row_scale
        const uint8_t *tiles
        float *out
        Py_ssize_t num_m
        Py_ssize_t num_n
        Py_ssize_t num_k4
        Py_ssize_t group_k4
        Py_ssize_t num_groups
        float scale
        int accumulate

    cdef struct loops:
        void (*quantise_rows)(
            const float *, Py_ssize_t, Py_ssize_t, Py_ssize_t, int8_t *, float *
        ) noexcept nogil
        int (*to_bf16)(const float *, Py_ssize_t, uint16_t *) noexcept nogil
        int (*from_bf16)(const uint16_t *, Py_ssize_t, float *) noexcept nogil

    int isa_count()
    const char *isa_name(int index)
    int isa_supported(int index)
    int isa_active()
    void isa_select(int index)
    const loops *active_loops()
    int c_multiply "multiply"(product *p, int threads)
    void c_pack_tokens "pack_tokens"(
        const int8_t *q, Py_ssize_t num_m, Py_ssize_t num_k, uint8_t *tiles, int threads
    )
    cdef struct rounded_rows:
        int8_t *q
        float *scale
        Py_ssize_t group

    int c_weight_gradient "weight_gradient"(
        const float *dy, const float *token_scale, const uint8_t *tiles,
        Py_ssize_t num_m, Py_ssize_t num_n, Py_ssize_t num_k, float *out,
        int accumulate, const rounded_rows *rows, int threads
    )
    int c_quantise_weight "quantise_weight"(
        const float *w, Py_ssize_t num_n, Py_ssize_t num_k, float *scale,
        uint8_t *forward, uint8_t *backward
    )


def known_isas():
    """Return the names of all variants of this build, best last."""
    return [isa_name(i).decode() for i in range(isa_count())]


def supported_isas():
    """Return the names of the variants that this machine can run, best last."""
    return [isa_name(i).decode() for i in range(isa_count()) if isa_supported(i)]


def selected_isa():
    """Return the name of the variant that runs."""
    return isa_name(isa_active()).decode()


def select_isa(str name not None):
    """Run this variant from now on; raises ValueError where it can't."""
    for i in range(isa_count()):
        if isa_name(i).decode() == name and isa_supported(i):
            isa_select(i)
            return
    raise ValueError(f"no such variant on this machine: {name!r}")


cdef inline int _must(bint fits, str what) except -1:
    if not fits:
        raise ValueError(f"{what} has the wrong length")
    return 0


cdef inline Py_ssize_t _up(Py_ssize_t count, Py_ssize_t step) noexcept nogil:
    return (count + step - 1) // step


def multiply(
    const int8_t[:, ::1] q not None,
    const float[:, ::1] row_scale not None,
    Py_ssize_t group_k4,
    const uint8_t[::1] tiles not None,
    float scale,
    float[:, ::1] out not None,
    bint accumulate,
    int threads,
):
    """Write or add the product to `out` (M, N); q is (M, 4 * K4), scales (M, G)."""
    cdef product p
    cdef int status
    p.num_m, p.num_n = out.shape[0], out.shape[1]
    p.num_k4, p.group_k4, p.num_groups = q.shape[1] // 4, group_k4, row_scale.shape[1]
    _must(q.shape[1] % 4 == 0 and q.shape[0] == p.num_m, "q")
    _must(group_k4 > 0, "group")
    _must(
        row_scale.shape[0] == p.num_m and p.num_groups == _up(p.num_k4, group_k4),
        "scale",
    )
    _must(tiles.shape[0] == _up(p.num_n, TILE_N) * p.num_k4 * TILE_BYTES, "tiles")
    if p.num_m == 0 or p.num_n == 0 or p.num_k4 == 0:
        return 0
    p.q, p.row_scale, p.tiles = &q[0, 0], &row_scale[0, 0], &tiles[0]
    p.out, p.scale, p.accumulate = &out[0, 0], scale, accumulate
    with nogil:
        status = c_multiply(&p, threads)
    return status


def pack_tokens(const int8_t[:, ::1] q not None, uint8_t[::1] tiles not None, int threads):
    """Write tokens (M, K) as tiles (ceil(K / 32), ceil(M / 4), 32, 4)."""
    cdef Py_ssize_t num_m = q.shape[0]
    cdef Py_ssize_t num_k = q.shape[1]
    _must(tiles.shape[0] == _up(num_k, TILE_N) * _up(num_m, 4) * TILE_BYTES, "tiles")
    if num_m == 0 or num_k == 0:
        return
    with nogil:
        c_pack_tokens(&q[0, 0], num_m, num_k, &tiles[0], threads)


def weight_gradient(
    const float[:, ::1] dy not None,
    const float[::1] token_scale not None,
    const uint8_t[::1] tiles not None,
    float[:, ::1] into not None,
    bint accumulate,
    int8_t[:, ::1] q,
    float[:, ::1] scale,
    Py_ssize_t group,
    int threads,
):
    """Write or add the gradient to `into` (N, K), for dy (M, N); return the status.

    Where `q` (M, N) is given it gets the rows of dy, and `scale` (M, G) theirs.
    """
    cdef Py_ssize_t num_m = dy.shape[0]
    cdef Py_ssize_t num_n = into.shape[0]
    cdef Py_ssize_t num_k = into.shape[1]
    cdef rounded_rows rows
    cdef int status
    _must(dy.shape[1] == num_n and token_scale.shape[0] == num_m, "dy")
    _must(tiles.shape[0] == _up(num_k, TILE_N) * _up(num_m, 4) * TILE_BYTES, "tiles")
    if num_m == 0 or num_n == 0:
        return 0
    if q is not None:
        _must(group > 0, "group")
        _must(q.shape[0] == num_m and q.shape[1] == num_n, "q")
        _must(
            scale is not None and scale.shape[0] == num_m
            and scale.shape[1] == _up(num_n, group),
            "scale",
        )
        rows.q, rows.scale, rows.group = &q[0, 0], &scale[0, 0], group
    if num_k == 0:
        if q is not None:
            quantise_rows(dy, group, q, scale)
        return 0
    with nogil:
        status = c_weight_gradient(
            &dy[0, 0], &token_scale[0], &tiles[0], num_m, num_n, num_k, &into[0, 0],
            accumulate, NULL if q is None else &rows, threads,
        )
    return status


def quantise_rows(
    const float[:, ::1] x not None,
    Py_ssize_t group,
    int8_t[:, ::1] q not None,
    float[:, ::1] scale not None,
):
    """Write int8 values (M, K) and scales (M, G)."""
    cdef Py_ssize_t num_m = x.shape[0]
    cdef Py_ssize_t num_k = x.shape[1]
    _must(q.shape[0] == num_m and q.shape[1] == num_k, "q")
    _must(group > 0, "group")
    _must(scale.shape[0] == num_m and scale.shape[1] == _up(num_k, group), "scale")
    if num_m == 0 or num_k == 0:
        return
    with nogil:
        active_loops().quantise_rows(
            &x[0, 0], num_m, num_k, group, &q[0, 0], &scale[0, 0]
        )


def quantise_weight(
    const float[:, ::1] w not None,
    uint8_t[::1] forward not None,
    uint8_t[::1] backward not None,
):
    """Write the tiles of w (N, K) and of its transpose; return (status, scale)."""
    cdef Py_ssize_t num_n = w.shape[0]
    cdef Py_ssize_t num_k = w.shape[1]
    cdef float scale = 0
    cdef int status
    _must(
        forward.shape[0] == _up(num_n, TILE_N) * _up(num_k, 4) * TILE_BYTES, "forward"
    )
    _must(
        backward.shape[0] == _up(num_k, TILE_N) * _up(num_n, 4) * TILE_BYTES, "backward"
    )
    if num_n == 0 or num_k == 0:
        return 0, 1e-5
    with nogil:
        status = c_quantise_weight(
            &w[0, 0], num_n, num_k, &scale, &forward[0], &backward[0]
        )
    return status, scale


# One extension, so that there is one pool of threads and one chosen variant.
include "kernels_fused.pxi"
include "kernels_head.pxi"
include "kernels_attention.pxi"
include "kernels_codec.pxi"
include "kernels_gemv.pxi"
include "kernels_decode.pxi"
