"""Training steps in PyTorch: the plain one, the dense one, and the strongest found.

A `Recipe` names the switches; a `Trainer` is one model that makes whole steps with
them: forward, backward, clip to norm 1, AdamW. The tokens of a step are always the
same; how many sequences go through the model at a time is each trainer's own choice
(`micro_batch`), because recipes differ in what suits them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitnet_ext.layout import ModelShape
from tests.bench.peers.dense import dense_transformer
from tests.bench.peers.head import chunked_cross_entropy
from tests.bench.peers.plain import Transformer, adamw


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a user of PyTorch may train; the defaults are the plain way."""

    name: str
    #: Ternary weights and int8 activations, both faked in floating point.
    quantised: bool = True
    #: bf16 products by `torch.autocast`.
    autocast: bool = False
    #: The model through `torch.compile`.
    compiled: bool = False
    #: Cross-entropy in bf16, chunk by chunk.
    chunked: bool = False
    fused_adamw: bool = True


PLAIN = Recipe(name="plain", fused_adamw=False)
DENSE = Recipe(name="dense", quantised=False)
#: Who may be "the strongest PyTorch"; all with the fused AdamW.
STRONGEST = (
    Recipe(name="autocast", autocast=True),
    Recipe(name="autocast+chunked", autocast=True, chunked=True),
    Recipe(name="compile", compiled=True),
    Recipe(name="compile+chunked", compiled=True, chunked=True),
    Recipe(name="autocast+compile", autocast=True, compiled=True),
    Recipe(name="autocast+compile+chunked", autocast=True, compiled=True, chunked=True),
)


class Trainer:
    """One model that is trained by a recipe.

    Raises ValueError when `micro_batch`, in sequences, is less than 1.
    """

    def __init__(
        self, shape: ModelShape, recipe: Recipe, weights: Tensor, *, micro_batch: int
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
        self.recipe = recipe
        self.micro_batch = micro_batch
        self.model = (
            Transformer(shape) if recipe.quantised else dense_transformer(shape)
        )
        load(self.model, weights)
        self._optimizer = adamw(self.model, fused=recipe.fused_adamw)
        self._head = self._chunked_head if recipe.chunked else self._whole_head
        if recipe.compiled:
            self._compile()

    def step(self, ids: Tensor, targets: Tensor) -> float:
        """Train on (B, T), a multiple of the micro-batch; return the loss before."""
        loss = self.backward(ids, targets)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def backward(self, ids: Tensor, targets: Tensor) -> float:
        """Add the gradient of the mean loss over (B, T) to `grad`; return the loss."""
        num_parts = len(ids) // self.micro_batch
        losses = [
            self._accumulate(ids[at], targets[at], num_parts)
            for at in self._slices(len(ids))
        ]
        return sum(losses) / num_parts

    def _compile(self) -> None:
        """Compile a block and the head: all layers then share one compilation.

        Compiling the model as a whole gives the same speed (within 1 %), but takes
        as many times longer as there are layers.
        """
        for layer in self.model.layers:
            # All micro-batches have one size: nothing is gained by allowing others.
            layer.compile(dynamic=False)
        self._head = torch.compile(self._head, dynamic=False)

    def _slices(self, num_sequences: int) -> list[slice]:
        if num_sequences % self.micro_batch:
            raise ValueError(
                f"a step must be a multiple of {self.micro_batch} sequences, "
                f"got {num_sequences}"
            )
        starts = range(0, num_sequences, self.micro_batch)
        return [slice(start, start + self.micro_batch) for start in starts]

    def _accumulate(self, ids: Tensor, targets: Tensor, num_parts: int) -> float:
        precision = (
            torch.autocast("cpu", dtype=torch.bfloat16)
            if self.recipe.autocast
            else contextlib.nullcontext()
        )
        with precision:
            loss = self._head(self.model(ids), self.model.embeddings.weight, targets)
        (loss if num_parts == 1 else loss / num_parts).backward()
        return loss.item()

    @staticmethod
    def _whole_head(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        logits = functional.linear(hidden, table)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @staticmethod
    def _chunked_head(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden.flatten(0, 1), table, targets.flatten())


def load(model: nn.Module, weights: Tensor) -> None:
    """Copy a flat vector, in layout order, into the parameters of a peer.

    Raises ValueError when it is too short or too long.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    if weights.numel() != sum(sizes):
        raise ValueError(f"weights must hold {sum(sizes)}, got {weights.numel()}")
    with torch.no_grad():
        parts = weights.split(sizes)
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.copy_(part.view(parameter.shape))
