"""`make bench-kernels`: matrix products, BitLinear and gradients, next to torch.

Prints tables and, as its last line, the figures that docs/performance.md explains.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

from bitnet_ext import ternary
from tests.bench import bitlinear, gemm, gemv, gradients
from tests.bench.probes import Probes
from tests.bench.report import Figures, print_machine

KEYS = (
    "vnni_fraction",
    "vnni_fraction_min",
    "vs_fp32",
    "vs_bf16",
    "vs_int_mm",
    "avx2_vs_fp32",
    "threads2_vs_peak",
    "threads2",
    "gemv_hot_vs_fp32",
    "gemv_cold_vs_fp32",
    "bitlinear_vs_fake",
    "bitlinear_vs_autocast",
    "gradient_error",
    "gradient_error_median",
    "gradient_error_worst",
)
#: Holds torch and its libraries to AVX2; only read when they are loaded.
_AVX2_TORCH = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def main() -> None:
    """Measure everything in turn."""
    arguments = _arguments()
    torch.set_num_threads(1)
    if arguments.avx2:
        print(gemm.avx2_against_fp32(rounds=5))
        return
    quick = arguments.quick
    print_machine(
        "bench-kernels", threads="1 thread unless a table says two", quick=quick
    )
    figures, probes = Figures(KEYS), Probes()
    gemm.measure(figures, probes, quick=quick)
    _print_avx2_torch()
    gemm.measure_threads(figures, probes, quick=quick)
    gemv.measure(figures, probes, quick=quick)
    bitlinear.measure(figures, quick=quick)
    gradients.measure(figures, quick=quick)
    figures.finish()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument(
        "--avx2", action="store_true", help="print only: torch fp32 / our AVX2 variant"
    )
    return parser.parse_args()


def _print_avx2_torch() -> None:
    """Print what a CPU with AVX2 alone would show; no figure, but worth knowing.

    `avx2_vs_fp32` gives torch all that this CPU has, AVX-512 where there is some.
    """
    if gemm.PORTABLE not in ternary.supported_isas():
        return
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_kernels", "--avx2"],
        env=os.environ | _AVX2_TORCH,
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"avx2 / fp32 with torch held to AVX2 too: {float(done.stdout):.2f}")


if __name__ == "__main__":
    main()
