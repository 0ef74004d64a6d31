"""The same transformer without quantisation: ordinary fp32 training.

What a user gives up by training ternary weights should not be speed, so the ternary
step is also measured against the model that needs no quantisers at all.
"""

from __future__ import annotations

from torch import nn

from bitnet_ext.layout import ModelShape
from tests.bench.peers.plain import Transformer


def dense_transformer(shape: ModelShape) -> Transformer:
    """Return the plain model with `nn.Linear` in every place."""
    return Transformer(shape, linear=nn.Linear)
