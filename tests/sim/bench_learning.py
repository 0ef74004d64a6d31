"""`make bench-learning`: how well a fleet learns next to what it is compared with.

Every figure is computed in the run. Jobs run side by side, one for each core, and
leave their results in a folder; what is there already is not done again. A table,
then one line of JSON. `make bench-learning-1m` does the same for one larger model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch

from bitnet_ext.wire.verdicts import RoundKind
from tests.sim.alone import (
    alone,
    alone_by_muon,
    numbers_of,
    plan_for,
    windows_within,
)
from tests.sim.fleet import Fleet, Recipe
from tests.sim.net import SEQ_LEN, Net, Shape
from tests.sim.results import (
    ALONE_CODE,
    CODE,
    PARALLEL_CODE,
    WALLTIME_CODE,
    Job,
    Result,
    digest_of,
    kept_or_done,
)
from tests.sim.setting import Setting
from tests.sim.text import Text, read_text

#: Seeds that nothing was tuned on.
SEEDS: Final = (100, 101, 102)
RATES: Final = (1e-3, 2e-3, 4e-3, 8e-3)
BETAS: Final = (0.95, 0.99)
#: Ideal data-parallel training: windows in one step.
NUM_PARALLEL: Final = 8

#: Figures of a fleet's run that the table shows.
SHOWN: Final = (
    "bytes_up_ratio",
    "bytes_down_ratio",
    "bytes_up_per_token",
    "bytes_down_per_token",
    "utilisation",
    "speedup",
    "stale_share",
)
#: The recipe of the fleet, as tuned on seeds 0 to 9 (lab log): over few windows rounds
#: that wait for each step, over many rounds in which nobody waits.
FLEET_PLAN: Final = {
    "round_kind": RoundKind.GRADIENT,
    "learning_rate": 2e-2,
    "outer_momentum": 0.8,
    "round_s": 1.2,
    "codec": "ternary",
    "broadcast": "ternary",
    "quorum": 0.5,
}
LONG_PLAN: Final = {
    **FLEET_PLAN,
    "learning_rate": 1.5e-2,
    "outer_momentum": 0.7,
    "round_s": 2.5,
}
#: Of the larger model a step of the coordinator takes three times as long.
LARGE_PLAN: Final = {**LONG_PLAN, "round_s": 8.0}
#: Rates of ideal data-parallel training with the optimiser of gradient rounds.
MUON_RATES: Final = (1e-2, 2e-2, 4e-2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One length of run, and how the fleet trains for it."""

    name: str
    num_windows: int
    plan: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    #: Fields of the model's shape that are not those of the small one.
    shape: dict[str, int] = field(default_factory=dict)
    #: Whether a fleet with one bad worker runs as well.
    has_bad_worker: bool = False
    #: Whether figures of bytes and time are named without the study.
    is_main: bool = False
    #: Recipes of one baseline that are trained side by side, in one job.
    num_together: int = 8


AHEAD: Final = {"works_ahead": True}
STUDIES: Final = (
    Study(name="12k", num_windows=12_000, plan=FLEET_PLAN, has_bad_worker=True),
    Study(name="36k", num_windows=36_000, plan=LONG_PLAN, recipe=AHEAD, is_main=True),
)
#: 1.4 million parameters, 5.1 million tokens.
LARGE: Final = Study(
    name="1m",
    num_windows=80_000,
    plan=LARGE_PLAN,
    recipe=AHEAD,
    shape={"width": 192, "num_layers": 3, "num_heads": 6},
    num_together=1,
)
#: With QUICK=1 so few windows that all is over in a few minutes.
NUM_QUICK: Final = 256
#: What the bad worker multiplies its gradients by.
POISON: Final = -5.0

Submit = Callable[[Job], "Future[Result]"]
Act = Callable[..., Result]
#: A recipe of a grid: beta2 and learning rate.
Point = tuple[float, float]


def run_alone(
    *,
    corpus: str,
    seed: int,
    num_windows: int,
    plans: Sequence[dict[str, Any]],
    **shape: int,
) -> Result:
    """Train one worker alone by each plan; return losses in the order of plans."""
    made = [plan_for(num_windows, **plan) for plan in plans]
    net, text = _net(compiled=True, **shape), _text(corpus)
    losses = alone(net, text, made, num_windows=num_windows, seed=seed)
    return {"losses": losses}


