"""The grids of `make bench-learning`, and what its figures are called."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from tests.sim.alone import numbers_of
from tests.sim.bench_learning import STUDIES, Grid, _named, gap
from tests.sim.results import (
    ALONE_CODE,
    CODE,
    PARALLEL_CODE,
    ROOT,
    WALLTIME_CODE,
    Job,
)

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def run(plans):
    """Stand for a run: the best recipe is beta2 .99 at some rate."""


def a_grid(best, num_together=8):
    asked = []

    def submit(job):
        plans = job.arguments["plans"]
        asked.append(plans)
        future = Future()
        future.set_result(
            {
                "losses": [
                    abs(plan["learning_rate"] - best) + (plan["beta2"] < 0.99)
                    for plan in plans
                ]
            }
        )
        return future

    return Grid(submit, "grid", run, {}, (), num_together=num_together), asked


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (4e-3, RATES),
        (5e-4, (2.5e-4, 5e-4, *RATES)),
        (3e-2, (*RATES, 1.6e-2, 3.2e-2, 6.4e-2)),
    ],
)
@pytest.mark.parametrize("num_together", [1, 8])
def test_a_grid_grows_until_its_best_rate_is_inside(best, rates, num_together):
    grid, asked = a_grid(best, num_together)

    losses = grid.losses()

    assert sorted(losses) == [(beta, rate) for beta in (0.95, 0.99) for rate in rates]
    beta, rate = min(losses, key=losses.__getitem__)
    assert beta == 0.99
    assert min(rates) < rate < max(rates)
    assert max(map(len, asked)) == min(num_together, 8)


def test_figures_are_called_as_the_goals_are():
    short, long = STUDIES

    assert _named("gap_adamw", short) == "gap_12k_adamw"
    assert _named("gap_same", long) == "gap_36k_same"
    assert _named("bad_worker_cost", short) == "bad_worker_cost"
    assert _named("utilisation", long) == "utilisation"
    assert _named("utilisation", short) == "utilisation_12k"


def test_a_gap_is_in_percent_of_what_it_is_compared_with():
    assert gap(1.1, 1.0) == pytest.approx(10.0)


@pytest.mark.parametrize("code", [ALONE_CODE, WALLTIME_CODE, PARALLEL_CODE, CODE])
def test_every_file_that_a_result_goes_by_is_there(code):
    for pattern in code:
        assert list(ROOT.glob(pattern)), pattern


def test_of_a_plan_only_what_an_optimiser_is_told_counts():
    plan = {"learning_rate": 2e-3, "beta2": 0.99}

    assert numbers_of([plan]) == numbers_of([plan | {"round_s": 5.0}])
    for field, value in (
        ("learning_rate", 1e-3),
        ("beta2", 0.95),
        ("second_stage_at", 0.6),
        ("outer_momentum", 0.7),
        ("clip_norm", 2.0),
    ):
        assert numbers_of([plan]) != numbers_of([plan | {field: value}]), field


def test_a_result_goes_by_the_numbers_that_it_was_made_of():
    jobs = [Job("a", dict, {}, numbers=numbers) for numbers in ("1", "1", "2")]
    first, again, other = [job.file_name() for job in jobs]

    assert first == again != other
