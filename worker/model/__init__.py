"""The BitNet b1.58 transformer and its place in the flat vector."""

from __future__ import annotations
