"""The plain NumPy twin of the int8 head: slow, short, and the meaning of each number.

Tests hold the kernels to it bit for bit; nothing else uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet_ext import reference
from bitnet_ext.head import FINER, WORDS
from bitnet_ext.ternary import TOKENS, QuantisedRows

Floats = NDArray[np.float32]

_LANES = 16


@dataclass(frozen=True, slots=True)
class HeadResult:
    """What the head gives for M tokens and a table (V, H)."""

    #: float32 (M); up to the rounding of one logarithm each.
    nats: Floats
    #: float32 (M, H).
    dhidden: Floats
    #: float32 (V, H).
    dtable: Floats


def head(
    table_VH: Floats,
    hidden_MH: Floats,
    targets_M: NDArray[np.int64],
    scale: float,
    into_VH: Floats,
    factor: float,
) -> HeadResult:
    """Return loss and gradients times `scale`; the table's times `factor`, added."""
    words = reference.quantise_rows(table_VH, table_VH.shape[1])
    tokens = reference.quantise_rows(hidden_MH, hidden_MH.shape[1])
    logits_MV = reference.matmul(tokens, words.q, 1.0) * words.scale.T
    rows = [
        _turn(row, target, scale)
        for row, target in zip(logits_MV, targets_M, strict=True)
    ]
    odds_MV = np.stack([row for row, _, _ in rows])
    at_target_M = np.array([at_target for _, at_target, _ in rows], dtype=np.float32)
    columns = reference.quantise_rows((odds_MV * tokens.scale).T.copy(), TOKENS)
    dtable_VH = reference.matmul(columns, tokens.q.T, factor, into_VH.copy())
    dhidden_MH = _dhidden(odds_MV, words)
    for m, target in enumerate(targets_M):
        if target >= 0:
            dhidden_MH[m] += table_VH[target] * at_target_M[m]
            dtable_VH[target] += hidden_MH[m] * (at_target_M[m] * np.float32(factor))
    rest_VH = table_VH - words.scale * words.q.astype(np.float32)
    _take_pull_back(dhidden_MH, columns, rest_VH, at_target_M)
    nats_M = np.array([nats for _, _, nats in rows], dtype=np.float32)
    return HeadResult(nats_M, dhidden_MH, dtable_VH)


def _turn(logits_V: Floats, target: int, scale: float) -> tuple[Floats, float, float]:
    """Return the gradient without its target's entry, that entry, and the nats."""
    if target < 0:
        return np.zeros_like(logits_V), 0.0, 0.0
    shifted = logits_V - logits_V.max()
    e = exponential(shifted)
    padded = np.pad(e, (0, -len(e) % _LANES)).reshape(-1, _LANES)
    total = _total(np.add.accumulate(padded, axis=0)[-1])
    odds_V = e * (np.float32(scale) / total)
    at_target = odds_V[target] - np.float32(scale)
    odds_V[target] = 0
    return odds_V, at_target, np.log(total) - shifted[target]


def exponential(x: Floats) -> Floats:
    """Return e**x as the kernels round it; x from -87 to 88, beyond it that end."""
    x = np.clip(x, np.float32(-87), np.float32(88))
    rounder = np.float32(12582912)
    shifted = x * np.float32(1.44269504) + rounder
    n = shifted - rounder
    x = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = x * np.float32(1.9875691500e-4) + np.float32(1.3981999507e-3)
    for term in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * x + np.float32(term)
    y = y * x * x + x + np.float32(1)
    power: Floats = (y.view(np.int32) + (shifted.view(np.int32) << 23)).view(np.float32)
    return power


def _total(lanes: Floats) -> np.float32:
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    total: np.float32 = lanes[0]
    return total


def split(values_MV: Floats) -> tuple[QuantisedRows, QuantisedRows]:
    """Return rows as int8 with a scale for `WORDS` words, and what that left over."""
    high = reference.quantise_rows(values_MV, WORDS)
    low_q = np.zeros_like(high.q)
    for g, start in enumerate(range(0, values_MV.shape[1], WORDS)):
        part = slice(start, start + WORDS)
        largest = np.abs(values_MV[:, part]).max(axis=1)
        plain = high.scale[:, g] > 0
        inverse = np.float32(127) / largest[plain]
        ratio = values_MV[plain, part] * inverse[:, None]
        low_q[plain, part] = np.rint((ratio - np.rint(ratio)) * np.float32(FINER))
    return high, QuantisedRows(low_q, high.scale, WORDS)


def _dhidden(odds_MV: Floats, words: QuantisedRows) -> Floats:
    """Return what all words but the targets give to the hidden states."""
    high, low = split(odds_MV * words.scale.T)
    finer = float(np.float32(1) / np.float32(FINER))
    return reference.matmul(
        low, words.q.T, finer, reference.matmul(high, words.q.T, 1.0)
    )


def _take_pull_back(
    dhidden_MH: Floats, columns: QuantisedRows, rest_VH: Floats, at_target_M: Floats
) -> None:
    """Take back, in place, what rounding the words did to the mean token."""
    weight_V = np.zeros(len(rest_VH), dtype=np.float32)
    for g in range(columns.scale.shape[1]):
        sums = columns.q[:, g * TOKENS : (g + 1) * TOKENS].sum(axis=1, dtype=np.int32)
        weight_V += columns.scale[:, g] * sums.astype(np.float32)
    pull = np.zeros(rest_VH.shape[1] + 1, dtype=np.float32)
    for start in range(0, len(rest_VH), WORDS):
        some = np.zeros_like(pull)
        for v in range(start, min(start + WORDS, len(rest_VH))):
            some[:-1] += rest_VH[v] * weight_V[v]
            some[-1] += weight_V[v]
        pull = pull + some
    if pull[-1]:
        dhidden_MH += pull[:-1] * (-at_target_M / pull[-1])[:, None]
