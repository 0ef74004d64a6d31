"""One row times a ternary weight, as in generation: hot in the caches, and cold.

Hot: the same weight again and again. Cold: every cache line of the weight is thrown
out before each call, so it comes from memory, as in a model larger than the caches.
"""

from __future__ import annotations

import statistics
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.bench import ours
from tests.bench.gemm import TURN_S, Shape, operands
from tests.bench.peers import products
from tests.bench.probes import Probes
from tests.bench.report import Figures, print_table
from tests.bench.timing import Times, interleave, timed

#: (M, K, N) with K * N from 4 million on.
SHAPES: Final[tuple[Shape, ...]] = ((1, 1024, 4096), (1, 2048, 2048), (1, 4096, 4096))
#: Cold calls in one turn.
COLD_CALLS: Final = 5


def measure(figures: Figures, probes: Probes, *, quick: bool) -> None:
    """Compare on one thread, and print."""
    rounds = 5 if quick else 15
    rows, hot_ratios, cold_ratios = [], [], []
    for shape in SHAPES:
        x, w = operands(shape)
        calls = _calls(x, w)
        hot = interleave(
            {name: timed(call, least_s=TURN_S) for name, (call, _) in calls.items()},
            rounds=rounds,
        )
        rows.append(_row(shape, "hot", hot))
        hot_ratios.append(hot["fp32"].best / hot["ours"].best)
        cold_turns = {
            name: probes.cold(call, memory, repeats=COLD_CALLS)
            for name, (call, memory) in calls.items()
        }
        turns = {name: turn for name, turn in cold_turns.items() if turn is not None}
        if turns:
            cold = interleave(turns, rounds=rounds)
            rows.append(_row(shape, "cold", cold))
            cold_ratios.append(cold["fp32"].best / cold["ours"].best)
    header = ["M,K,N", "caches", "ours", "fp32", "bf16", "int_mm", "fp32/ours"]
    print_table("GEMV, microseconds (minima), 1 thread", header, rows)
    figures.put("gemv_hot_vs_fp32", statistics.median(hot_ratios))
    if cold_ratios:
        figures.put("gemv_cold_vs_fp32", statistics.median(cold_ratios))
    else:
        figures.leave_out("caches can't be emptied here", "gemv_cold_vs_fp32")


def _calls(x: Tensor, w: Tensor) -> dict[str, tuple[products.Call, NDArray[Any]]]:
    """Return each contender's call, and the memory of its weight."""
    own = ours.product(x, w)
    x_int8, w_int8 = (x * 30).clamp(-127, 127).char(), w.round().clamp(-1, 1).char()
    w_bf16 = w.bfloat16()
    return {
        "ours": (own.call, own.weight),
        "fp32": (products.fp32_product(x, w), w.numpy()),
        "bf16": (products.bf16_product(x, w_bf16), w_bf16.view(torch.int16).numpy()),
        "int_mm": (products.int_mm_product(x_int8, w_int8), w_int8.numpy()),
    }


def _row(
    shape: tuple[int, int, int], caches: str, times: dict[str, Times]
) -> list[str]:
    micro = [f"{1e6 * its.best:.0f}" for its in times.values()]
    ratio = times["fp32"].best / times["ours"].best
    return [",".join(map(str, shape)), caches, *micro, f"{ratio:.1f}"]
