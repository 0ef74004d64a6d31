"""`make bench-load`: a real coordinator with hundreds of workers, and what it takes.

For each number of workers a coordinator process of its own serves a crowd that speaks
as real workers do and does not train, one open dashboard and one scrape of the metrics
every 15 s. Prints tables and, as its last line, the figures that docs/performance.md
explains.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Final

from coordinator.demo.processes import end_properly_when_told
from coordinator.domain.errors import FleetError
from tests.bench.crowd import SPEEDS
from tests.bench.load import STAGES, WARM_UP_ROUNDS, Load, run_load
from tests.bench.report import Figures, print_machine, print_table
from tests.integration.fleet import make_corpus

PRESETS: Final = ("tiny", "small")
WORKERS: Final = (10, 50, 200, 400)
QUICK_WORKERS: Final = (10, 50)
#: Seconds of a round, and rounds that count.
ROUND_S: Final = 30.0
NUM_ROUNDS: Final = 4
QUICK_ROUND_S: Final = 20.0
QUICK_NUM_ROUNDS: Final = 2
#: Columns of the three tables, after the number of workers.
ANSWERS: Final = (
    "claim, ms p50 / p99",
    "heartbeat",
    "submission",
    "metrics, worst",
    "lag, worst",
)
ROUNDS: Final = (
    "rounds",
    "a round, s",
    "to close it",
    "judging",
    "step",
    "files",
    "commit",
)
COSTS: Final = (
    "tasks",
    "CPU share",
    "CPU ms/task",
    "MiB",
    "page kB/s",
    "database B/task",
    "leases expired",
    "refused",
)
#: Tokens that invented text has for each word, at least; words in a file.
_TOKENS_A_WORD: Final = 1.1
_WORDS: Final = 20_000


def main() -> None:
    """Measure; leave no process and no folder behind, however it ends."""
    options = _parser().parse_args()
    end_properly_when_told()
    round_s, num_rounds = ROUND_S, NUM_ROUNDS
    if options.quick:
        round_s, num_rounds = QUICK_ROUND_S, QUICK_NUM_ROUNDS
    crowds = options.workers or (QUICK_WORKERS if options.quick else WORKERS)
    presets = options.presets or (PRESETS[:1] if options.quick else PRESETS)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-load-") as folder:
            threads = "the crowd has one process of one thread"
            print_machine("bench-load", threads=threads, quick=options.quick)
            _measure(Path(folder), presets, crowds, num_rounds, round_s)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (FleetError, OSError) as error:
        sys.exit(f"bench-load: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 and 50, short rounds")
    parser.add_argument(
        "--workers", type=_numbers, default=(), help="how many: '10 50 200'"
    )
    parser.add_argument(
        "--presets", type=str.split, default=(), help="which: 'tiny small'"
    )
    return parser


def _numbers(given: str) -> list[int]:
    """Return numbers of workers. Raises ArgumentTypeError."""
    numbers = [int(word) for word in given.split() if word.isdecimal()]
    if len(numbers) != len(given.split()) or 0 in numbers:
        raise argparse.ArgumentTypeError(f"must be positive numbers, got {given!r}")
    return numbers


def _measure(
    folder: Path,
    presets: Sequence[str],
    crowds: Sequence[int],
    num_rounds: int,
    round_s: float,
) -> None:
    # One epoch for all rounds: at its end some workers would have nothing to do.
    rounds_s = round_s * (num_rounds + WARM_UP_ROUNDS)
    tokens = max(crowds) * mean(SPEEDS) * rounds_s
    num_files = 4 + round(tokens / _TOKENS_A_WORD / _WORDS)
    manifest = make_corpus(folder / "corpus", num_files=num_files, words=_WORDS)
    figures = Figures([f"{preset}_{n}" for preset in presets for n in crowds])
    for preset in presets:
        loads = []
        for number in crowds:
            load = run_load(
                folder / f"{preset}-{number}",
                folder / "corpus",
                manifest,
                preset=preset,
                num_workers=number,
                num_rounds=num_rounds,
                round_s=round_s,
            )
            loads.append(load)
            report(figures, preset, load)
        print_loads(preset, loads)
    figures.finish()


def report(figures: Figures, preset: str, load: Load) -> None:
    """Put the figures of one load."""
    closings = load.closings
    figures.put(
        f"{preset}_{load.num_workers}",
        {
            "claim_p50_ms": _ms(load.claim_s, 0.5),
            "claim_p99_ms": _ms(load.claim_s, 0.99),
            "heartbeat_p50_ms": _ms(load.heartbeat_s, 0.5),
            "heartbeat_p99_ms": _ms(load.heartbeat_s, 0.99),
            "submit_p50_ms": _ms(load.submit_s, 0.5),
            "submit_p99_ms": _ms(load.submit_s, 0.99),
            "lag_ms": round(1000.0 * load.lag_s, 1),
            "cpu_share": round(load.cpu_s / load.seconds, 4) if load.seconds else None,
            "cpu_ms_a_task": round(1000.0 * load.cpu_s / max(load.num_tasks, 1), 1),
            "close_s": _middle([one.close_s for one in closings]),
            **{
                stage: _middle([one.stages.get(stage, 0.0) for one in closings])
                for stage in STAGES
            },
            "round_ratio": _middle([one.took_s / load.round_s for one in closings]),
            "rounds": len(closings),
            "peak_mib": round(load.peak_bytes / 2**20, 1),
            "feed_bytes_a_s": round(load.feed_bytes / max(load.seconds, 1e-9)),
            "database_bytes_a_task": round(
                load.database_bytes / max(load.num_tasks, 1)
            ),
            "refusals": sum(load.refusals.values()),
            "leases_expired": load.num_expired,
        },
    )


def _ms(seconds: Sequence[float], share: float) -> float | None:
    if not seconds:
        return None
    ordered = sorted(seconds)
    return round(1000.0 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)


def _middle(values: Sequence[float]) -> float | None:
    return round(median(values), 3) if values else None


def print_loads(preset: str, loads: Sequence[Load]) -> None:
    """Print the tables of one preset, a row for each number of workers."""
    for title, header, cells in (
        ("answers", ANSWERS, _answers),
        ("rounds", ROUNDS, _rounds),
        ("what it takes", COSTS, _costs),
    ):
        rows = [[f"{load.num_workers}", *cells(load)] for load in loads]
        print_table(f"{preset}: {title}", ["workers", *header], rows)


def _answers(load: Load) -> list[str]:
    times = (load.claim_s, load.heartbeat_s, load.submit_s)
    return [
        *(f"{_ms(seconds, 0.5)} / {_ms(seconds, 0.99)}" for seconds in times),
        f"{1000.0 * max(load.scrape_s, default=0.0):.0f}",
        f"{1000.0 * load.lag_s:.0f}",
    ]


def _rounds(load: Load) -> list[str]:
    closings = load.closings
    return [
        f"{len(closings)} of {load.num_rounds}",
        f"{_middle([one.took_s for one in closings])} of {load.round_s:.0f}",
        f"{_middle([one.close_s for one in closings])}",
        *(
            f"{_middle([one.stages.get(stage, 0.0) for one in closings])}"
            for stage in STAGES
        ),
    ]


def _costs(load: Load) -> list[str]:
    seconds, num_tasks = max(load.seconds, 1e-9), max(load.num_tasks, 1)
    return [
        f"{load.num_tasks}",
        f"{load.cpu_s / seconds:.3f}",
        f"{1000.0 * load.cpu_s / num_tasks:.1f}",
        f"{load.peak_bytes / 2**20:.0f}",
        f"{load.feed_bytes / seconds / 1000.0:.1f}",
        f"{load.database_bytes / num_tasks:.0f}",
        f"{load.num_expired}",
        ", ".join(f"{count} {what}" for what, count in load.refusals.items()) or "none",
    ]


if __name__ == "__main__":
    main()
