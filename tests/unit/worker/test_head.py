"""The type of the head's products follows from what a head takes in each type."""

from __future__ import annotations

import pytest
import torch

from worker.model.head import (
    GLANCE,
    HOPELESS,
    MIN_GAIN,
    REAL,
    Extent,
    choose_dtype,
    torch_threads,
)

FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8


def chosen(*, fp32: float, bf16: float, int8: float) -> torch.dtype:
    seconds = {FP32: fp32, BF16: bf16, INT8: int8}
    return choose_dtype(lambda dtype, extent: seconds[dtype])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # A Xeon whose bf16 is slow, with VNNI.
        ({"fp32": 1.0, "bf16": 1.7, "int8": 0.4}, INT8),
        # All three win; the fastest by more than what it rounds.
        ({"fp32": 1.0, "bf16": 0.5, "int8": 0.48}, BF16),
        # Nothing but fp32 has instructions.
        ({"fp32": 1.0, "bf16": 3.0, "int8": 2.0}, FP32),
    ],
)
def test_the_fastest_head_is_chosen(seconds, expected) -> None:
    assert chosen(**seconds) == expected


def test_what_rounds_more_must_win_clearly() -> None:
    barely, clearly = 1.01 / MIN_GAIN, 0.99 / MIN_GAIN

    assert chosen(fp32=1.0, bf16=barely, int8=9.0) == FP32
    assert chosen(fp32=1.0, bf16=clearly, int8=9.0) == BF16
    assert chosen(fp32=1.0, bf16=1.0, int8=1.0) == FP32


def test_a_type_without_instructions_is_only_glanced_at() -> None:
    asked: list[tuple[torch.dtype, Extent]] = []

    def head_s(dtype: torch.dtype, extent: Extent) -> float:
        asked.append((dtype, extent))
        return 1.01 * HOPELESS if dtype == BF16 else 1.0

    assert choose_dtype(head_s) == FP32
    assert (BF16, GLANCE) in asked
    assert (BF16, REAL) not in asked
    assert (INT8, REAL) in asked


def test_torch_gets_its_threads_back() -> None:
    before = torch.get_num_threads()

    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1

    assert torch.get_num_threads() == before
