"""The forward pass of a finished model, without torch: logits of every position.

Verification of exports, scoring of files and the start of a generated text use it. Its
products are those of training; only the head is float32, as where versions are scored.

Letters in shapes: T tokens, H hidden, V words, N rows of a weight, K its columns, D
width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet_ext import fused, ternary
from bitnet_ext.attention import Heads, attend
from bitnet_ext.fused import Gate, NormInput
from bitnet_ext.layout import ModelShape, num_params, segments
from bitnet_ext.operands import PackedTernary
from bitnet_ext.ternary import QuantisedRows

Floats = NDArray[np.float32]
Ids = Sequence[int] | NDArray[np.integer[Any]]

GATES: Final = {"silu": Gate.SILU, "relu2": Gate.SQUARED_RELU}
#: Columns that share a scale in the activations of llama.cpp.
_BLOCK: Final = 256


class Numerics(StrEnum):
    """Where a forward pass rounds."""

    #: Activations to int8 with a scale for each token; all else float32.
    OWN = "own"
    #: Activations to int8 with a scale for each 256 columns. Queries, keys, values,
    #: probabilities and what the head multiplies to fp16.
    LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True, slots=True)
class TernaryMatrix:
    """A linear weight as exported folders hold it."""

    #: int8 (N, K) of -1, 0, 1.
    values: NDArray[np.int8]
    #: The value of +1.
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The parameters of one layer; their names are those of the layout."""

    attn_norm: Floats
    q: PackedTernary
    k: PackedTernary
    v: PackedTernary
    attn_sub_norm: Floats
    o: PackedTernary
    ffn_norm: Floats
    gate: PackedTernary
    up: PackedTernary
    ffn_sub_norm: Floats
    down: PackedTernary


#: Is told the turned keys and the values, float32 (T, K * D), of each layer in turn.
Keep = Callable[[int, Floats, Floats], None]


class Model:
    """A whole model with packed weights; nothing in it changes."""

    def __init__(
        self,
        shape: ModelShape,
        embeddings_VH: Floats,
        layers: Sequence[Layer],
        final_norm_H: Floats,
    ) -> None:
        self.shape = shape
        self.embeddings = embeddings_VH
        self.layers = tuple(layers)
        self.final_norm = final_norm_H

    @classmethod
    def from_flat(cls, shape: ModelShape, flat: Floats) -> Model:
        """Return the model of a flat vector, float32 in the order of the layout.

        Raises ValueError when it has another type or length.
        """
        if flat.dtype != np.float32 or flat.shape != (num_params(shape),):
            raise ValueError(
                f"flat must be float32 ({num_params(shape)},), "
                f"got {flat.dtype} {flat.shape}"
            )
        parts = {
            part.name: flat[part.offset : part.offset + part.size].reshape(part.shape)
            for part in segments(shape)
        }
        return cls.from_parts(shape, parts)

    @classmethod
    def from_parts(
        cls, shape: ModelShape, parts: Mapping[str, Floats | TernaryMatrix]
    ) -> Model:
        """Return the model of named parts, one for each segment of the layout.

        Linear weights may be ternary already; float32 ones are quantised. Raises
        ValueError that names a part which is missing, unknown or misshaped.
        """
        expected = segments(shape)
        for name in sorted(parts.keys() ^ {part.name for part in expected}):
            known = "missing" if name not in parts else "unknown"
            raise ValueError(f"parts must be those of the layout: {name!r} is {known}")
        ready: dict[str, Any] = {}
        for part in expected:
            take = _packed if part.is_linear else _floats
            ready[part.name] = take(part.name, parts[part.name], part.shape)
        layers = [
            Layer(
                **{
                    field: ready[f"layers.{number}.{field}"]
                    for field in Layer.__dataclass_fields__
                }
            )
            for number in range(shape.num_layers)
        ]
        return cls(shape, ready["embeddings"], layers, ready["final_norm"])

    def logits(
        self, ids: Ids, *, numerics: Numerics = Numerics.OWN, threads: int = 1
    ) -> Floats:
        """Return float32 (T, V): row t is what follows the ids up to and with t.

        T may exceed the length of training sequences. Raises ValueError when there
        are no ids, or one is out of range.
        """
        rules = _rules(numerics, threads)
        return rules.logits(self._hidden(ids, rules), self.embeddings)

    def start(self, ids: Ids, keep: Keep, *, threads: int = 1) -> Floats:
        """Return the last position's state after the final norm, float32 (H,).

        `keep` gets what later positions attend to. Raises ValueError as `logits`.
        """
        last: Floats = self._hidden(ids, _Own(threads), keep)[-1]
        return last

    def _hidden(self, ids: Ids, rules: _Rules, keep: Keep | None = None) -> Floats:
        """Return the states after the final norm, float32 (T, H)."""
        checked = check_ids(ids, self.shape.vocab_size)
        angles = rotary_angles(self.shape, len(checked))
        x_TH = self.embeddings[checked]
        for number, layer in enumerate(self.layers):
            x_TH = self._layer(x_TH, layer, angles, rules, keep and _at(number, keep))
        return fused.norm(x_TH, self.final_norm, self.shape.rms_norm_eps)[0]

    def _layer(
        self,
        x_TH: Floats,
        layer: Layer,
        angles: tuple[Floats, Floats],
        rules: _Rules,
        keep: Callable[[Floats, Floats], None] | None,
    ) -> Floats:
        eps = self.shape.rms_norm_eps
        rows = rules.rows(NormInput(x_TH), layer.attn_norm, eps)
        q, k, v = (rules.product(rows, w) for w in (layer.q, layer.k, layer.v))
        if keep is not None:
            keep(turned(k, *angles), v)
        mixed = rules.attend(Heads(q, k, v, *angles))
        rows = rules.rows(NormInput(mixed), layer.attn_sub_norm, eps)
        x_TH = x_TH + rules.product(rows, layer.o)
        rows = rules.rows(NormInput(x_TH), layer.ffn_norm, eps)
        gate, up = (rules.product(rows, w) for w in (layer.gate, layer.up))
        gated = NormInput(gate, up, GATES[self.shape.hidden_act])
        rows = rules.rows(gated, layer.ffn_sub_norm, eps)
        return x_TH + rules.product(rows, layer.down)


