"""One BitLinear forward and backward, weight quantised anew: against torch's fakes."""

from __future__ import annotations

import statistics
from typing import Final

import torch

from tests.bench import ours
from tests.bench.gemm import Shape, operands
from tests.bench.peers import products
from tests.bench.report import Figures, print_table
from tests.bench.timing import Times, interleave, timed

SMALL_SHAPES: Final[tuple[Shape, ...]] = ((128, 256, 256), (512, 256, 256))
#: (M, K, N) whose ratios are the figures.
SHAPES: Final[tuple[Shape, ...]] = (
    (128, 512, 2048),
    (512, 512, 2048),
    (128, 1024, 4096),
    (512, 1024, 4096),
    (512, 2048, 2048),
)
QUICK_SHAPES: Final = (SHAPES[0], SHAPES[1], SHAPES[4])
TURN_S: Final = 5e-3


def measure(figures: Figures, *, quick: bool) -> None:
    """Compare on one thread, and print."""
    wide = QUICK_SHAPES if quick else SHAPES
    times = {
        shape: _times(shape, rounds=4 if quick else 10)
        for shape in (*SMALL_SHAPES, *wide)
    }
    rows = [
        [
            ",".join(map(str, shape)),
            *(f"{1e3 * its[name].best:.2f}" for name in its),
            f"{_ratio(its, 'fake'):.2f}",
            f"{_ratio(its, 'autocast'):.2f}",
        ]
        for shape, its in times.items()
    ]
    header = ["M,K,N", "ours", "fake", "autocast", "fake/ours", "autocast/ours"]
    print_table("BitLinear step, ms (minima), 1 thread", header, rows)
    for key, peer in (
        ("bitlinear_vs_fake", "fake"),
        ("bitlinear_vs_autocast", "autocast"),
    ):
        figures.put(key, statistics.median(_ratio(times[s], peer) for s in wide))


def _times(shape: Shape, *, rounds: int) -> dict[str, Times]:
    x, w = operands(shape)
    chance = torch.Generator().manual_seed(1)
    dy = torch.randn(shape[0], shape[2], generator=chance)
    calls = {
        "ours": ours.linear_step(x, w, dy),
        "fake": products.fake_quantised_step(x, w, dy, autocast=False),
        "autocast": products.fake_quantised_step(x, w, dy, autocast=True),
    }
    contenders = {name: timed(call, least_s=TURN_S) for name, call in calls.items()}
    return interleave(contenders, rounds=rounds)


def _ratio(times: dict[str, Times], peer: str) -> float:
    return times[peer].best / times["ours"].best
