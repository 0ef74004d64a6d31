"""Calibration times real steps on the clock that it is given, and keeps the best."""

from __future__ import annotations

import itertools

import pytest
import torch

from bitnet_ext.ternary import active_isa, choose_isa
from bitnet_ext.wire.verdicts import Optimiser
from tests.unit.worker.shapes import SMALL, loaded_model, seeded_weights, silent_hooks
from worker import muon
from worker.calibrate import MAX_SEQUENCES, Calibration, arrange, calibrate
from worker.errors import StoppedError
from worker.tune import PORTABLE, TORCH, Choices, Setup, Trial


@pytest.fixture(autouse=True)
def process_as_it_was():
    isa, threads = active_isa(), torch.get_num_threads()
    yield
    choose_isa(isa)
    torch.set_num_threads(threads)


def choices(*micro_batches: int, variant: str = PORTABLE) -> Choices:
    return Choices(variants=(variant,), threads=(1,), micro_batches=micro_batches)


def ticking(*seconds: float):
    """Return a clock: so long from each look to the next, the last again and again."""
    steps = itertools.chain(seconds, itertools.repeat(seconds[-1]))
    return itertools.accumulate(steps, initial=100.0).__next__


@pytest.mark.parametrize(
    ("seconds_a_step", "num_steps"), [(10.0, 2), (0.25, 4), (0.3, 4)]
)
def test_it_runs_for_a_second_and_for_two_steps(seconds_a_step, num_steps) -> None:
    hooks = silent_hooks(clock=ticking(seconds_a_step))

    found = calibrate(loaded_model(), 4, Optimiser.ADAMW, choices(4), hooks)

    assert len(found.trials[0].seconds) == num_steps
    assert found.tokens_per_s == pytest.approx(4 * SMALL.seq_len / seconds_a_step)


def test_a_step_of_very_many_sequences_is_timed_as_a_shorter_one() -> None:
    found = calibrate(
        loaded_model(), 10**6, Optimiser.ADAMW, choices(4), silent_hooks()
    )

    assert found.num_tokens == MAX_SEQUENCES * SMALL.seq_len


def test_its_steps_really_train() -> None:
    model = loaded_model()
    before = seeded_weights(SMALL)

    calibrate(model, 2, Optimiser.ADAMW, choices(2), silent_hooks())

    assert (model.flat.values.numpy() != before).all()


def test_the_model_is_left_in_the_fastest_setup() -> None:
    # Two looks of `tune`, then steps: a slow whole, two quick halves, a slow single.
    looks = (0.0, 0.0, 3.0, 3.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.2, 1.2, 0.0)
    model = loaded_model()

    hooks = silent_hooks(clock=ticking(*looks))
    found = calibrate(model, 4, Optimiser.ADAMW, choices(4, 2, 1), hooks)

    assert [trial.setup.micro_batch for trial in found.trials] == [4, 2, 1]
    assert found.setup.micro_batch == model.micro_batch == 2


def test_a_setup_that_is_clearly_worse_gets_one_step() -> None:
    looks = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 2.1)

    hooks = silent_hooks(clock=ticking(*looks))
    found = calibrate(loaded_model(), 4, Optimiser.ADAMW, choices(4, 2, 1), hooks)

    assert [len(trial.seconds) for trial in found.trials] == [2, 1]


@pytest.mark.parametrize("optimiser", Optimiser)
def test_steps_are_those_of_the_optimiser(optimiser, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(muon, "step", lambda *_: made.append(1))

    calibrate(loaded_model(), 2, optimiser, choices(2), silent_hooks())

    assert bool(made) is (optimiser is Optimiser.MUON)


def test_without_an_optimiser_a_gradient_grows_and_no_weight_changes() -> None:
    two, four = loaded_model(), loaded_model()  # so many steps are made

    for model, seconds_a_step in ((two, 10.0), (four, 0.25)):
        hooks = silent_hooks(clock=ticking(seconds_a_step))
        calibrate(model, 2, None, choices(2), hooks)

    assert (two.flat.values == four.flat.values).all()
    assert two.flat.grads.any()
    torch.testing.assert_close(four.flat.grads, 2.0 * two.flat.grads)


def test_a_check_that_raises_ends_it_between_two_steps() -> None:
    done = []

    def check() -> None:
        if done:
            raise StoppedError("told to stop")

    hooks = silent_hooks(check=check, progress=lambda *step: done.append(step))
    with pytest.raises(StoppedError):
        calibrate(loaded_model(), 4, Optimiser.ADAMW, choices(4), hooks)

    assert done == [(4 * SMALL.seq_len, 1.0)]


@pytest.mark.parametrize(("variant", "by_torch"), [(PORTABLE, False), (TORCH, True)])
def test_a_setup_is_applied_to_model_kernels_and_torch(variant, by_torch) -> None:
    model = loaded_model()

    arrange(model, Setup(variant=variant, threads=2, micro_batch=3))

    assert (model.threads, model.micro_batch, model.plain) == (2, 3, by_torch)
    assert torch.get_num_threads() == 2
    assert by_torch or active_isa() == PORTABLE


def test_it_says_what_it_chose_and_the_figures_of_all() -> None:
    trials = [
        Trial(Setup(variant="avx2", threads=2, micro_batch=size), seconds)
        for size, seconds in ((8, (0.2,)), (4, (0.1, 0.3)))
    ]

    assert str(Calibration(trials, 100)) == (
        "avx2, threads 2, micro-batch 4: 500 tokens/s; tried "
        "avx2, threads 2, micro-batch 8: 500; avx2, threads 2, micro-batch 4: 1000"
    )
