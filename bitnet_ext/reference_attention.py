"""The plain NumPy twin of attention, in float64: the meaning of each number.

Tests hold the kernels to it up to rounding; nothing else uses it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.attention import Heads

Doubles = NDArray[np.float64]


def attend(heads: Heads) -> Doubles:
    """Return what each query gathers, (M, N * D)."""
    _, _, v, odds = _parts(heads)
    return _rows(odds @ v)


def attend_backward(heads: Heads, dmixed: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Return the gradients of q, k and v before they turned, shaped as these."""
    q, k, v, odds = _parts(heads)
    dout = _split(dmixed, heads)
    dodds = dout @ v.swapaxes(-1, -2)
    dscores = odds * (dodds - (odds * dodds).sum(-1, keepdims=True))
    dscores /= np.sqrt(q.shape[-1])
    dq = _turn(dscores @ k, heads, -1)
    dk = _turn(dscores.swapaxes(-1, -2) @ q, heads, -1)
    dv = odds.swapaxes(-1, -2) @ dout
    return _rows(dq), _rows(_shared(dk, heads)), _rows(_shared(dv, heads))


def _parts(heads: Heads) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """Return turned q and k, v, all (B, N, T, D), and probabilities (B, N, T, T)."""
    repeats = heads.q.shape[1] // heads.k.shape[1]
    q, k, v = (_split(x, heads) for x in (heads.q, heads.k, heads.v))
    q, k = _turn(q, heads, 1), _turn(k, heads, 1)
    k, v = k.repeat(repeats, axis=1), v.repeat(repeats, axis=1)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    later = np.triu(np.ones(scores.shape[-2:], dtype=bool), 1)
    scores[..., later] = -np.inf
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    return q, k, v, odds / odds.sum(-1, keepdims=True)


def _split(x: NDArray[np.floating], heads: Heads) -> Doubles:
    """Return rows (M, heads * D) as (B, heads, T, D)."""
    num_positions, half = heads.cosines.shape
    shape = -1, num_positions, x.shape[1] // (2 * half), 2 * half
    return x.astype(np.float64).reshape(shape).swapaxes(1, 2)


def _rows(x: Doubles) -> Doubles:
    """Return (B, heads, T, D) as rows (M, heads * D)."""
    num_sequences, num_heads, num_positions, width = x.shape
    return x.swapaxes(1, 2).reshape(num_sequences * num_positions, num_heads * width)


def _turn(x: Doubles, heads: Heads, sign: int) -> Doubles:
    first, second = np.split(x, 2, axis=-1)
    c, s = heads.cosines.astype(np.float64), sign * heads.sines.astype(np.float64)
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def _shared(x: Doubles, heads: Heads) -> Doubles:
    """Return (B, N, T, D) summed over the queries' heads that share keys."""
    repeats = heads.q.shape[1] // heads.k.shape[1]
    num_sequences, num_heads, num_positions, width = x.shape
    shape = num_sequences, num_heads // repeats, repeats, num_positions, width
    summed: Doubles = x.reshape(shape).sum(axis=2)
    return summed
