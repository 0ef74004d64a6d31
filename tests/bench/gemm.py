"""int8 rows times a ternary weight, many rows: against torch and against the CPU.

Ours starts from quantised rows and a packed weight, and ends with scaled fp32.

Letters in shapes: M rows of activations, K their columns, N rows of the weight.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from bitnet_ext import ternary
from tests.bench import ours
from tests.bench.peers import products
from tests.bench.probes import Probe, Probes
from tests.bench.report import Figures, print_table
from tests.bench.timing import Contender, Times, interleave, timed

Shape = tuple[int, int, int]

#: (M, K, N): layers of small and large models, and three that fit no tile.
SHAPES: Final[tuple[Shape, ...]] = (
    (128, 256, 256),
    (512, 256, 256),
    (2048, 256, 256),
    (128, 512, 2048),
    (512, 512, 2048),
    (2048, 512, 2048),
    (128, 768, 3072),
    (512, 768, 3072),
    (2048, 768, 3072),
    (128, 1024, 4096),
    (512, 1024, 4096),
    (128, 2048, 2048),
    (512, 2048, 2048),
    (133, 520, 2056),
    (517, 771, 3075),
    (100, 1000, 1000),
)
QUICK_SHAPES: Final = (SHAPES[0], SHAPES[3], SHAPES[7], SHAPES[11], *SHAPES[13:])
PORTABLE: Final = "avx2"
#: Seconds that a turn takes at least: short ones would be mostly the clock.
TURN_S: Final = 4e-3
#: With less from two CPUs, something else ran on them all the time.
LEAST_PEAK_GAIN: Final = 1.8


def measure(figures: Figures, probes: Probes, *, quick: bool) -> None:
    """Compare on one thread, and print."""
    rounds = 5 if quick else 15
    times = {
        shape: interleave(_contenders(shape, probes), rounds=rounds)
        for shape in (QUICK_SHAPES if quick else SHAPES)
    }
    _print(times)
    _put(figures, "vs_fp32", _ratios(times, "fp32", "ours"))
    _put(figures, "vs_bf16", _ratios(times, "bf16", "ours"))
    _put(figures, "vs_int_mm", _ratios(times, "int_mm", "ours"))
    if probes.best_vnni() is None:
        figures.leave_out("no VNNI here", "vnni_fraction", "vnni_fraction_min")
    else:
        fractions = _fractions_of_peak(times)
        _put(figures, "vnni_fraction", fractions)
        figures.put("vnni_fraction_min", min(fractions))
    if PORTABLE in ternary.supported_isas():
        _put(figures, "avx2_vs_fp32", _ratios(times, "fp32", PORTABLE))
    else:
        figures.leave_out(f"no {PORTABLE} here", "avx2_vs_fp32")


def measure_threads(figures: Figures, probes: Probes, *, quick: bool) -> None:
    """Compare two threads with one, ours and the pure loop, and print."""
    keys = ("threads2", "threads2_vs_peak")
    probe = probes.best_vnni()
    if probe is None:
        figures.leave_out("no VNNI here", *keys)
        return
    try:
        loops = {
            f"loop{n}": probes.peak(probe, threads=n, least_s=TURN_S) for n in (1, 2)
        }
        times = {
            shape: interleave(_threaded(shape) | loops, rounds=5 if quick else 15)
            for shape in (QUICK_SHAPES if quick else SHAPES)
        }
    except OSError as error:
        figures.leave_out(str(error), *keys)
        return
    # Minima over the whole table: a loop needs a moment when both CPUs are free.
    once, twice = (min(its[f"loop{n}"].best for its in times.values()) for n in (1, 2))
    peak = 2 * once / twice
    gains = [its["ours1"].best / its["ours2"].best for its in times.values()]
    rows = [
        [_name(shape), f"{gain:.2f}", f"{gain / peak:.3f}"]
        for shape, gain in zip(times, gains, strict=True)
    ]
    title = f"two threads: gain over one, by minima; the pure loop gains {peak:.2f}"
    print_table(title, ["M,K,N", "ours", "share"], rows)
    if peak < LEAST_PEAK_GAIN:
        figures.leave_out(f"CPUs were busy: the pure loop gained {peak:.2f}", *keys)
        return
    _put(figures, "threads2", gains)
    figures.put("threads2_vs_peak", statistics.median(gains) / peak)


def avx2_against_fp32(*, rounds: int) -> float:
    """Return the median ratio of torch fp32 to our AVX2 variant over QUICK_SHAPES."""
    times = {}
    for shape in QUICK_SHAPES:
        x, w = operands(shape)
        portable = ours.product(x, w, isa=PORTABLE).call
        calls = {"fp32": products.fp32_product(x, w), PORTABLE: portable}
        times[shape] = interleave(_timed(calls), rounds=rounds)
    return statistics.median(_ratios(times, "fp32", PORTABLE))


def operands(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return normal fp32 activations (M, K) and weights (N, K)."""
    num_m, num_k, num_n = shape
    chance = torch.Generator().manual_seed(0)
    x_MK = torch.randn(num_m, num_k, generator=chance)
    return x_MK, torch.randn(num_n, num_k, generator=chance)


