"""`make bench-train`: tokens a second of whole steps, next to torch at its best.

Prints tables and, as its last line, the figures that docs/performance.md explains.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitnet_ext.layout import PRESETS, ModelShape
from tests.bench.memory import peak_bytes
from tests.bench.peers.recipes import DENSE, PLAIN, STRONGEST, Recipe
from tests.bench.report import Figures, print_machine, print_table
from tests.bench.timing import Times
from tests.bench.train import OURS, SEQUENCES, Choice, choose, compete

KEYS = (
    "small_vs_plain",
    "small_vs_best_torch",
    "medium_vs_plain",
    "medium_vs_best_torch",
    "small_vs_dense",
    "medium_vs_dense",
    "memory_vs_plain",
    "best_torch",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much is measured of one preset."""

    #: Who may be the strongest; none leaves that figure out.
    strongest: Sequence[Recipe]
    #: Micro-batches to try, in sequences.
    sizes: Sequence[int]
    #: Timed steps for each size that is tried.
    steps: int
    rounds: int


FULL = {
    "small": Extent(strongest=STRONGEST, sizes=(8, 4, 2), steps=2, rounds=8),
    "medium": Extent(strongest=STRONGEST, sizes=(8, 4), steps=1, rounds=3),
}
QUICK = {
    "small": Extent(strongest=STRONGEST, sizes=(8,), steps=1, rounds=4),
    "medium": Extent(strongest=(), sizes=(8,), steps=1, rounds=1),
}
#: Of the strongest, how many are timed again with all others.
FINALISTS = 2
#: So many times slower than the fastest, no micro-batch makes a recipe the strongest.
HOPELESS = 1.3


def main() -> None:
    """Measure both presets, then memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    # What torch says about its own code while it compiles.
    warnings.filterwarnings("ignore", category=UserWarning)
    print_machine("bench-train", threads="1 thread", quick=quick)
    figures = Figures(KEYS)
    winners: dict[str, str | None] = {}
    micro_batches: dict[str, int] = {}
    for preset, extent in (QUICK if quick else FULL).items():
        plain, winners[preset] = _measure(figures, preset, extent)
        micro_batches[preset] = plain.micro_batch
    figures.put("best_torch", winners)
    _measure_memory(
        figures, {"small": micro_batches["small"]} if quick else micro_batches
    )
    figures.finish()


def _measure(
    figures: Figures, preset: str, extent: Extent
) -> tuple[Choice, str | None]:
    """Return the plain contender, and the name of the strongest PyTorch."""
    shape = PRESETS[preset]
    choices = _choices(shape, extent)
    _print_choices(preset, list(choices.values()))
    plain, dense = choices[PLAIN.name], choices[DENSE.name]
    strongest = sorted(
        (choices[recipe.name] for recipe in extent.strongest), key=lambda c: c.seconds
    )
    finalists = [choice for choice in strongest if not choice.reason][:FINALISTS]
    times, losses = compete(shape, [plain, dense, *finalists], rounds=extent.rounds)
    _print_times(preset, shape, times, losses)
    own = times[OURS].best
    figures.put(f"{preset}_vs_plain", times[PLAIN.name].best / own)
    figures.put(f"{preset}_vs_dense", times[DENSE.name].best / own)
    if not finalists:
        figures.leave_out(
            "no recipe was tried (quick), or none ran", f"{preset}_vs_best_torch"
        )
        return plain, None
    names = [choice.recipe.name for choice in finalists]
    winner = min(names, key=lambda name: times[name].best)
    figures.put(f"{preset}_vs_best_torch", times[winner].best / own)
    return plain, winner


def _choices(shape: ModelShape, extent: Extent) -> dict[str, Choice]:
    """Return each recipe of torch at its best micro-batch, by name.

    Recipes that are hopeless with the first micro-batch are not tried with others.
    """
    recipes = (PLAIN, DENSE, *extent.strongest)
    first, more = extent.sizes[:1], extent.sizes[1:]
    choices = {r.name: choose(shape, r, first, steps=extent.steps) for r in recipes}
    limit = HOPELESS * min(
        (choices[r.name].seconds for r in extent.strongest), default=0
    )
    for recipe in recipes:
        usual = choices[recipe.name]
        if more and (recipe in (PLAIN, DENSE) or usual.seconds <= limit):
            smaller = choose(shape, recipe, more, steps=extent.steps)
            choices[recipe.name] = min(usual, smaller, key=lambda c: c.seconds)
    return choices


def _measure_memory(figures: Figures, micro_batches: dict[str, int]) -> None:
    """Compare peaks with the plain peer's, at its micro-batch; the worst counts."""
    rows, ratios = [], []
    for preset, size in micro_batches.items():
        own = peak_bytes(OURS, preset, SEQUENCES)
        plain = peak_bytes(PLAIN.name, preset, size)
        ratios.append(own / plain)
        rows.append([preset, f"{own / 2**20:.0f}", f"{plain / 2**20:.0f}"])
    print_table("peak memory over imports, MiB", ["preset", "ours", "plain"], rows)
    figures.put("memory_vs_plain", max(ratios))


def _print_choices(preset: str, choices: Sequence[Choice]) -> None:
    rows = []
    for choice in choices:
        if choice.reason:
            rows.append([choice.recipe.name, "-", f"left out: {choice.reason}"])
        else:
            seconds = f"{choice.seconds:.3f}"
            rows.append([choice.recipe.name, str(choice.micro_batch), seconds])
    header = ["recipe", "micro-batch", "s a step"]
    print_table(f"{preset}: micro-batches that recipes chose", header, rows)


def _print_times(
    preset: str, shape: ModelShape, times: dict[str, Times], losses: dict[str, float]
) -> None:
    tokens = SEQUENCES * shape.seq_len
    rows = [
        [
            name,
            f"{tokens / its.best:.0f}",
            f"{tokens / its.median:.0f}",
            f"{its.best / times[OURS].best:.2f}",
            f"{losses[name]:.4f}",
        ]
        for name, its in times.items()
    ]
    header = ["contender", "tokens/s best", "median", "ours is faster by", "last loss"]
    print_table(f"{preset}: whole steps, 1 thread", header, rows)


if __name__ == "__main__":
    main()