def run_parallel(
    *,
    corpus: str,
    seed: int,
    num_windows: int,
    num_together: int,
    momentum: float,
    plans: Sequence[dict[str, Any]],
    **shape: int,
) -> Result:
    """Train as gradient rounds do, without loss and without delay, by each plan."""
    losses = [
        alone_by_muon(
            _net(compiled=True, **shape),
            _text(corpus),
            plan_for(
                num_windows,
                batch_size=num_together,
                outer_momentum=momentum,
                **plan,
            ),
            num_windows=num_windows,
            seed=seed,
        )
        for plan in plans
    ]
    return {"losses": losses}


def run_fleet(
    *,
    corpus: str,
    seed: int,
    num_windows: int,
    plan: dict[str, Any],
    recipe: dict[str, Any],
    **shape: int,
) -> Result:
    """Train a fleet; return its figures."""
    made = Recipe(plan=plan_for(num_windows, **plan), **recipe)
    fleet = Fleet(_net(**shape), _text(corpus), made, seed=seed)
    return fleet.run(num_windows * SEQ_LEN, num_scores=8)


def run_walltime(
    *,
    corpus: str,
    seed: int,
    seconds: float,
    plans: Sequence[dict[str, Any]],
    **shape: int,
) -> Result:
    """Train the fastest worker alone for the virtual time that a fleet took."""
    num_windows = max(8, windows_within(seconds, _net(**shape), Setting()))
    return run_alone(
        corpus=corpus, seed=seed, num_windows=num_windows, plans=plans, **shape
    )


@lru_cache
def _net(*, compiled: bool = False, **shape: int) -> Net:
    """Return the model; compiled, it is for many batches of one size."""
    return Net(Shape(**shape), compiled=compiled)


@lru_cache(maxsize=1)
def _text(corpus: str) -> Text:
    return read_text(corpus)


class Grid:
    """Recipes of one baseline; where the best is at an end, the grid grows there."""

    def __init__(
        self,
        submit: Submit,
        name: str,
        act: Act,
        same: dict[str, Any],
        code: tuple[str, ...],
        *,
        num_together: int,
        rates: Sequence[float] = RATES,
        betas: Sequence[float] = BETAS,
    ) -> None:
        self._submit, self._name, self._act, self._same = submit, name, act, same
        self._code, self._num_together, self._betas = code, num_together, betas
        self._found: dict[Point, float] = {}
        self._waiting: list[tuple[list[Point], Future[Result]]] = []
        self._ask(rates)

    def _ask(self, rates: Sequence[float]) -> None:
        points = [(beta, rate) for beta in self._betas for rate in rates]
        for start in range(0, len(points), self._num_together):
            some = points[start : start + self._num_together]
            plans = [{"beta2": beta, "learning_rate": rate} for beta, rate in some]
            arguments = {**self._same, "plans": plans}
            numbers = numbers_of(plans)
            job = Job(self._name, self._act, arguments, self._code, numbers)
            self._waiting.append((some, self._submit(job)))

    def losses(self) -> dict[Point, float]:
        """Return all losses by (beta2, rate)."""
        while self._waiting:
            points, future = self._waiting.pop()
            losses = future.result()["losses"]
            self._found.update(zip(points, losses, strict=True))
            if not self._waiting:
                self._extend()
        return self._found

    def _extend(self) -> None:
        _, best = min(self._found, key=self._found.__getitem__)
        rates = [rate for _, rate in self._found]
        if best == max(rates):
            self._ask([2 * best])
        elif best == min(rates):
            self._ask([best / 2])


