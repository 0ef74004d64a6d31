"""What of ours the benchmarks measure, in one place: peers never change, this may.

Everything goes through the same doors as the worker: `bitnet_ext.ternary`, the
`BitLinear` of a block, and `LocalSteps`, which is a whole step with clip and AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from bitnet_ext import ternary
from bitnet_ext.layout import ModelShape
from bitnet_ext.ternary import QuantisedRows
from bitnet_ext.wire.messages import HyperParameters
from bitnet_ext.wire.verdicts import Optimiser
from worker.model.bitlinear import BitLinear
from worker.model.transformer import BitNetModel
from worker.train import Batch, LocalSteps, Moments

#: As the peers': see `peers.plain.adamw`.
HYPER = HyperParameters(
    optimiser=Optimiser.ADAMW,
    momentum=0.95,
    lr_start=1e-3,
    lr_end=1e-3,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    clip_norm=1.0,
)


@dataclass(frozen=True, slots=True)
class Product:
    """A call that multiplies ready int8 rows by a ternary weight, with the scales."""

    call: Callable[[], object]
    #: What it reads of the weight: emptied from the caches where cold is measured.
    weight: NDArray[Any]


def product(
    x_MK: Tensor, w_NK: Tensor, *, threads: int = 1, isa: str | None = None
) -> Product:
    """Return our product of float32 (M, K) and (N, K), quantised here and now.

    `isa` is the variant to force; None is the one that this process runs anyway.
    """
    usual = ternary.active_isa()
    ternary.choose_isa(isa or usual)
    rows = ternary.quantise_rows(x_MK.numpy())
    weight = ternary.quantise_weight(w_NK.numpy()).forward
    ternary.choose_isa(usual)

    def multiply() -> None:
        ternary.matmul(rows, weight, threads=threads)

    def multiply_forced() -> None:
        ternary.choose_isa(isa)
        multiply()
        ternary.choose_isa(usual)

    few = len(rows.q) <= ternary.FEW_ROWS
    memory = weight.narrow if few else weight.tiles
    return Product(multiply if isa is None else multiply_forced, memory)


def linear_step(
    x_MK: Tensor, w_NK: Tensor, dy_MN: Tensor, *, threads: int = 1
) -> Callable[[], None]:
    """Return a call that runs our BitLinear forward and backward.

    The weight counts as changed each time, as it is after every optimiser step, so
    its ternary form is made anew.
    """
    layer = BitLinear(threads=threads)
    weight = w_NK.clone().requires_grad_()
    x = x_MK.clone().requires_grad_()

    def step() -> None:
        x.grad = weight.grad = None
        increment_version(weight)
        layer(x, weight)[0].backward(dy_MN)

    return step


class OurTrainer:
    """Whole steps as the worker makes them, from a flat vector of weights."""

    def __init__(
        self, shape: ModelShape, weights: NDArray[np.float32], *, threads: int = 1
    ) -> None:
        self.model = BitNetModel(shape, threads=threads)
        self.model.flat.load(weights)
        self._steps = LocalSteps(self.model, Moments.zeros(shape), HYPER)

    def step(self, ids_BT: Tensor, targets_BT: Tensor) -> float:
        """Train on (B, T); return the loss before."""
        batch = Batch(ids_BT, targets_BT, ids_BT.numel())
        return self._steps.step(batch, HYPER.lr_start)


def gradients_and_inputs(
    model: BitNetModel, ids_BT: Tensor, targets_BT: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradient as a flat vector, and what each BitLinear worked with.

    That is its input after quantisation, (B, T, K), by the name of its weight in
    the layout. The model is the same afterwards, but for its gradients.
    """
    inputs: dict[str, Tensor] = {}
    readers = {"to_qkv": "q k v", "to_output": "o", "to_gate_up": "gate up"}
    readers["to_down"] = "down"
    originals = []
    for index, block in enumerate(model.layers):
        for attribute, weights in readers.items():
            inner = getattr(block, attribute)
            names = [f"layers.{index}.{weight}" for weight in weights.split()]
            originals.append((block, attribute, inner))
            recorder = _Recorder(inner, names, inputs, ids_BT.shape)
            setattr(block, attribute, recorder)
    try:
        model.flat.grads.zero_()
        model.loss(ids_BT, targets_BT).backward()
    finally:
        for block, attribute, inner in originals:
            setattr(block, attribute, inner)
    return model.flat.grads.clone(), inputs


class _Recorder:
    """Passes calls on to a BitLinear and notes their quantised input."""

    def __init__(
        self,
        inner: BitLinear,
        names: list[str],
        inputs: dict[str, Tensor],
        lead: torch.Size,
    ) -> None:
        self._inner, self._names, self._inputs = inner, names, inputs
        self._lead = lead

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def products(
        self, rows: QuantisedRows, weights: tuple[Tensor, ...]
    ) -> tuple[NDArray[np.float32], ...]:
        values = torch.from_numpy(rows.q * rows.scale).view(*self._lead, -1)
        self._inputs.update(dict.fromkeys(self._names, values))
        return self._inner.products(rows, weights)
