# Few rows times a weight at 2 bits a value; a part of _kernels.pyx.

cdef extern from "kernels_gemv.h" nogil:
    cdef enum:
        BLOCK_N
        BLOCK_K
        NARROW_BYTES
        NARROW_MOST_K

    cdef struct narrow:
        const int8_t *q
        const float *row_scale
        const uint8_t *blocks
        float *out
        Py_ssize_t num_m
        Py_ssize_t num_n
        Py_ssize_t num_k
        float scale
        int accumulate

    void c_narrow_tiles "narrow_tiles"(
        const uint8_t *tiles, Py_ssize_t num_n, Py_ssize_t num_k, uint8_t *blocks
    )
    int c_multiply_narrow "multiply_narrow"(narrow *p, int threads)


cdef inline Py_ssize_t _narrow_bytes(Py_ssize_t num_n, Py_ssize_t num_k) noexcept:
    return _up(num_n, BLOCK_N) * _up(num_k, BLOCK_K) * NARROW_BYTES


def narrow_tiles(
    const uint8_t[::1] tiles not None,
    Py_ssize_t num_n,
    Py_ssize_t num_k,
    uint8_t[::1] blocks not None,
):
    """Write the blocks of 2 bits a value of a weight (N, K), given as tiles."""
    _must(num_n >= 0 and num_k >= 0, "weight")
    _must(tiles.shape[0] == _up(num_n, TILE_N) * _up(num_k, 4) * TILE_BYTES, "tiles")
    _must(blocks.shape[0] == _narrow_bytes(num_n, num_k), "blocks")
    if num_n == 0 or num_k == 0:
        return
    with nogil:
        c_narrow_tiles(&tiles[0], num_n, num_k, &blocks[0])


def multiply_narrow(
    const int8_t[:, ::1] q not None,
    const float[:, ::1] row_scale not None,
    const uint8_t[::1] blocks not None,
    float scale,
    float[:, ::1] out not None,
    bint accumulate,
    int threads,
):
    """Write or add the product of up to 8 rows (M, K) to `out` (M, N)."""
    cdef narrow p
    cdef int status
    p.num_m, p.num_n, p.num_k = out.shape[0], out.shape[1], q.shape[1]
    _must(q.shape[0] == p.num_m and p.num_m <= 8 and p.num_k <= NARROW_MOST_K, "q")
    _must(row_scale.shape[0] == p.num_m and row_scale.shape[1] == 1, "scale")
    _must(blocks.shape[0] == _narrow_bytes(p.num_n, p.num_k), "blocks")
    if p.num_m == 0 or p.num_n == 0 or p.num_k == 0:
        return 0
    p.q, p.row_scale, p.blocks = &q[0, 0], &row_scale[0, 0], &blocks[0]
    p.out, p.scale, p.accumulate = &out[0, 0], scale, accumulate
    with nogil:
        status = c_multiply_narrow(&p, threads)
    return status
