"""The pure loops of `probes.c`: peaks of the core, memcpy, and cold memory.

Compiled with the C compiler (`CC`, else `cc`) into a temporary folder.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.bench.timing import Contender, repeated

_SOURCE: Final = Path(__file__).with_name("probes.c")


class Probe(IntEnum):
    """Loops of one instruction; the numbers are those of `probes.c`."""

    VNNI_512 = 0  #: vpdpbusd on 64 bytes
    VNNI_256 = 1  #: vpdpbusd of AVX-VNNI on 32 bytes
    FMA_512 = 2  #: fp32 multiply-add, 16 numbers
    FMA_256 = 3  #: fp32 multiply-add, 8 numbers
    BF16_512 = 4  #: vdpbf16ps, 32 numbers


class Probes:
    """The compiled loops. Raises OSError or CalledProcessError without a compiler."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "probes.so"
            compiler = shlex.split(os.environ.get("CC", "cc"))
            flags = ["-O2", "-shared", "-fPIC", "-pthread"]
            subprocess.run(
                [*compiler, *flags, str(_SOURCE), "-o", str(built)], check=True
            )
            self._library = ctypes.CDLL(str(built))
        self._declare("probe_run", ctypes.c_double, "int", "int", "long")
        self._declare("probe_turn_ops", ctypes.c_long, "int")
        self._declare("probe_evict", ctypes.c_int, "void_p", "size_t")
        self._declare(
            "probe_memcpy", ctypes.c_double, "void_p", "void_p", "size_t", "long"
        )

    def _declare(self, name: str, result: Any, *arguments: str) -> None:
        function = getattr(self._library, name)
        function.restype = result
        function.argtypes = [getattr(ctypes, f"c_{kind}") for kind in arguments]

    def supported(self, probe: Probe) -> bool:
        """Return whether this CPU has the instruction."""
        return bool(self._library.probe_supported(int(probe)))

    def best_vnni(self) -> Probe | None:
        """Return the widest VNNI of this CPU; None where it has none."""
        wide = (Probe.VNNI_512, Probe.VNNI_256)
        return next((probe for probe in wide if self.supported(probe)), None)

    def peak(self, probe: Probe, *, threads: int = 1, least_s: float) -> Contender:
        """Return a contender whose seconds are those of 1e9 operations of a thread.

        Threads run on CPUs of their own, and only their loops are timed. Raises
        OSError when there are fewer CPUs than threads.
        """
        turns, ops = 100_000, self._library.probe_turn_ops(int(probe))
        once_s = self._run(probe, 1, turns)
        turns = max(1, round(turns * least_s / once_s))
        return lambda: self._run(probe, threads, turns) * 1e9 / (turns * ops)

    def _run(self, probe: Probe, threads: int, turns: int) -> float:
        seconds = float(self._library.probe_run(int(probe), threads, turns))
        if seconds < 0:
            raise OSError(f"no {threads} CPUs for {threads} threads of {probe.name}")
        return seconds

    def memcpy(self, size: int, *, least_s: float = 0.0) -> Contender:
        """Return a contender that copies `size` bytes, and so moves twice as many."""
        source = np.ones(size, dtype=np.uint8)
        target = np.zeros(size, dtype=np.uint8)

        def copy(repeats: int) -> float:
            seconds = self._library.probe_memcpy(
                target.ctypes.data, source.ctypes.data, size, repeats
            )
            return float(seconds)

        return repeated(copy, least_s=least_s)

    def cold(
        self, call: Callable[[], object], memory: NDArray[Any], *, repeats: int
    ) -> Contender | None:
        """Return a contender that finds `memory` in no cache, and its mean.

        None where the CPU has no instruction to empty caches.
        """

        def evict() -> int:
            return int(self._library.probe_evict(memory.ctypes.data, memory.nbytes))

        def run() -> float:
            seconds = 0.0
            for _ in range(repeats):
                evict()
                began_s = time.perf_counter()
                call()
                seconds += time.perf_counter() - began_s
            return seconds / repeats

        return run if evict() else None
