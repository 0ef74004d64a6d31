"""What a benchmark prints: the machine, tables, and one last line of figures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from bitnet_ext import ternary

Value = float | str | dict[str, str | None] | dict[str, float | None]


class Figures:
    """The figures of one benchmark: exactly `keys`, null until they are measured."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._values: dict[str, Value | None] = dict.fromkeys(keys)
        self._reasons = dict.fromkeys(keys, "not reached")

    def put(self, key: str, value: Value) -> None:
        """Set a figure; raises KeyError for one that was not announced."""
        if key not in self._values:
            raise KeyError(key)
        self._values[key] = round(value, 4) if isinstance(value, float) else value

    def leave_out(self, reason: str, *keys: str) -> None:
        """Say why figures stay null."""
        for key in keys:
            self._reasons[key] = reason

    def finish(self) -> None:
        """Print why figures are missing and, as the last line, all as JSON."""
        print()
        for key, value in self._values.items():
            if value is None:
                print(f"not measured: {key}: {self._reasons[key]}")
        print(json.dumps(self._values), flush=True)


def print_machine(title: str, *, threads: str, quick: bool) -> None:
    """Print what a reader has to know to compare the figures with others."""
    load = os.getloadavg()[0]
    print(f"# {title}{' (quick)' if quick else ''}")
    print(f"{_cpu_name()}; {os.cpu_count()} CPUs, load {load:.1f}; {threads}")
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"ours: {ternary.active_isa()} of {', '.join(ternary.supported_isas())}")


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table; the first column is aligned left, the others right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(f"\n## {title}")
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip(), flush=True)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
