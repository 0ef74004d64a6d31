"""The plain NumPy twin of decoding: no cache, no packing, the meaning of each number.

Norms, gate and attention are float64 and rounded once, so a number may be rounded to
the next int8 than in the kernels: tests allow for that. Nothing else uses it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitnet_ext import reference, reference_attention
from bitnet_ext.attention import Heads
from bitnet_ext.fused import Gate
from bitnet_ext.infer import GATES, Ids, Layer, Model, rotary_angles
from bitnet_ext.operands import PackedTernary
from bitnet_ext.ternary import QuantisedRows

Floats = NDArray[np.float32]


def decode(model: Model, ids: Ids) -> Floats:
    """Return the logits (T, V) that decoding gives after each of the ids."""
    eps = model.shape.rms_norm_eps
    x_TH = model.embeddings[np.asarray(ids)]
    for layer in model.layers:
        x_TH = _layer(model, layer, x_TH)
    hidden = _rounded(_norm(x_TH, model.final_norm, eps))
    words = _rounded(model.embeddings)
    return reference.matmul(hidden, words.q, 1.0) * words.scale.T


def _layer(model: Model, layer: Layer, x_TH: Floats) -> Floats:
    eps, gate_kind = model.shape.rms_norm_eps, GATES[model.shape.hidden_act]
    rows = _rounded(_norm(x_TH, layer.attn_norm, eps))
    q, k, v = (_product(rows, weight) for weight in (layer.q, layer.k, layer.v))
    heads = Heads(q, k, v, *rotary_angles(model.shape, len(x_TH)))
    mixed = reference_attention.attend(heads).astype(np.float32)
    rows = _rounded(_norm(mixed, layer.attn_sub_norm, eps))
    x_TH = x_TH + _product(rows, layer.o)
    rows = _rounded(_norm(x_TH, layer.ffn_norm, eps))
    gate, up = (_product(rows, w).astype(np.float64) for w in (layer.gate, layer.up))
    if gate_kind is Gate.SILU:
        opened = gate / (1 + np.exp(-gate)) * up
    else:
        opened = np.maximum(gate, 0) ** 2 * up
    rows = _rounded(_norm(opened, layer.ffn_sub_norm, eps))
    return x_TH + _product(rows, layer.down)


def _norm(x: NDArray[np.floating], gain: Floats, eps: float) -> Floats:
    wide = x.astype(np.float64)
    square = np.mean(wide * wide, axis=1, keepdims=True)
    normed: Floats = (wide / np.sqrt(square + eps) * gain).astype(np.float32)
    return normed


def _rounded(x: Floats) -> QuantisedRows:
    return reference.quantise_rows(x, x.shape[1])


def _product(rows: QuantisedRows, weight: PackedTernary) -> Floats:
    return reference.matmul(rows, weight.values(), weight.scale)
