"""What importing the kernels can end with, in a place that needs no kernels."""

from __future__ import annotations


class UnknownIsaError(ValueError):
    """A kernel variant was asked for that this machine does not have."""