class _Rules(Protocol):
    """The steps in which numerics differ."""

    def rows(self, x: NormInput, gain_K: Floats, eps: float) -> QuantisedRows: ...
    def product(self, rows: QuantisedRows, weight: PackedTernary) -> Floats: ...
    def attend(self, heads: Heads) -> Floats: ...
    def logits(self, hidden_TH: Floats, embeddings_VH: Floats) -> Floats: ...


def _rules(numerics: Numerics, threads: int) -> _Rules:
    return _Own(threads) if numerics is Numerics.OWN else _LlamaCpp(threads)


class _Own:
    """As in training."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def rows(self, x: NormInput, gain_K: Floats, eps: float) -> QuantisedRows:
        return fused.norm_quantise(x, gain_K, eps, threads=self._threads)[0]

    def product(self, rows: QuantisedRows, weight: PackedTernary) -> Floats:
        return ternary.matmul(rows, weight, threads=self._threads)

    def attend(self, heads: Heads) -> Floats:
        return attend(heads, threads=self._threads).mixed

    def logits(self, hidden_TH: Floats, embeddings_VH: Floats) -> Floats:
        logits_TV: Floats = hidden_TH @ embeddings_VH.T
        return logits_TV


class _LlamaCpp(_Own):
    """As llama.cpp computes files of TQ1_0 and TQ2_0 with fp16 embeddings and cache."""

    def rows(self, x: NormInput, gain_K: Floats, eps: float) -> QuantisedRows:
        opened = x.x
        if x.up is not None:
            opened = _activated(x.x, x.gate) * x.up
        return ternary.quantise_rows(fused.norm(opened, gain_K, eps)[0], _BLOCK)

    def attend(self, heads: Heads) -> Floats:
        q = _half(turned(heads.q, heads.cosines, heads.sines))
        k = _half(turned(heads.k, heads.cosines, heads.sines))
        v, width = _half(heads.v), 2 * heads.cosines.shape[1]
        later = np.triu(np.full((len(q), len(q)), -np.inf, dtype=np.float32), 1)
        mixed = np.empty_like(q)
        repeats = q.shape[1] // k.shape[1]
        for head in range(q.shape[1] // width):
            own = slice(head * width, (head + 1) * width)
            shared = slice(head // repeats * width, (head // repeats + 1) * width)
            scores = q[:, own] @ k[:, shared].T * np.float32(width**-0.5) + later
            odds = np.exp(scores - scores.max(axis=1, keepdims=True))
            odds /= odds.sum(axis=1, keepdims=True)
            mixed[:, own] = _half(odds) @ v[:, shared]
        return mixed

    def logits(self, hidden_TH: Floats, embeddings_VH: Floats) -> Floats:
        return super().logits(_half(hidden_TH), _half(embeddings_VH))


def rotary_angles(shape: ModelShape, num_tokens: int) -> tuple[Floats, Floats]:
    """Return cosines and sines of the first positions, float32 (T, D / 2).

    Number i of a head's first half pairs with number i of its second; position t
    turns them by t * theta ** (-2 i / D). Su et al., RoFormer, arXiv 2104.09864.
    """
    half = shape.head_dim // 2
    rates = shape.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.outer(np.arange(num_tokens, dtype=np.float64), rates)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def turned(x: Floats, cosines: Floats, sines: Floats) -> Floats:
    """Return rows (T, heads * D) turned by the angles of their positions."""
    num_tokens, half = cosines.shape
    halves = x.reshape(num_tokens, -1, 2, half)
    first, second = halves[:, :, 0], halves[:, :, 1]
    c, s = cosines[:, None], sines[:, None]
    parts = np.stack([first * c - second * s, second * c + first * s], axis=2)
    return parts.reshape(x.shape)


def check_ids(ids: Ids, vocab_size: int) -> NDArray[np.int64]:
    """Return ids as int64 (T,); raises ValueError for none, or one out of range."""
    try:
        checked = np.asarray(ids, dtype=np.int64)
    except OverflowError:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise out_of_range(wrong, vocab_size) from None
    if checked.ndim != 1 or not checked.size:
        raise ValueError("ids must hold at least one id, got none")
    for token in checked[(checked < 0) | (checked >= vocab_size)]:
        raise out_of_range(token, vocab_size)
    return checked


def out_of_range(token: int, vocab_size: int) -> ValueError:
    """Return the error of an id that no word has."""
    return ValueError(f"ids must be from 0 to {vocab_size - 1}, got {token}")


def _at(number: int, keep: Keep) -> Callable[[Floats, Floats], None]:
    return lambda keys, values: keep(number, keys, values)


def _activated(x: Floats, gate: Gate) -> Floats:
    if gate is Gate.SILU:
        with np.errstate(over="ignore"):  # an infinity below makes the zero it should
            return np.divide(x, np.float32(1) + np.exp(-x), dtype=np.float32)
    return np.square(np.maximum(x, np.float32(0)))


def _half(x: Floats) -> Floats:
    """Return numbers rounded to fp16, as float32; what is too large is infinite."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def _packed(
    name: str, part: Floats | TernaryMatrix, shape: tuple[int, ...]
) -> PackedTernary:
    if isinstance(part, TernaryMatrix):
        if part.values.shape != shape or part.values.dtype != np.int8:
            raise _misfit(name, part.values, shape, "int8")
        return PackedTernary.of(part.values, part.scale)
    return ternary.quantise_weight(_floats(name, part, shape)).forward


def _floats(name: str, part: Floats | TernaryMatrix, shape: tuple[int, ...]) -> Floats:
    if isinstance(part, TernaryMatrix):
        raise ValueError(f"part {name!r} must be float32, got a ternary matrix")
    if part.shape != shape or part.dtype != np.float32:
        raise _misfit(name, part, shape, "float32")
    return np.ascontiguousarray(part)


def _misfit(
    name: str, found: NDArray[Any], shape: tuple[int, ...], dtype: str
) -> ValueError:
    return ValueError(
        f"part {name!r} must be {dtype} {shape}, got {found.dtype} {found.shape}"
    )
