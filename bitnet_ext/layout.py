"""Which number of the flat vector belongs to which parameter; pure, no arrays.

A flat vector holds every trainable parameter of the model in one fixed order:
embeddings (tied with the head); per layer attn_norm, q, k, v, attn_sub_norm, o,
ffn_norm, gate, up, ffn_sub_norm, down; final norm. The hash of that order
travels in every frame, so that two processes with different models can never
mistake each other's bytes.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

DEFAULT_VOCAB_SIZE: Final = 5174


class SegmentKind(StrEnum):
    """What a segment is, which decides its init, its decay and its quantisation."""

    EMBEDDING = "embedding"  #: token table, also the output head; not quantised
    NORM = "norm"  #: RMSNorm gain; starts at 1, never decayed
    LINEAR = "linear"  #: BitLinear weight (out, in); ternary in the forward pass
    RESIDUAL = "residual"  #: BitLinear that writes to the residual stream


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of one BitNet b1.58 transformer (`BitNetForCausalLM`).

    Raises ValueError, naming field and value, when they do not fit together.
    """

    vocab_size: int = DEFAULT_VOCAB_SIZE
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    #: Tokens in one training sequence.
    seq_len: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    #: `silu` (default) or `relu2`, inside the gated feed-forward block.
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "seq_len",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a positive integer, got {value!r}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * num_heads, got "
                f"{self.hidden_size} with num_heads {self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got "
                f"{self.num_heads} with num_kv_heads {self.num_kv_heads}"
            )
        if self.hidden_act not in ("silu", "relu2"):
            raise ValueError(
                f"hidden_act must be silu or relu2, got {self.hidden_act!r}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Width of the key and of the value projection."""
        return self.num_kv_heads * self.head_dim


#: The named sizes. The tokenizer of the corpus replaces `vocab_size`.
PRESETS: Final[dict[str, ModelShape]] = {
    "tiny": ModelShape(
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        seq_len=128,
    ),
    "small": ModelShape(
        hidden_size=256,
        intermediate_size=1024,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        seq_len=128,
    ),
    "medium": ModelShape(
        hidden_size=512,
        intermediate_size=2048,
        num_layers=12,
        num_heads=16,
        num_kv_heads=16,
        seq_len=128,
    ),
    "large": ModelShape(
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        seq_len=256,
    ),
}


class UnknownPresetError(ValueError):
    """There is no preset of that name."""


def preset_shape(name: str, *, vocab_size: int = DEFAULT_VOCAB_SIZE) -> ModelShape:
    """Return the shape of a preset with this vocabulary.

    Raises UnknownPresetError that names the nearest preset.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise UnknownPresetError(
            f"preset must be one of {', '.join(PRESETS)}; "
            f"got {name!r}, did you mean {near!r}?"
        )
    return replace(PRESETS[name], vocab_size=vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One named run of numbers within the flat vector."""

    name: str
    kind: SegmentKind
    shape: tuple[int, ...]
    #: Index of its first number.
    offset: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_linear(self) -> bool:
        """Whether it is a BitLinear weight: a matrix, ternary in the forward pass."""
        return self.kind in (SegmentKind.LINEAR, SegmentKind.RESIDUAL)


def _named_shapes(
    shape: ModelShape,
) -> Iterator[tuple[str, SegmentKind, tuple[int, ...]]]:
    hidden, wide, kv = shape.hidden_size, shape.intermediate_size, shape.kv_size
    norm, linear = SegmentKind.NORM, SegmentKind.LINEAR
    residual = SegmentKind.RESIDUAL
    yield "embeddings", SegmentKind.EMBEDDING, (shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        prefix = f"layers.{layer}."
        yield prefix + "attn_norm", norm, (hidden,)
        yield prefix + "q", linear, (hidden, hidden)
        yield prefix + "k", linear, (kv, hidden)
        yield prefix + "v", linear, (kv, hidden)
        yield prefix + "attn_sub_norm", norm, (hidden,)
        yield prefix + "o", residual, (hidden, hidden)
        yield prefix + "ffn_norm", norm, (hidden,)
        yield prefix + "gate", linear, (wide, hidden)
        yield prefix + "up", linear, (wide, hidden)
        yield prefix + "ffn_sub_norm", norm, (wide,)
        yield prefix + "down", residual, (hidden, wide)
    yield "final_norm", norm, (hidden,)


@lru_cache(maxsize=64)
def segments(shape: ModelShape) -> tuple[Segment, ...]:
    """Return the segments of the flat vector, in order and without gaps."""
    found, offset = [], 0
    for name, kind, dims in _named_shapes(shape):
        segment = Segment(name=name, kind=kind, shape=dims, offset=offset)
        found.append(segment)
        offset += segment.size
    return tuple(found)


def num_params(shape: ModelShape) -> int:
    """Return the length of the flat vector."""
    last = segments(shape)[-1]
    return last.offset + last.size


@lru_cache(maxsize=64)
def layout_hash(shape: ModelShape) -> bytes:
    """Return the 32 bytes that identify this shape and the order of its segments.

    SHA-256 over one line for each field of the shape and for each segment:
    whatever changes the meaning of a number changes the hash.
    """
    lines = [f"{name}={value}" for name, value in sorted(asdict(shape).items())]
    lines += [
        f"{segment.name} {segment.kind} {segment.shape} @{segment.offset}"
        for segment in segments(shape)
    ]
    return hashlib.sha256("\n".join(lines).encode()).digest()


def shape_to_json(shape: ModelShape) -> dict[str, Any]:
    """Return the shape as a JSON object."""
    return asdict(shape)


def shape_from_json(body: dict[str, Any]) -> ModelShape:
    """Return the shape that `shape_to_json` wrote; raises ValueError on others."""
    try:
        return ModelShape(**body)
    except TypeError as error:
        raise ValueError(f"model must be a model shape, got {body!r}") from error
