"""Hands out work, keeps the weights, shows the fleet. Never imports torch or worker."""

from __future__ import annotations

import os

# Before NumPy is loaded. Threads of OpenBLAS wait for each other in busy loops: beside
# workers on the same cores, a product took eight times as long with two as with one.
# Gradient steps work on several matrices at a time instead.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