def gap(loss: float, against: float) -> float:
    """Return by how many percent a loss is above another."""
    return 100 * (loss / against - 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for, print the table and the line; return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--seeds", default="")
    parser.add_argument("--corpus", default="")
    parser.add_argument("--results", default="bench-learning", type=Path)
    parser.add_argument("--jobs", default=os.cpu_count() or 1, type=int)
    asked = parser.parse_args(arguments)
    studies = (LARGE,) if asked.large else STUDIES
    seeds = [int(word) for word in asked.seeds.split()] or list(SEEDS)
    if asked.quick:
        studies = tuple(replace(one, num_windows=NUM_QUICK) for one in studies)
    if asked.quick or (asked.large and not asked.seeds):
        seeds = seeds[:1]
    asked.results.mkdir(parents=True, exist_ok=True)
    for code in (ALONE_CODE, WALLTIME_CODE, PARALLEL_CODE, CODE):
        digest_of(code)
    print(f"setting: {Setting()}")
    for study in studies:
        print(f"{study.name}: {study.plan} {study.recipe} {study.shape}")
    print(f"seeds {seeds}; corpus {asked.corpus or '-'}", flush=True)
    figures: dict[str, Any] = {"seeds": seeds}
    with ProcessPoolExecutor(asked.jobs, initializer=_one_thread) as pool:

        def submit(job: Job) -> Future[Result]:
            return pool.submit(kept_or_done, asked.results / job.file_name(), job)

        for study in studies:
            figures |= _compare(submit, asked.corpus, seeds, study)
    print(json.dumps(figures))
    return 0


def _one_thread() -> None:
    torch.set_num_threads(1)


def _compare(
    submit: Submit, corpus: str, seeds: list[int], study: Study
) -> dict[str, float]:
    """Run fleets and baselines of one length; print a row for each seed."""
    runs = [_Runs(submit, corpus, seed, study) for seed in seeds]
    rows = [run.row() for run in runs]
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    return {_named(key, study): mean for key, mean in means.items()}


def _named(key: str, study: Study) -> str:
    """Return what a figure of a study is called in the last line."""
    if key in ("gap_adamw", "gap_same"):
        return key.replace("gap", f"gap_{study.name}")
    is_plain = study.is_main or key == "bad_worker_cost"
    return key if is_plain else f"{key}_{study.name}"


class _Runs:
    """The runs of one seed: of the fleet, and of what it is compared with."""

    def __init__(self, submit: Submit, corpus: str, seed: int, study: Study) -> None:
        self._submit, self._seed, self._study = submit, seed, study
        self._same = {"corpus": corpus, "seed": seed, **study.shape}
        self._bad = self._start({"poison": POISON}) if study.has_bad_worker else None
        self._fleet = self._start({})
        length = {"num_windows": study.num_windows}
        self._grids = {
            "adamw": self._grid("alone", run_alone, length, ALONE_CODE),
            "same": self._grid(
                "parallel",
                run_parallel,
                {
                    **length,
                    "num_together": NUM_PARALLEL,
                    "momentum": FLEET_PLAN["outer_momentum"],
                },
                PARALLEL_CODE,
                rates=MUON_RATES,
                betas=BETAS[:1],
            ),
        }

    def _start(self, fields: dict[str, Any]) -> Future[Result]:
        study = self._study
        arguments = {
            **self._same,
            "num_windows": study.num_windows,
            "plan": study.plan,
            "recipe": {**study.recipe, **fields},
        }
        name = f"{'bad' if fields else 'fleet'}-{study.name}-{self._seed}"
        return self._submit(Job(name, run_fleet, arguments))

    def _grid(
        self,
        name: str,
        act: Act,
        length: dict[str, float],
        code: tuple[str, ...],
        **grid: Sequence[float],
    ) -> Grid:
        same = {**self._same, **length}
        full_name = f"{name}-{self._study.name}-{self._seed}"
        return Grid(
            self._submit,
            full_name,
            act,
            same,
            code,
            num_together=self._study.num_together,
            **grid,
        )

    def row(self) -> dict[str, float]:
        """Wait for all runs, print what they gave, and return the figures."""
        fleet = self._fleet.result()
        seconds = {"seconds": fleet["virtual_s"]}
        self._grids["walltime"] = self._grid(
            "walltime", run_walltime, seconds, WALLTIME_CODE
        )
        print(f"\n{self._study.name}, seed {self._seed}: fleet {fleet['loss']:.4f}")
        row = {}
        for label, grid in self._grids.items():
            losses = grid.losses()
            row[f"gap_{label}"] = gap(fleet["loss"], min(losses.values()))
            _print_losses(label, losses)
        row.update({key: fleet[key] for key in SHOWN})
        if self._bad:
            bad = self._bad.result()
            row["bad_worker_cost"] = gap(bad["loss"], fleet["loss"])
        figures = "  ".join(f"{key} {value:.2f}" for key, value in row.items())
        print(f"  {figures}", flush=True)
        return row


def _print_losses(label: str, losses: dict[Point, float]) -> None:
    found = ", ".join(
        f"{beta:g}/{rate:g} {loss:.4f}" for (beta, rate), loss in sorted(losses.items())
    )
    print(f"  {label}: beta2/rate {found}")


if __name__ == "__main__":
    sys.exit(main())
