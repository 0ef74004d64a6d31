"""One step of Muon on a hidden matrix, by torch, on any device.

    mean    <- mu * mean + (1 - mu) * gradient
    x       <- mu * mean + (1 - mu) * gradient, made orthogonal
    weights <- (1 - rate * decay) * weights - rate * 0.2 * sqrt(max(N, K)) * x

The same step as `coordinator.domain.muon`, but for rounding: of a worker only its
payload has to be the same on every machine, so float32 and any order of sums will do.
The mean is kept as that of AdamW is, so moments have one form on a worker's shelf.

Letters in shapes: N rows and K columns of one weight, or of each of its B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from bitnet_ext.newton_schulz import NUM_ITERATIONS, QUINTIC, num_blocks, step_length

#: Least norm that a block is divided by. Squares of float32 are lost where numbers are
#: smaller than that: what is left of a momentum without gradients must not be blown up.
_TINY: Final = 1e-15


@dataclass(frozen=True, slots=True, kw_only=True)
class Muon:
    """The constants of one step."""

    rate: float
    decay: float
    #: mu.
    momentum: float
    #: Factor on the gradient: below 1 where it is clipped.
    clip: float = 1.0


@torch.no_grad()
def step(values_NK: Tensor, grads_NK: Tensor, mean_NK: Tensor, how: Muon) -> None:
    """Make one step on float32 views of the flat vectors; zeros are left in `grads`."""
    clipped = grads_NK * how.clip
    grads_NK.zero_()
    mean_NK.lerp_(clipped, 1.0 - how.momentum)
    direction = clipped.lerp_(mean_NK, how.momentum)
    values_NK.mul_(1.0 - how.rate * how.decay)
    length = step_length(how.rate, values_NK.shape)
    values_NK.sub_(orthogonalised(direction), alpha=length)


def orthogonalised(x_NK: Tensor) -> Tensor:
    """Return x with each block of its short side nearly orthonormal; keeps zeros."""
    is_tall = x_NK.shape[0] > x_NK.shape[1]
    wide = x_NK.T.contiguous() if is_tall else x_NK.contiguous()
    blocks_BNK = wide.view(num_blocks(len(wide)), -1, wide.shape[1])
    found = _orthogonal_blocks(blocks_BNK).view(wide.shape)
    return found.T if is_tall else found


def _orthogonal_blocks(x_BNK: Tensor) -> Tensor:
    """Return the product of all polynomials in x x', times x; N is at most K."""
    norms = torch.linalg.vector_norm(x_BNK, dim=(1, 2), keepdim=True)
    x = x_BNK / norms.clamp(min=_TINY)
    gram = x @ x.mT
    factor = polynomial = _polynomials(gram)
    for _ in range(NUM_ITERATIONS - 1):
        gram = polynomial @ (polynomial @ gram)
        polynomial = _polynomials(gram)
        factor = polynomial @ factor
    orthogonal: Tensor = factor @ x
    return orthogonal


def _polynomials(gram_BNN: Tensor) -> Tensor:
    """Return what one iteration multiplies x by, for the symmetric x x'."""
    a, b, c = QUINTIC
    found: Tensor = torch.baddbmm(gram_BNN, gram_BNN, gram_BNN, beta=b, alpha=c)
    found.diagonal(dim1=1, dim2=2).add_(a)
    return found
