"""The memory that training takes: one contender, one process, a few steps.

    python -m tests.bench.memory CONTENDER PRESET MICRO_BATCH

prints the bytes by which the peak of the resident size exceeds the resident size
after all imports. CONTENDER is `ours`, for which MICRO_BATCH means nothing, or the
name of a recipe.
"""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import torch

from bitnet_ext.layout import PRESETS
from tests.bench import train

_STEPS = 3


def peak_bytes(name: str, preset: str, micro_batch: int) -> int:
    """Return what a new process measures. Raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", "tests.bench.memory"]
    done = subprocess.run(
        [*command, name, preset, str(micro_batch)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout)


def main() -> None:
    """Measure in this process."""
    name, preset, micro_batch = sys.argv[1:]
    torch.set_num_threads(1)
    before = _status_bytes("VmRSS")
    shape = PRESETS[preset]
    step = train.stepper(name, shape, train.weights(shape), int(micro_batch))
    for ids, targets in islice(train.text(shape), _STEPS):
        step(ids, targets)
    print(_status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    """Return a size of this process; unlike `ru_maxrss` none comes from a parent."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
