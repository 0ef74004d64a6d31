"""How far our gradients are from exact ones for the same forward pass.

Next to an ordinary fp32 fake-quantised run one would mostly see roundings that fall
to the other side: an activation near a half, one step of int8 apart, is a difference
of the forward passes and no error of the backward pass. So each BitLinear of the
fp32 reference is given the very activations that our forward pass quantised; what
differs then is the arithmetic of the backward pass.
"""

from __future__ import annotations

import statistics
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional

from bitnet_ext.layout import PRESETS, ModelShape, Segment, SegmentKind, segments
from coordinator.domain.initial import initial_weights
from tests.bench import ours
from tests.bench.peers.plain import BitLinear, Transformer, fake_quantise_weight
from tests.bench.peers.recipes import load
from tests.bench.report import Figures, print_table
from tests.bench.text import batches, real_tokens

PRESET = "small"


class ForcedBitLinear(BitLinear):
    """The plain layer, with the values of its input replaced by `forced`."""

    forced: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N); the gradient goes to x as through the plain rounding."""
        replaced = _Replaced.apply(x, self.forced)
        return functional.linear(replaced, fake_quantise_weight(self.weight))


class _Replaced(torch.autograd.Function):
    """Other values, the same gradient; x + (other - x) would round once more."""

    @staticmethod
    def forward(ctx: object, x: Tensor, other: Tensor) -> Tensor:
        return other.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def measure(figures: Figures, *, quick: bool) -> None:
    """Compare after some steps on real text, when gradients are no longer noise."""
    shape, num_steps = PRESETS[PRESET], 10 if quick else 60
    trainer = ours.OurTrainer(shape, initial_weights(shape, seed=0))
    text = batches(real_tokens(shape.vocab_size), 8, shape.seq_len)
    for ids, targets in islice(text, num_steps):
        trainer.step(ids, targets)
    ids, targets = next(text)
    own, inputs = ours.gradients_and_inputs(trainer.model, ids, targets)
    exact = reference(shape, trainer.model.flat.values, inputs, ids, targets)
    errors = {
        segment.name: relative_error(_part(own, segment), _part(exact, segment))
        for segment in segments(shape)
    }
    linear = {
        segment.name: errors[segment.name]
        for segment in segments(shape)
        if segment.kind in (SegmentKind.LINEAR, SegmentKind.RESIDUAL)
    }
    worst = max(linear, key=lambda name: linear[name])
    figures.put("gradient_error", relative_error(own, exact))
    figures.put("gradient_error_median", statistics.median(errors.values()))
    figures.put("gradient_error_worst", linear[worst])
    _print(num_steps, relative_error(own, exact), errors, worst)


def reference(
    shape: ModelShape,
    weights: Tensor,
    inputs: dict[str, Tensor],
    ids: Tensor,
    targets: Tensor,
) -> Tensor:
    """Return the fp32 gradient, flat in layout order, with those BitLinear inputs."""
    model = Transformer(shape, linear=ForcedBitLinear)
    load(model, weights)
    for name, module in model.named_modules():
        if isinstance(module, ForcedBitLinear):
            module.forced = inputs[name]
    model.loss(ids, targets).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def relative_error(own: Tensor, exact: Tensor) -> float:
    """Return |own - exact| / |exact|, Frobenius norms."""
    return ((own - exact).norm() / exact.norm()).item()


def _part(flat: Tensor, segment: Segment) -> Tensor:
    return flat[segment.offset : segment.offset + segment.size]


def _print(num_steps: int, total: float, errors: dict[str, float], worst: str) -> None:
    of_all = max(errors, key=lambda name: errors[name])
    rows = [
        ["total", f"{100 * total:.2f} %"],
        ["median tensor", f"{100 * statistics.median(errors.values()):.2f} %"],
        [f"worst BitLinear ({worst})", f"{100 * errors[worst]:.2f} %"],
        [f"worst tensor ({of_all})", f"{100 * errors[of_all]:.2f} %"],
    ]
    title = f"gradient error of {PRESET} after {num_steps} steps on real text"
    print_table(title, ["", "relative"], rows)
