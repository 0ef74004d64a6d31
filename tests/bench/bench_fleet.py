"""`make bench-fleet`: what a second worker gains, next to a second plain loop.

Real processes of one thread each: a fleet of one worker, then one of two, each between
two turns of as many plain PyTorch loops, so that what disturbs the machine disturbs
both alike. Prints tables and, as its last line, the figures that docs/performance.md
explains.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from subprocess import SubprocessError
from typing import Final

import torch

from bitnet_ext.layout import preset_shape
from coordinator.demo.processes import end_properly_when_told
from coordinator.demo.report import print_corpus
from coordinator.demo.text import prepare
from coordinator.domain.errors import FleetError
from coordinator.service.evaluating import bits_per_byte
from tests.bench.fleet import COORDINATOR, Training, train_fleet
from tests.bench.loops import PATIENCE_S, PRESET, loop_command, run_loops
from tests.bench.pace import Pace, gain, pace_of_rounds, pace_of_steps
from tests.bench.peers.recipes import PLAIN
from tests.bench.report import Figures, print_machine, print_table
from tests.bench.train import SEQUENCES, choose

KEYS: Final = (
    "fleet_scaling_vs_plain",
    "loss_two",
    "loss_one",
    "loss_margin",
    "coordinator_cpu_share",
)
NUM_WORKERS: Final = (1, 2)
MINUTES: Final = 10.0
QUICK_MINUTES: Final = 1.0
#: A turn of plain loops, before and after each fleet: this share of the fleet's time,
#: and no longer than so many seconds.
TURN: Final = 0.25
MAX_TURN_S: Final = 150.0


def main() -> None:
    """Measure; leave no process and no folder behind, however it ends."""
    options = _parser().parse_args()
    end_properly_when_told()
    minutes = options.minutes or (QUICK_MINUTES if options.quick else MINUTES)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-fleet-") as folder:
            print_machine(
                "bench-fleet", threads="1 thread a process", quick=options.quick
            )
            _measure(Path(folder), options.corpus, 60.0 * minutes)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (FleetError, OSError, SubprocessError) as error:
        sys.exit(f"bench-fleet: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one minute a fleet")
    parser.add_argument(
        "--minutes",
        type=_minutes,
        help=f"how long each fleet trains (default: {MINUTES:.0f})",
    )
    parser.add_argument("--corpus", type=Path, help="a folder of text")
    return parser


def _minutes(given: str) -> float:
    """Return a number of minutes. Raises ArgumentTypeError."""
    try:
        minutes = float(given)
    except ValueError:
        minutes = 0.0
    if not 0.0 < minutes < 1e6:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {given!r}")
    return minutes


def _measure(folder: Path, source: Path | None, seconds: float) -> None:
    manifest = prepare(folder / "corpus", source)
    print_corpus(manifest)
    torch.set_num_threads(1)
    shape = preset_shape(PRESET, vocab_size=manifest.vocab_size)
    choice = choose(shape, PLAIN, (8, 4, 2), steps=2)
    turn_s = min(TURN * seconds, MAX_TURN_S)
    command = loop_command(
        vocab_size=manifest.vocab_size, micro_batch=choice.micro_batch, seconds=turn_s
    )
    turns: dict[int, list[list[list[float]]]] = {}
    fleets: dict[int, Training] = {}
    for number in NUM_WORKERS:
        print(
            f"{number} of each: plain {turn_s:.0f} s, fleet {seconds:.0f} s, plain ...",
            flush=True,
        )
        patience_s = turn_s + PATIENCE_S
        before = run_loops(command, number, patience_s=patience_s)
        fleets[number] = train_fleet(
            folder / f"fleet-{number}",
            folder / "corpus",
            num_workers=number,
            seconds=seconds,
        )
        turns[number] = [before, run_loops(command, number, patience_s=patience_s)]
    figures = Figures(KEYS)
    report(figures, fleets, turns, tokens_a_step=SEQUENCES * shape.seq_len)
    figures.finish()


def report(
    figures: Figures,
    fleets: Mapping[int, Training],
    turns: Mapping[int, list[list[list[float]]]],
    *,
    tokens_a_step: int,
) -> None:
    """Print the tables and put the figures.

    `fleets` is by number of workers, `turns` by number of loops: moments of each loop
    in each turn.
    """
    try:
        trained = {
            number: pace_of_rounds(its.versions, until=its.stop_at)
            for number, its in fleets.items()
        }
        plain = {
            number: _sum([pace_of_steps(turn, tokens=tokens_a_step) for turn in its])
            for number, its in turns.items()
        }
    except ValueError as error:
        figures.leave_out(str(error), "fleet_scaling_vs_plain")
    else:
        _print_paces(trained, plain)
        figures.put("fleet_scaling_vs_plain", gain(trained) / gain(plain))
    _print_losses(fleets)
    figures.put("loss_two", fleets[2].loss)
    figures.put("loss_one", fleets[1].loss)
    figures.put("loss_margin", fleets[1].loss - fleets[2].loss)
    _print_cpu(fleets)
    figures.put("coordinator_cpu_share", fleets[2].coordinator_share)


def _sum(paces: list[Pace]) -> Pace:
    total, *more = paces
    for pace in more:
        total += pace
    return total


def _print_paces(trained: Mapping[int, Pace], plain: Mapping[int, Pace]) -> None:
    rows = []
    for who, unit, paces in (("fleet", "rounds", trained), ("plain", "steps", plain)):
        for number, pace in paces.items():
            rows.append(
                [
                    f"{who} of {number}",
                    f"{pace.count:.0f} {unit}",
                    f"{pace.tokens:.0f}",
                    f"{pace.seconds:.1f}",
                    f"{pace.tokens_per_s:.0f}",
                    f"{pace.tokens_per_s / paces[1].tokens_per_s:.3f}",
                ]
            )
    header = ["after warm-up", "counted", "tokens", "seconds", "tokens/s", "gain"]
    print_table(f"{PRESET}: what a second process gains", header, rows)


def _print_losses(fleets: Mapping[int, Training]) -> None:
    rows = []
    for number, its in fleets.items():
        last = its.versions[-1]
        rows.append(
            [
                f"{number}",
                f"{last.version}",
                f"{last.tokens_total}",
                f"{last.created_at - its.began_at:.1f}",
                f"{its.loss:.4f}",
                f"{bits_per_byte(its.score):.4f}",
            ]
        )
    header = ["workers", "last version", "its tokens", "after s", "nats/token"]
    print_table("held-out loss at equal wall time", [*header, "bits/byte"], rows)


def _print_cpu(fleets: Mapping[int, Training]) -> None:
    rows = [
        [
            f"{number}",
            f"{its.cpu_s[COORDINATOR]:.1f}",
            f"{sum(its.cpu_s.values()) - its.cpu_s[COORDINATOR]:.1f}",
            f"{its.coordinator_share:.4f}",
        ]
        for number, its in fleets.items()
    ]
    header = ["workers", "coordinator", "all workers", "coordinator's share"]
    print_table("CPU seconds while the fleet trained", header, rows)


if __name__ == "__main__":
    main()
