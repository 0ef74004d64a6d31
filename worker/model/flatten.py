"""All parameters of a model as views into one flat vector, and their gradients too.

What is published, submitted, clipped and checked is always the whole flat vector;
with views it never has to be gathered from, or scattered to, its parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from bitnet_ext.layout import ModelShape, Segment, num_params, segments


class FlatParameters:
    """Moves the parameters of `module` into `values`, their gradients into `grads`.

    Both are float32 tensors of `bitnet_ext.layout.num_params(shape)` numbers, in
    the order of `segments(shape)`, on `device`. The values are not initialised:
    `load` them.
    Raises ValueError when names or shapes of the module differ from the layout.
    """

    def __init__(
        self,
        module: nn.Module,
        shape: ModelShape,
        device: torch.device | str = "cpu",
    ) -> None:
        check_layout(module, shape)
        self.segments = segments(shape)
        self.values = torch.empty(num_params(shape), dtype=torch.float32, device=device)
        self.grads = torch.zeros_like(self.values)
        self.parameters = tuple(self._bind(module, part) for part in self.segments)

    def _bind(self, module: nn.Module, segment: Segment) -> nn.Parameter:
        """Replace one parameter of the module by a view."""
        parameter = nn.Parameter(segment_of(self.values, segment))
        parameter.grad = segment_of(self.grads, segment)
        owner, _, leaf = segment.name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
        return parameter

    def load(self, weights: NDArray[np.float32]) -> None:
        """Copy a flat vector in; the argument is never written to or kept.

        Raises ValueError when it is not float32 or has another length.
        """
        expected = tuple(self.values.shape)
        if weights.dtype != np.float32 or weights.shape != expected:
            raise ValueError(
                f"weights must be float32 of shape {expected}, "
                f"got {weights.dtype} of shape {weights.shape}"
            )
        if self.values.device.type == "cpu":
            np.copyto(self.values.numpy(), weights)
        else:  # by way of a copy: torch warns of arrays that are read-only
            self.values.copy_(torch.from_numpy(weights.copy()))
        self.mark_changed()

    def mark_changed(self) -> None:
        """Tell everything derived from the values that they are new.

        Parameters and `values` share one version counter. In-place operations of
        torch raise it, but writes through NumPy and the fused optimiser do not.
        """
        increment_version(self.values)


def segment_of(flat: Tensor, segment: Segment) -> Tensor:
    """Return the view of `flat` that holds this segment, in its shape."""
    end = segment.offset + segment.size
    return flat[segment.offset : end].view(segment.shape)


def check_layout(module: nn.Module, shape: ModelShape) -> None:
    """Raise ValueError unless the module's parameters are exactly the layout's.

    Only names and shapes are looked at, so the module may live on `meta`.
    """
    found: dict[str, Any] = {
        name: tuple(parameter.shape) for name, parameter in module.named_parameters()
    }
    expected = {segment.name: segment.shape for segment in segments(shape)}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"parameter {name!r} must have shape {expected.get(name)} "
                f"by the layout, the module has {found.get(name)}"
            )
