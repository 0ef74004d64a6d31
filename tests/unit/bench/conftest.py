"""What the tests of the benchmarks share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Train on one thread: threads that wait for a busy core spin for seconds."""
    torch.set_num_threads(1)
