"""Plain PyTorch training loops: each a process of its own, on one thread.

    python -m tests.bench.loops VOCAB_SIZE MICRO_BATCH SECONDS

trains `small` for so long after its warm-up, and prints the moment, by the monotonic
clock that all processes share, at which each step ended.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import torch

from bitnet_ext.layout import preset_shape
from tests.bench import train
from tests.bench.pace import WARM_UP_STEPS
from tests.bench.peers.recipes import PLAIN

PRESET: Final = "small"
#: How long a loop may take on top of its seconds: to start, and for its warm-up.
PATIENCE_S: Final = 120.0


def loop_command(*, vocab_size: int, micro_batch: int, seconds: float) -> list[str]:
    """Return the command of one loop."""
    arguments = (vocab_size, micro_batch, seconds)
    return [sys.executable, "-m", "tests.bench.loops", *map(str, arguments)]


def run_loops(
    command: Sequence[str], num_loops: int, *, patience_s: float
) -> list[list[float]]:
    """Run so many loops at the same time; return the moments of each one's steps.

    However this ends, none of them is left. Raises CalledProcessError for one that
    fails, TimeoutExpired for one that takes longer than `patience_s`.
    """
    with ExitStack() as stack:
        running = []
        for _ in range(num_loops):
            # Sessions of their own: a Ctrl-C reaches us alone, and we end them.
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            stack.callback(_end, process)
            running.append(process)
        return [_moments(process, patience_s) for process in running]


def _moments(process: subprocess.Popen[str], patience_s: float) -> list[float]:
    said, _ = process.communicate(timeout=patience_s)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return [float(line) for line in said.split()]


def _end(process: subprocess.Popen[str]) -> None:
    """End a loop at once: it has nothing to put in order."""
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def main() -> None:
    """Train in this process."""
    vocab_size, micro_batch, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    shape = preset_shape(PRESET, vocab_size=int(vocab_size))
    step = train.stepper(PLAIN.name, shape, train.weights(shape), int(micro_batch))
    end_s = float("inf")
    for number, (ids, targets) in enumerate(train.text(shape), start=1):
        step(ids, targets)
        now_s = time.monotonic()
        print(now_s)
        if now_s >= end_s:
            return
        if number == WARM_UP_STEPS:
            end_s = now_s + float(seconds)


if __name__ == "__main__":
    main()
