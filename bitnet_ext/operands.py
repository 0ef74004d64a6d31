"""What the ternary products take: rows of int8, and packed weights and tokens.

`bitnet_ext.ternary` makes and multiplies them. Letters in shapes: M rows of
activations, K their columns, N rows of a weight, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext import _kernels
from bitnet_ext.memory import aligned

#: Rows and columns of a weight in one tile.
TILE_ROWS: Final = 32
TILE_COLUMNS: Final = 4


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Rows of int8 with their scales; a value is `q * scale` of its group."""

    #: int8 (M, K), from -127 to 127.
    q: NDArray[np.int8]
    #: float32 (M, G), G = ceil(K / group).
    scale: NDArray[np.float32]
    #: Columns that share a scale; the last group of a row may hold fewer.
    group: int


def tiles_of(bytes_NK: NDArray[np.uint8], *, fill: int) -> NDArray[np.uint8]:
    """Return a matrix of bytes in tiles; what lies past its edges is `fill`."""
    edges = tuple(
        (0, -size % step)
        for size, step in zip(bytes_NK.shape, (TILE_ROWS, TILE_COLUMNS), strict=True)
    )
    whole = np.pad(bytes_NK, edges, constant_values=fill)
    blocks = whole.reshape(-1, TILE_ROWS, whole.shape[1] // TILE_COLUMNS, TILE_COLUMNS)
    tiles = aligned(whole.size, np.uint8)
    ordered = blocks.transpose(0, 2, 1, 3)
    tiles.reshape(ordered.shape)[...] = ordered
    return tiles


@dataclass(frozen=True)
class PackedTernary:
    """A ternary matrix (N, K) in the order in which the kernel reads it.

    Blocks of 32 rows by 4 columns, block after block along the columns, then the
    next 32 rows; a byte is the value plus one. Only kernels look inside.
    """

    # No slots: `narrow` is kept once it was made.

    tiles: NDArray[np.uint8]
    num_rows: int
    num_columns: int
    #: The value of +1; a float32.
    scale: float

    @classmethod
    def of(cls, values_NK: NDArray[np.int8], scale: float) -> PackedTernary:
        """Return the packed form of values -1, 0, 1, int8 (N, K).

        Raises ValueError when a value is another.
        """
        if values_NK.size and np.abs(values_NK.astype(np.int16)).max() > 1:
            raise ValueError("values must be -1, 0 or 1")
        num_rows, num_columns = values_NK.shape
        codes = (values_NK + np.int8(1)).view(np.uint8)
        return cls(tiles_of(codes, fill=1), num_rows, num_columns, scale)

    def values(self) -> NDArray[np.int8]:
        """Return the values -1, 0, 1 as int8 (N, K)."""
        num_k4 = -(-self.num_columns // TILE_COLUMNS)
        tiles = self.tiles.reshape(-1, num_k4, TILE_ROWS, TILE_COLUMNS)
        rows = tiles.transpose(0, 2, 1, 3).reshape(
            tiles.shape[0] * TILE_ROWS, num_k4 * TILE_COLUMNS
        )
        kept = rows[: self.num_rows, : self.num_columns]
        return kept.astype(np.int8) - np.int8(1)

    @cached_property
    def narrow(self) -> NDArray[np.uint8]:
        """The same at 2 bits a value, for products of few rows; made when asked for."""
        narrow = aligned(self.narrow_bytes, np.uint8)
        self.write_narrow(narrow)
        return narrow

    @property
    def narrow_bytes(self) -> int:
        """How many bytes the form at 2 bits a value takes."""
        return 64 * -(-self.num_rows // 16) * -(-self.num_columns // 16)

    def write_narrow(self, out: NDArray[np.uint8]) -> None:
        """Write that form to uint8 (narrow_bytes,)."""
        _kernels.narrow_tiles(self.tiles, self.num_rows, self.num_columns, out)


@dataclass(frozen=True, slots=True)
class TernaryWeight:
    """One weight (N, K) for both directions, with one scale."""

    #: (N, K): takes rows of K columns to rows of N.
    forward: PackedTernary
    #: (K, N): takes rows of N columns back to rows of K.
    backward: PackedTernary

    @property
    def scale(self) -> float:
        """The mean of |w|, at least 1e-5; NaN where the weight is not finite."""
        return self.forward.scale


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Quantised rows (M, K) in the order in which weight gradients read them.

    The tiles of `PackedTernary`, of the transpose; a byte is the value plus 128.
    """

    tiles: NDArray[np.uint8]
    #: float32 (M,): one scale for each row.
    scale: NDArray[np.float32]
    num_columns: int
