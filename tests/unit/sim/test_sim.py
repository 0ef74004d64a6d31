"""The simulator on a piece that takes seconds: what its figures rest on."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from bitnet_ext.wire.verdicts import Optimiser, RoundKind
from coordinator.domain import muon
from tests.sim import results
from tests.sim.alone import alone, plan_for
from tests.sim.fleet import Claim, Fleet, Recipe, Stretch
from tests.sim.joiners import Begins, Joining
from tests.sim.net import NO_TARGET, SEQ_LEN, Net, Shape, _bit_linear
from tests.sim.results import Job, kept_or_done
from tests.sim.setting import ADAMW, DECODE, PRODUCT, TTL_S, Setting
from tests.sim.steps import trained
from tests.sim.text import Text, read_text
from worker.model.bitlinear import BitLinear

NUM_WORKERS = len(Setting().speeds)
NET = Net(Shape(width=16, num_layers=1))
PLAN = plan_for(60, round_s=4.0, learning_rate=4e-3)
GRADIENT = msgspec.structs.replace(PLAN, round_kind=RoundKind.GRADIENT)


def a_text(num_windows=24):
    windows = np.random.default_rng(0).integers(97, 103, (num_windows + 4, SEQ_LEN + 1))
    return Text(windows[4:], windows[:4])


def a_fleet(setting=None, seed=0, text=None, plan=PLAN, quorum=1.0, **fields):
    plan = msgspec.structs.replace(plan, quorum=quorum)
    recipe = Recipe(plan=plan, **fields)
    return Fleet(NET, text or a_text(), recipe, seed=seed, setting=setting)


def test_the_model_has_the_size_of_the_study():
    assert Net(Shape()).num_params == 132_032


def test_a_linear_layer_is_that_of_the_worker():
    torch.manual_seed(0)
    x, w = torch.randn(1, 5, 32), torch.randn(1, 8, 32) * 0.05
    x.requires_grad_()
    w.requires_grad_()
    twin = [part.detach().clone().requires_grad_() for part in (x, w[0])]

    ours, (theirs,) = _bit_linear(x, w), BitLinear(precise=True)(*twin)
    ours.square().sum().backward()
    theirs.square().sum().backward()

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(w.grad[0], twin[1].grad)
    # The worker sends dy through int8.
    torch.testing.assert_close(x.grad, twin[0].grad, rtol=0.02, atol=0.02)


def test_replicas_do_not_see_each_other():
    text = a_text()
    plans = [msgspec.structs.replace(PLAN, learning_rate=rate) for rate in (1e-3, 8e-3)]

    both = alone(NET, text, plans, num_windows=20, seed=3)

    each = [alone(NET, text, [plan], num_windows=20, seed=3)[0] for plan in plans]
    assert both == pytest.approx(each, rel=1e-4)
    assert each[0] != pytest.approx(each[1], rel=1e-3)


def test_a_window_that_is_not_there_changes_nothing():
    fleet = a_fleet()
    windows = fleet._text.train[:2]
    padded = np.concatenate([windows, np.full_like(windows, NO_TARGET)])

    losses, grads = NET.gradients(fleet.master[None], windows[None])
    losses_padded, grads_padded = NET.gradients(fleet.master[None], padded[None])

    assert losses_padded == pytest.approx(losses)
    np.testing.assert_allclose(grads_padded, grads, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_run():
    first, second = (a_fleet(quorum=0.7) for _ in range(2))

    assert first.run(60 * SEQ_LEN) == second.run(60 * SEQ_LEN)
    np.testing.assert_array_equal(first.published, second.published)


@pytest.mark.parametrize("quorum", [0.7, 1.0])
def test_every_window_counts_once_an_epoch_whoever_dies(quorum):
    fleet, counted = a_fleet(Setting(deaths=0.3), quorum=quorum), []
    keep = fleet._apply

    def noted(claims):
        counted.extend(claim.stretch for claim in claims)
        keep(claims)

    fleet._apply = noted
    figures = fleet.run(48 * SEQ_LEN)

    places = sorted(
        (s.epoch, place) for s in counted for place in range(s.start, s.start + s.num)
    )
    left = [
        (s.epoch, place)
        for s in fleet._given_back
        for place in range(s.start, s.start + s.num)
    ]
    assert figures["lost_tasks"] > 0
    assert len(set(places)) == len(places) == 48
    assert not set(places) & set(left)


@pytest.mark.parametrize(
    ("kind", "optimiser", "rate"),
    [
        (RoundKind.DELTA, Optimiser.ADAMW, 4e-3),
        (RoundKind.DELTA, Optimiser.MUON, 0.02),
        (RoundKind.GRADIENT, Optimiser.ADAMW, 0.05),
    ],
)
def test_the_fleet_learns(kind, optimiser, rate):
    plan = msgspec.structs.replace(
        PLAN,
        round_kind=kind,
        local_optimiser=optimiser,
        learning_rate=rate,
        round_s=1.0,
    )
    fleet = a_fleet(plan=plan)
    before = NET.loss(fleet.published, fleet._text.held_out)

    after = fleet.run(60 * SEQ_LEN)["loss"]

    assert after < before - 0.2


@pytest.mark.parametrize("kind", list(RoundKind))
def test_who_sends_poison_is_left_out_and_gets_no_more_work(kind):
    plan = plan_for(400, round_kind=kind, round_s=2.0, learning_rate=4e-3)
    fleet = a_fleet(Setting(deaths=0.0), text=a_text(400), plan=plan, poison=-5.0)

    figures = fleet.run(160 * SEQ_LEN)

    assert (figures["poison_left_out"], figures["quarantined"]) == (5, 1)
    assert fleet._workers[-1].is_quarantined
    assert figures["tokens"] == 160 * SEQ_LEN


def test_what_is_left_out_is_trained_by_somebody_else():
    fleet = a_fleet(Setting(deaths=0.0), text=a_text(400), poison=-5.0)
    fleet._round(10**6)

    (back,) = fleet._given_back
    fleet._round(10**6)

    num_trained = fleet._next - sum(s.num for s in fleet._given_back)
    assert fleet.counts.num_poison_left_out > 0
    assert fleet.tokens == num_trained * SEQ_LEN
    assert back not in fleet._given_back


def test_a_quorum_does_not_wait_for_the_lease_of_a_dead_worker():
    patient, quick = (
        a_fleet(Setting(deaths=0.1), quorum=quorum).run(160 * SEQ_LEN)
        for quorum in (1.0, 0.7)
    )

    assert quick["virtual_s"] < patient["virtual_s"] - TTL_S / 2


def test_a_slow_probe_is_waited_for_so_that_it_is_measured():
    fleet = a_fleet(Setting(deaths=0.0), quorum=0.7)

    fleet._round(10**6)

    assert all(worker.tokens_per_s for worker in fleet._workers)
    assert fleet.counts.num_lost == 0


def test_work_that_comes_back_does_not_make_its_next_worker_late():
    fleet = a_fleet(Setting(deaths=0.0, jitter=0.0), text=a_text(400), quorum=0.7)
    for _ in range(6):
        fleet._round(10**6)
    size = fleet._size(fleet._workers[-1], PLAN.round_s)
    fleet._given_back.append(fleet._cut(size, 100, may_retry=True))
    lost = fleet.counts.num_lost

    fleet._round(10**6)

    assert fleet.counts.num_lost == lost


def test_who_works_ahead_is_done_sooner_by_using_what_it_holds():
    plain, ahead = (
        a_fleet(Setting(deaths=0.0), plan=GRADIENT, works_ahead=works_ahead)
        for works_ahead in (False, True)
    )

    done, sooner = (fleet.run(300 * SEQ_LEN) for fleet in (plain, ahead))

    assert done["stale_share"] == 0
    assert 0 < sooner["stale_share"] < 1
    assert sooner["virtual_s"] < done["virtual_s"]
    assert sooner["utilisation"] > done["utilisation"]


@pytest.mark.parametrize(
    ("ready_at", "before"), [(10.0, 0), (10.5, 1), (13.0, 3), (99.0, 4)]
)
def test_windows_that_begin_before_a_version_is_there_are_of_the_one_before(
    ready_at, before
):
    fleet = a_fleet(plan=GRADIENT, works_ahead=True)
    old, new = np.zeros(1), np.ones(1)
    fleet._versions = [(0.0, old), (ready_at, new)]

    bases = fleet._bases(4, starts_at=10.0, compute_s=4.0, fetch_s=0.0)

    assert sum(num for num, base in bases if base is old) == before
    assert sum(num for num, base in bases if base is new) == 4 - before


def test_nobody_is_two_versions_behind():
    fleet = a_fleet(plan=GRADIENT, works_ahead=True)
    fleet._versions = [(50.0, fleet.published), (60.0, fleet.published)]

    assert all(claim.claimed_at > 50.0 for claim in fleet._claims(10**6))


def test_who_works_ahead_hands_in_every_window_that_is_done_when_the_round_is_due():
    setting = Setting(deaths=0.0, jitter=0.0)
    fleet = a_fleet(setting, text=a_text(400), plan=GRADIENT, works_ahead=True)
    fleet._round(10**6)
    fleet._due += fleet._recipe.plan.round_s

    claims = fleet._claims(10**6)

    assert len(claims) == len(fleet._workers)
    for claim in claims:
        one_more_s = 1.05 / claim.worker.speed
        assert claim.back_at <= fleet._due < claim.back_at + one_more_s


def test_a_round_that_is_due_waits_for_no_lease():
    fleet = a_fleet(Setting(deaths=1.0), plan=GRADIENT, works_ahead=True)

    fleet._round(10**6)

    assert fleet.counts.num_lost == len(fleet._workers)
    assert fleet.now == fleet._due == fleet._recipe.plan.round_s


def spent_on_closing(monkeypatch, **fields):
    """Return the FLOP of a number of the flat vector in one round before its step."""
    fleet = a_fleet(Setting(deaths=0.0), plan=GRADIENT, **fields)
    spent = []
    monkeypatch.setattr(fleet, "_spend", spent.append)
    fleet._round(10**6)
    assert len(fleet._workers) == NUM_WORKERS
    step = muon.flop(NET.segments) + ADAMW * NET.num_params
    return sum(spent[: spent.index(step)]) / NET.num_params


def test_what_the_guards_have_added_up_costs_nothing_to_merge(monkeypatch):
    plain = spent_on_closing(monkeypatch, guarded=False)
    guarded = spent_on_closing(monkeypatch)

    assert plain == NUM_WORKERS * DECODE
    assert guarded == NUM_WORKERS * (PRODUCT + DECODE + PRODUCT)


def test_a_round_without_what_is_left_out_is_judged_once_more(monkeypatch):
    once = spent_on_closing(monkeypatch)
    twice = spent_on_closing(monkeypatch, poison=-1.0)

    assert twice - once == (NUM_WORKERS - 1) * (DECODE + PRODUCT)


def test_local_steps_can_not_change_their_weights_on_the_way():
    with pytest.raises(ValueError, match="works_ahead needs gradient rounds"):
        a_fleet(works_ahead=True)


def test_a_chain_of_links_stays_beside_the_master():
    fleet = a_fleet(plan=msgspec.structs.replace(PLAN, broadcast="int8"))

    figures = fleet.run(60 * SEQ_LEN)

    off = np.abs(fleet.published - fleet.master).max()
    assert 0 < off < 0.01 * np.abs(fleet.master).max()
    assert figures["bytes_down_ratio"] > 1.4


def test_tasks_of_different_length_end_as_if_each_were_alone():
    fleet = a_fleet()
    long, short = (fleet._local(claim) for claim in fleet._claims(60 * SEQ_LEN)[:2])
    del short.batches[1:]
    fresh = [msgspec_copy(task) for task in (short, long)]

    both = trained(NET, fleet.master, [short, long])

    each = [trained(NET, fleet.master, [task])[0] for task in fresh]
    for ours, alone_ in zip(both, each, strict=True):
        np.testing.assert_allclose(ours, alone_, rtol=1e-3, atol=1e-5)


def test_local_steps_of_muon_move_matrices_otherwise_and_nothing_else():
    fleet = a_fleet()
    task = fleet._local(fleet._claims(60 * SEQ_LEN)[0])
    del task.batches[1:]
    hyper = msgspec.structs.replace(task.hyper, lr_start=0.01)
    by_muon = msgspec.structs.replace(hyper, optimiser=Optimiser.MUON)

    ours, other = (
        trained(NET, fleet.master, [replace(msgspec_copy(task), hyper=each)])[0]
        for each in (by_muon, hyper)
    )

    for segment in NET.segments:
        part = slice(segment.offset, segment.offset + segment.size)
        same = np.array_equal(ours[part], other[part])
        assert same is not segment.is_linear, segment.name


def test_local_steps_of_muon_take_the_time_of_its_products():
    fleets = [
        a_fleet(plan=msgspec.structs.replace(PLAN, local_optimiser=each))
        for each in (Optimiser.MUON, Optimiser.ADAMW)
    ]

    by_muon, by_adamw = (fleet._step_flop for fleet in fleets)

    assert by_adamw == ADAMW * NET.num_params
    assert by_muon == by_adamw + muon.flop(NET.segments)


def msgspec_copy(task):
    return type(task)(list(task.batches), task.hyper, task.moments.copy())


def test_a_result_is_kept_and_found_again(tmp_path):
    calls = []

    def act(number):
        calls.append(number)
        return {"twice": 2 * number}

    jobs = [Job("a", act, {"number": number}) for number in (1, 1, 2)]
    found = [kept_or_done(tmp_path / job.file_name(), job) for job in jobs]

    assert found == [{"twice": 2}, {"twice": 2}, {"twice": 4}]
    assert calls == [1, 2]


def test_a_result_outlives_changes_of_code_that_it_did_not_run_through(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(results, "ROOT", tmp_path)

    def names(mine, other):
        (tmp_path / "mine").write_text(mine)
        (tmp_path / "other").write_text(other)
        results.digest_of.cache_clear()
        return Job("a", dict, {}, ("mine",)).file_name()

    assert names("1", "1") == names("1", "2") != names("2", "1")
    results.digest_of.cache_clear()


def test_the_standard_library_is_text_enough():
    text = read_text()

    assert len(text.train) > 36_000
    assert len(text.held_out) == 1024
    assert (np.sort(text.order(7, 0)) == np.arange(len(text.train))).all()


@pytest.mark.parametrize("begins", [Begins.KEPT, Begins.ZEROS, Begins.COPIED])
def test_who_has_lost_its_disk_begins_as_the_study_of_joiners_says(begins):
    recipe = Recipe(plan=PLAN, keeps_state=begins is Begins.KEPT)
    fleet = Joining(NET, a_text(), recipe, seed=0, setting=Setting(deaths=0.0))
    fleet.begins = begins
    fleet.losses(2)
    (last,) = fleet._workers[-1:]
    dies = Claim(last, Stretch(0, 0, 1), 0.0, (), None, TTL_S)
    own, copied = last.moments.copy(), fleet.kept

    fleet._end(dies, 0.0, is_back=False)

    due = {Begins.KEPT: own.step, Begins.ZEROS: 0, Begins.COPIED: copied.step}
    assert 0 < copied.step < own.step
    assert last.moments.step == due[begins]
    assert bool(last.moments.square.any()) == (begins is not Begins.ZEROS)