def _contenders(shape: Shape, probes: Probes) -> dict[str, Contender]:
    x, w = operands(shape)
    x_int8, w_int8 = (x * 30).clamp(-127, 127).char(), w.round().clamp(-1, 1).char()
    calls: dict[str, Callable[[], object]] = {
        "ours": ours.product(x, w).call,
        "fp32": products.fp32_product(x, w),
        "bf16": products.bf16_product(x, w),
        "int_mm": products.int_mm_product(x_int8, w_int8),
    }
    if PORTABLE in ternary.supported_isas():
        calls[PORTABLE] = ours.product(x, w, isa=PORTABLE).call
    contenders = _timed(calls)
    for name, probe in (("peak", probes.best_vnni()), ("fma", _fma(probes))):
        if probe is not None:
            contenders[name] = probes.peak(probe, least_s=TURN_S)
    return contenders


def _fma(probes: Probes) -> Probe | None:
    wide = (Probe.FMA_512, Probe.FMA_256)
    return next((probe for probe in wide if probes.supported(probe)), None)


def _threaded(shape: Shape) -> dict[str, Contender]:
    x, w = operands(shape)
    return _timed({f"ours{n}": ours.product(x, w, threads=n).call for n in (1, 2)})


def _timed(calls: Mapping[str, Callable[[], object]]) -> dict[str, Contender]:
    return {name: timed(call, least_s=TURN_S) for name, call in calls.items()}


def _ratios(
    times: Mapping[Shape, Mapping[str, Times]], peer: str, own: str
) -> list[float]:
    return [its[peer].best / its[own].best for its in times.values()]


def _fractions_of_peak(times: Mapping[Shape, Mapping[str, Times]]) -> list[float]:
    return [
        _giga_ops(shape) / its["ours"].best * its["peak"].best
        for shape, its in times.items()
    ]


def _put(figures: Figures, key: str, over_shapes: Sequence[float]) -> None:
    figures.put(key, statistics.median(over_shapes))


def _giga_ops(shape: Shape) -> float:
    num_m, num_k, num_n = shape
    return 2e-9 * num_m * num_k * num_n


def _name(shape: Shape) -> str:
    return ",".join(map(str, shape))


def _print(times: Mapping[Shape, Mapping[str, Times]]) -> None:
    names = list(next(iter(times.values())))
    rows = []
    for shape, its in times.items():
        row = [_name(shape)]
        for name in names:
            giga_ops = 1.0 if name in ("peak", "fma") else _giga_ops(shape)
            row.append(f"{giga_ops / its[name].best:.0f}")
        slowest = its["ours"].median / its["ours"].best
        row.append(f"{slowest:.2f}")
        rows.append(row)
    header = ["M,K,N", *names, "ours median/min"]
    print_table("GEMM, GOP/s of the minima, 1 thread", header, rows)
