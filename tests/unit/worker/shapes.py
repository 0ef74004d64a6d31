"""Small models for tests: shapes, seeded weights, tasks, and the model's plain twin.

The twin is the same transformer as a user of torch would write it: fp32
fake-quantisation, autograd, nothing fused. It shares no code with the worker.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bitnet_ext.layout import ModelShape, SegmentKind, num_params, segments
from bitnet_ext.wire.messages import HyperParameters, Task
from bitnet_ext.wire.verdicts import Optimiser, TaskKind
from worker.model.transformer import BitNetModel
from worker.train import Hooks

SMALL = ModelShape(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    seq_len=16,
)
GROUPED = replace(SMALL, num_kv_heads=2, hidden_act="relu2")
EOT = 0

HYPER = HyperParameters(
    optimiser=Optimiser.ADAMW,
    momentum=0.95,
    lr_start=3e-3,
    lr_end=3e-3,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    clip_norm=1.0,
)


def seeded_weights(shape: ModelShape, seed: int = 0) -> NDArray[np.float32]:
    """Return matrices of small normal numbers and gains around one."""
    random = np.random.default_rng(seed)
    flat = np.empty(num_params(shape), dtype=np.float32)
    for segment in segments(shape):
        part = flat[segment.offset : segment.offset + segment.size]
        part[:] = random.normal(0.0, 0.05, segment.size)
        if segment.kind is SegmentKind.NORM:
            part += 1.0
    return flat


def loaded_model(shape: ModelShape = SMALL, seed: int = 0) -> BitNetModel:
    model = BitNetModel(shape)
    model.flat.load(seeded_weights(shape, seed))
    return model


def random_tokens(count: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(1, 64, count, dtype=np.int32)


def a_task(num_tokens: int, **changes: object) -> Task:
    """Return a training task of `num_tokens` inputs, with a fitting num_steps.

    They are the whole shard, but for one token more after a whole sequence.
    """
    fields = {"batch_size": 4, "seq_len": 16, "seed": 7, "hyper": HYPER} | changes
    is_whole = num_tokens % fields["seq_len"] == 0
    usual = {"block_size": 4, "shard_bytes": 4 * (num_tokens + is_whole)}
    fields = usual | fields
    num_windows = -(-num_tokens // fields["seq_len"])
    fields.setdefault("num_steps", -(-num_windows // fields["batch_size"]))
    return Task(
        task_id="t1",
        kind=TaskKind.TRAIN,
        lease_id="0" * 32,
        lease_s=60.0,
        run_id="r1",
        base_version=1,
        base_sha256="0" * 64,
        shard_id="train-00000",
        shard_sha256="0" * 64,
        byte_offset=0,
        byte_length=4 * num_tokens,
        synthetic=False,
        eot_id=EOT,
        codec="int8",
        **fields,
    )


def silent_hooks(**changes: object) -> Hooks:
    """Return hooks that do nothing, on a clock that advances a second a look."""
    seconds = iter(range(1_000_000))
    quiet = {
        "progress": lambda *_: None,
        "check": lambda: None,
        "enough": lambda: False,
        "clock": lambda: float(next(seconds)),
    }
    return Hooks(**(quiet | changes))


def plain_parameters(shape: ModelShape, flat: NDArray[np.float32]) -> dict[str, Tensor]:
    """Return separate leaf tensors, by the names of the layout."""
    return {
        segment.name: torch.from_numpy(
            flat[segment.offset : segment.offset + segment.size].copy()
        )
        .view(segment.shape)
        .requires_grad_()
        for segment in segments(shape)
    }


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return the BitLinear product by fp32 fake-quantisation, straight-through."""
    scale = weight.detach().abs().mean()
    ternary = (weight.detach() / scale.clamp(min=1e-5)).round().clamp(-1, 1) * scale
    step = x.detach().abs().amax(-1, keepdim=True) / 127
    rounded = (x.detach() / step.clamp(min=1e-30)).round() * step
    return functional.linear(
        x + (rounded - x).detach(), weight + (ternary - weight).detach()
    )


def plain_logits(shape: ModelShape, params: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Return the logits (B, T, V) of the twin."""
    x = params["embeddings"][ids]
    for layer in range(shape.num_layers):
        own = {
            name.split(".")[2]: value
            for name, value in params.items()
            if name.startswith(f"layers.{layer}.")
        }
        x = x + _plain_attention(shape, own, _plain_norm(x, own["attn_norm"]))
        x = x + _plain_feed_forward(shape, own, _plain_norm(x, own["ffn_norm"]))
    return _plain_norm(x, params["final_norm"]) @ params["embeddings"].T


def plain_loss(
    shape: ModelShape, params: dict[str, Tensor], ids: Tensor, targets: Tensor
) -> Tensor:
    logits = plain_logits(shape, params, ids)
    return functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1
    )


def _plain_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * gain


def _plain_attention(shape: ModelShape, own: dict[str, Tensor], x: Tensor) -> Tensor:
    num_tokens, width = x.shape[1], shape.head_dim
    q, k, v = (
        plain_linear(x, own[name]).unflatten(-1, (-1, width)).transpose(1, 2)
        for name in "qkv"
    )
    repeat = shape.num_heads // shape.num_kv_heads
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = _plain_rotary(shape, q) @ _plain_rotary(shape, k).mT / width**0.5
    future = torch.ones(num_tokens, num_tokens).triu(1).bool()
    mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    mixed = _plain_norm(mixed.transpose(1, 2).flatten(2), own["attn_sub_norm"])
    return plain_linear(mixed, own["o"])


def _plain_feed_forward(shape: ModelShape, own: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up = plain_linear(x, own["gate"]), plain_linear(x, own["up"])
    gate = functional.silu(gate) if shape.hidden_act == "silu" else gate.relu() ** 2
    return plain_linear(_plain_norm(gate * up, own["ffn_sub_norm"]), own["down"])


def _plain_rotary(shape: ModelShape, x: Tensor) -> Tensor:
    """Rotate-half on (B, N, T, D)."""
    half = shape.head_dim // 2
    rates = shape.rope_theta ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(x.shape[2]), torch.cat([rates, rates]))
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + turned * angles.sin()
