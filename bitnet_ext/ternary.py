"""int8 activations times ternary weights: the door to the C kernels.

Weights are quantised as in BitNet b1.58: the scale is the mean of |w|, values are
w / scale rounded (halves to even) and clipped to -1, 0, 1. Activations are int8 with
one scale a row, or a row and group of columns. Products are exact in int32 inside a
group; groups are added in float32, in order. So a result has the same bits on every
CPU and for every number of threads.

What is not finite goes through visibly: a group of columns (or a weight) that holds
a NaN or an infinity gets the scale NaN, and so does every product it is part of.

Letters in shapes: M rows of activations, K their columns, N rows of a weight, G
groups of a row.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.isa import ISA_VARIABLE as ISA_VARIABLE
from bitnet_ext.isa import active_isa as active_isa
from bitnet_ext.isa import choose_isa as choose_isa
from bitnet_ext.isa import kernels as _kernels
from bitnet_ext.isa import supported_isas as supported_isas
from bitnet_ext.memory import aligned, destination
from bitnet_ext.operands import TILE_COLUMNS, TILE_ROWS
from bitnet_ext.operands import PackedTernary as PackedTernary
from bitnet_ext.operands import PackedTokens as PackedTokens
from bitnet_ext.operands import QuantisedRows as QuantisedRows
from bitnet_ext.operands import TernaryWeight as TernaryWeight

#: Longest row: with more, a sum of int8 times ternary could leave int32.
MAX_COLUMNS: Final = 1 << 22
#: Rows of dy that share a scale in `weight_gradient`.
TOKENS: Final = 128

#: Up to so many rows are multiplied by a weight at 2 bits a value, as in generation.
FEW_ROWS: Final = 8

#: Longest row of such products.
_NARROW_COLUMNS: Final = 1 << 16


def quantise_weight(w_NK: NDArray[np.float32]) -> TernaryWeight:
    """Return the ternary form of a float32 matrix (N, K).

    Raises ValueError for another type or shape.
    """
    w_NK = _matrix(w_NK, "weight")
    num_rows, num_columns = w_NK.shape
    forward = tile_memory(num_rows, num_columns)
    backward = tile_memory(num_columns, num_rows)
    status, scale = _kernels.quantise_weight(w_NK, forward, backward)
    _check(status)
    return TernaryWeight(
        PackedTernary(forward, num_rows, num_columns, scale),
        PackedTernary(backward, num_columns, num_rows, scale),
    )


def quantise_rows(x_MK: NDArray[np.float32], group: int | None = None) -> QuantisedRows:
    """Return a float32 matrix (M, K) as int8 rows.

    `scale` is the largest |x| of a group over 127, and `q` is x times 127 / largest,
    rounded with halves to even. Without `group` a row is one group. A group of zeros
    (or of numbers so small that the scale is subnormal) has scale 0 and values 0; one
    with a NaN or an infinity has scale NaN. Raises ValueError for another type or
    shape and for a group that is not a positive multiple of 4.
    """
    x_MK = _matrix(x_MK, "rows")
    rows = empty_rows(x_MK.shape[0], x_MK.shape[1], group)
    _kernels.quantise_rows(x_MK, rows.group, rows.q, rows.scale)
    return rows


def empty_rows(
    num_rows: int, num_columns: int, group: int | None = None
) -> QuantisedRows:
    """Return memory for rows; without `group` a row is one group.

    Raises ValueError for a group that is not a positive multiple of 4.
    """
    if group is None or group >= num_columns:
        group = max(num_columns, 1)
    _check_group(group, num_columns)
    return QuantisedRows(
        np.empty((num_rows, num_columns), dtype=np.int8),
        np.empty((num_rows, -(-num_columns // group)), dtype=np.float32),
        group,
    )


def matmul(
    rows: QuantisedRows,
    weight: PackedTernary,
    *,
    out: NDArray[np.float32] | None = None,
    accumulate: bool = False,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Return `rows @ weight.T` as float32 (M, N), for rows (M, K) and a weight (N, K).

    The product goes into `out` where it is given, or is added to it. `threads` is
    the most that are used; the result does not depend on it. Raises ValueError when
    the shapes do not fit.
    """
    q_MK = np.ascontiguousarray(rows.q)
    num_rows, num_columns = q_MK.shape
    if num_columns != weight.num_columns:
        raise ValueError(
            f"rows must have {weight.num_columns} columns, got {num_columns}"
        )
    _check_group(rows.group, num_columns)
    _check_threads(threads)
    if accumulate and out is None:
        raise ValueError("out must be given where accumulate is")
    out = destination(out, (num_rows, weight.num_rows), np.float32)
    if not num_columns:
        if not accumulate:
            out.fill(0)
        return out
    few = num_rows <= FEW_ROWS and num_columns <= _NARROW_COLUMNS
    if few and rows.scale.shape == (num_rows, 1):
        _multiply_few(rows, weight, out, accumulate=accumulate, threads=threads)
        return out
    missing = -num_columns % TILE_COLUMNS
    if missing:
        q_MK = np.pad(q_MK, ((0, 0), (0, missing)))
    status = _kernels.multiply(
        q_MK,
        np.ascontiguousarray(rows.scale),
        -(-rows.group // TILE_COLUMNS),
        weight.tiles,
        weight.scale,
        out,
        accumulate,
        threads,
    )
    _check(status)
    return out


def _multiply_few(
    rows: QuantisedRows,
    weight: PackedTernary,
    out: NDArray[np.float32],
    *,
    accumulate: bool,
    threads: int,
) -> None:
    """The product of few rows, which reads a quarter of the bytes; the same bits."""
    status = _kernels.multiply_narrow(
        np.ascontiguousarray(rows.q),
        np.ascontiguousarray(rows.scale),
        weight.narrow,
        weight.scale,
        out,
        accumulate,
        threads,
    )
    _check(status)


def pack_tokens(rows: QuantisedRows, *, threads: int = 1) -> PackedTokens:
    """Return rows (M, K) as `weight_gradient` reads them; once for all its weights.

    Raises ValueError for rows with more than one scale each.
    """
    _check_threads(threads)
    q_MK = np.ascontiguousarray(rows.q)
    num_rows, num_columns = q_MK.shape
    scale = (
        np.ascontiguousarray(rows.scale)
        if num_columns
        else np.zeros((num_rows, 1), dtype=np.float32)
    )
    if scale.shape != (num_rows, 1):
        raise ValueError(
            f"rows must have one scale each, got {scale.shape} for {q_MK.shape}"
        )
    tiles = tile_memory(num_columns, num_rows)
    _kernels.pack_tokens(q_MK, tiles, threads)
    return PackedTokens(tiles, scale.reshape(-1), num_columns)


def weight_gradient(
    dy_MN: NDArray[np.float32],
    rows: QuantisedRows | PackedTokens,
    into_NK: NDArray[np.float32],
    *,
    accumulate: bool = False,
    dy_rows: QuantisedRows | None = None,
    threads: int = 1,
) -> None:
    """Write `dy.T @ rows` to `into` (N, K), or add it; for dy (M, N) and rows (M, K).

    dy times the scale of its row is rounded to int8, with a scale for each column
    and `TOKENS` rows; everything else is exact until groups are added in float32.
    `dy_rows` (M, N), where it is given, gets what `quantise_rows` makes of dy: in the
    same pass over memory. Raises ValueError when the shapes do not fit.
    """
    dy_MN = _matrix(dy_MN, "dy")
    if isinstance(rows, QuantisedRows):
        rows = pack_tokens(rows, threads=threads)
    _check_threads(threads)
    shape = dy_MN.shape[1], rows.num_columns
    if dy_MN.shape[0] != rows.scale.size:
        raise ValueError(f"dy must have {rows.scale.size} rows, got {dy_MN.shape[0]}")
    into_NK = destination(into_NK, shape, np.float32)
    if not accumulate and not len(dy_MN):
        into_NK.fill(0)
    _check(
        _kernels.weight_gradient(
            dy_MN,
            rows.scale,
            rows.tiles,
            into_NK,
            accumulate,
            None if dy_rows is None else dy_rows.q,
            None if dy_rows is None else dy_rows.scale,
            1 if dy_rows is None else dy_rows.group,
            threads,
        )
    )


def _matrix(x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if x.ndim != 2 or x.dtype != np.float32:
        raise ValueError(f"{name} must be a float32 matrix, got {x.dtype} {x.shape}")
    if max(x.shape) > MAX_COLUMNS:
        raise ValueError(f"{name} must be at most {MAX_COLUMNS} wide, got {x.shape}")
    return np.ascontiguousarray(x)


def _check_group(group: int, num_columns: int) -> None:
    """Groups start where tiles do; one that holds the whole row may be any size."""
    if group < 1 or (group < num_columns and group % TILE_COLUMNS):
        raise ValueError(f"group must be a positive multiple of 4, got {group}")


def _check_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")


def tile_memory(num_rows: int, num_columns: int) -> NDArray[np.uint8]:
    """Return memory for the tiles of a matrix; a kernel fills it to the last byte."""
    num_panels, num_k4 = -(-num_rows // TILE_ROWS), -(-num_columns // TILE_COLUMNS)
    return aligned(num_panels * num_k4 * TILE_ROWS * TILE_COLUMNS, np.uint8)


def _check(status: int) -> None:
    if status:
        raise MemoryError("a ternary kernel found no memory for its sums")
