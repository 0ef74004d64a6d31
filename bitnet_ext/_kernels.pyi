"""Types of the compiled kernels; see `_kernels.pyx`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

def known_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def selected_isa() -> str: ...
def select_isa(name: str) -> None: ...
def multiply(
    q: NDArray[np.int8],
    row_scale: Floats,
    group_k4: int,
    tiles: NDArray[np.uint8],
    scale: float,
    out: Floats,
    accumulate: bool,
    threads: int,
) -> int: ...
def narrow_tiles(
    tiles: NDArray[np.uint8], num_rows: int, num_columns: int, blocks: NDArray[np.uint8]
) -> None: ...
def multiply_narrow(
    q: NDArray[np.int8],
    row_scale: Floats,
    blocks: NDArray[np.uint8],
    scale: float,
    out: Floats,
    accumulate: bool,
    threads: int,
) -> int: ...
def pack_tokens(
    q: NDArray[np.int8], tiles: NDArray[np.uint8], threads: int
) -> None: ...
def weight_gradient(
    dy: Floats,
    token_scale: Floats,
    tiles: NDArray[np.uint8],
    into: Floats,
    accumulate: bool,
    q: NDArray[np.int8] | None,
    scale: Floats | None,
    group: int,
    threads: int,
) -> int: ...
def quantise_rows(
    x: Floats, group: int, q: NDArray[np.int8], scale: Floats
) -> None: ...
def quantise_weight(
    w: Floats, forward: NDArray[np.uint8], backward: NDArray[np.uint8]
) -> tuple[int, float]: ...
def encode_int8(
    x: Floats,
    minus: Floats | None,
    residual: Floats | None,
    payload: NDArray[np.uint8],
    lost: Floats | None,
) -> int: ...
def decode_int8(payload: NDArray[np.uint8], out: Floats) -> int: ...
def check_int8(payload: NDArray[np.uint8], count: int) -> int: ...
def add_int8(payload: NDArray[np.uint8], weight: float, into: Floats) -> None: ...
def encode_trits(
    x: Floats,
    minus: Floats | None,
    residual: Floats | None,
    payload: NDArray[np.uint8],
    lost: Floats | None,
) -> int: ...
def check_trits(payload: NDArray[np.uint8], count: int) -> int: ...
def add_trits(payload: NDArray[np.uint8], weight: float, into: Floats) -> None: ...
def dot_int8(payload: NDArray[np.uint8], vector: Floats) -> float: ...
def dot_fp32(values: NDArray[np.uint8], vector: Floats) -> float: ...
def dot_trits(payload: NDArray[np.uint8], vector: Floats) -> float: ...
def check_fp32(values: NDArray[np.uint8]) -> int: ...
def add_fp32(values: NDArray[np.uint8], weight: float, into: Floats) -> None: ...
def to_half(x: Floats, out: NDArray[np.uint16], is_bf16: bool) -> int: ...
def from_half(x: NDArray[np.uint16], out: Floats, is_bf16: bool) -> int: ...
def pack2(values: NDArray[np.int8], out: NDArray[np.uint8]) -> int: ...
def unpack2(codes: NDArray[np.uint8], out: NDArray[np.int8]) -> int: ...
def pack3(values: NDArray[np.int8], out: NDArray[np.uint8]) -> int: ...
def unpack3(codes: NDArray[np.uint8], out: NDArray[np.int8]) -> int: ...
def most_parts() -> int: ...
def outer_step(
    payloads: list[NDArray[np.uint8]],
    are_int8: list[bool],
    shares: Floats,
    mean: Floats | None,
    before: tuple[Floats, Floats],
    rate: float,
    decay: float,
    after: tuple[Floats, Floats],
    threads: int,
) -> tuple[int, bool]: ...
def norm_quantise(
    x: Floats,
    up: Floats | None,
    gain: Floats,
    eps: float,
    gate: int,
    inverse: Floats,
    q: NDArray[np.int8],
    scale: Floats,
    threads: int,
) -> int: ...
def norm_forward(
    x: Floats, gain: Floats, eps: float, inverse: Floats, y: Floats, threads: int
) -> int: ...
def norm_backward(
    dy: Floats,
    x: Floats,
    up: Floats | None,
    gain: Floats,
    inverse: Floats,
    gate: int,
    dx: Floats,
    dup: Floats | None,
    add: bool,
    dgain: Floats,
    threads: int,
) -> int: ...
def softmax_backward_fp32(
    logits: Floats,
    targets: NDArray[np.int64],
    scale: float,
    nats: Floats,
    threads: int,
) -> int: ...
def softmax_backward_bf16(
    logits: NDArray[np.uint16],
    targets: NDArray[np.int64],
    scale: float,
    nats: Floats,
    threads: int,
) -> int: ...
def square_sum(x: Floats, threads: int) -> tuple[int, float]: ...
def adamw_step(
    value: Floats,
    grad: Floats,
    mean: Floats,
    square: Floats,
    clip: float,
    keep: float,
    rate: float,
    root: float,
    beta1: float,
    beta2: float,
    eps: float,
    threads: int,
) -> None: ...
def add_rows(x: Floats, ids: NDArray[np.int64], into: Floats) -> None: ...

class HeadTable:
    def __init__(
        self,
        values: Floats,
        word_scale: Floats,
        q: NDArray[np.int8],
        forward: NDArray[np.uint8],
        backward: NDArray[np.uint8],
        threads: int,
    ) -> None: ...

class HeadTokens:
    def __init__(
        self,
        num_v: int,
        num_h: int,
        at_target: Floats,
        scale: Floats,
        q: NDArray[np.int8],
        blocks: NDArray[np.int8],
        word_scale: Floats,
        start: NDArray[np.int32],
    ) -> None: ...

def head_loss(
    table: HeadTable,
    tokens: HeadTokens,
    hidden: Floats,
    targets: NDArray[np.int64],
    scale: float,
    nats: Floats,
    dhidden: Floats,
    threads: int,
) -> int: ...
def head_table_gradient(
    tokens: HeadTokens,
    hidden: Floats,
    targets: NDArray[np.int64],
    factor: float,
    into: Floats,
    threads: int,
) -> int: ...
def attend(
    q: Floats,
    k: Floats,
    v: Floats,
    cosines: Floats,
    sines: Floats,
    mixed: Floats,
    lse: Floats,
    threads: int,
) -> int: ...
def attend_backward(
    q: Floats,
    k: Floats,
    v: Floats,
    cosines: Floats,
    sines: Floats,
    mixed: Floats,
    lse: Floats,
    dmixed: Floats,
    dq: Floats,
    dk: Floats,
    dv: Floats,
    threads: int,
) -> int: ...

class Decoder:
    def __init__(
        self,
        sizes: tuple[int, int, int, int],
        embeddings: Floats,
        head: tuple[Floats, NDArray[np.uint8], Floats],
        angles: tuple[Floats, Floats],
        norms: list[tuple[Floats, ...]],
        weights: list[tuple[tuple[NDArray[np.uint8], int, int, float], ...]],
        keys: Floats,
        values: Floats,
        eps: float,
        gate: int,
    ) -> None: ...
    def step(self, token: int, position: int, logits: Floats, threads: int) -> int: ...
    def head(self, hidden: Floats, logits: Floats, threads: int) -> int: ...
