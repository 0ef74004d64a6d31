"""What a worker remembers belongs to one run and one layout, and outlives it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitnet_ext.layout import layout_hash, num_params, segments
from bitnet_ext.wire.verdicts import Optimiser, RoundKind
from tests.unit.worker.shapes import SMALL, seeded_weights
from worker.memory import Learned, Memory
from worker.registration import Run
from worker.shelf import Shelf
from worker.train import Moments

RUN = Run(
    run_id="r1",
    shape=SMALL,
    layout_hash=layout_hash(SMALL),
    batch_size=4,
    optimiser=Optimiser.MUON,
    heartbeat_s=5.0,
)
DELTA, GRADIENT = RoundKind.DELTA, RoundKind.GRADIENT
LEARNED = Learned(Moments.zeros(SMALL), None, DELTA)


def test_what_was_committed_is_recalled() -> None:
    memory = Memory(Shelf(None))
    assert memory.recall(RUN) is None

    memory.commit(RUN, LEARNED)

    assert memory.recall(RUN) is LEARNED


def test_a_commit_belongs_to_its_own_run_whatever_was_asked_before() -> None:
    memory = Memory(Shelf(None))

    memory.commit(RUN, LEARNED)

    assert memory.recall(RUN) is LEARNED


@pytest.mark.parametrize(
    "other", [replace(RUN, run_id="r2"), replace(RUN, layout_hash=b"x" * 32)]
)
def test_another_run_or_layout_starts_from_nothing_and_forgets(other: Run) -> None:
    memory = Memory(Shelf(None))
    memory.commit(RUN, LEARNED)

    assert memory.recall(other) is None
    assert memory.recall(RUN) is None


# -- on disk ---------------------------------------------------------------------

SIZE = num_params(SMALL)


def learned(seed: int, residual: bool = True) -> Learned:
    chance = torch.Generator().manual_seed(seed)
    moments = Moments(
        torch.randn(SIZE, generator=chance),
        torch.rand(SIZE, generator=chance),
        torch.full((len(segments(SMALL)),), 1000.0 + seed),
    )
    return Learned(moments, seeded_weights(SMALL, seed) if residual else None, DELTA)


def assert_same(found: Learned | None, due: Learned) -> None:
    assert found is not None
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(getattr(found.moments, name), getattr(due.moments, name))
    if due.residual is None:
        assert found.residual is None
    else:
        np.testing.assert_array_equal(found.residual, due.residual)


def test_another_process_goes_on_with_what_was_committed_last(tmp_path) -> None:
    memory = Memory(Shelf(tmp_path / "made"))
    memory.commit(RUN, learned(1))
    memory.commit(RUN, learned(2))

    assert_same(Memory(Shelf(tmp_path / "made")).recall(RUN), learned(2))


def test_a_codec_that_loses_nothing_leaves_no_residual_behind(tmp_path) -> None:
    memory = Memory(Shelf(tmp_path))
    memory.commit(RUN, learned(1))
    memory.commit(RUN, learned(2, residual=False))

    assert_same(Memory(Shelf(tmp_path)).recall(RUN), learned(2, residual=False))


def test_gradient_rounds_leave_no_moments_behind(tmp_path) -> None:
    memory = Memory(Shelf(tmp_path))
    memory.commit(RUN, learned(1))
    memory.commit(RUN, Learned(None, learned(2).residual, GRADIENT))

    found = Memory(Shelf(tmp_path)).recall(RUN)

    assert found is not None
    assert found.moments is None
    np.testing.assert_array_equal(found.residual, learned(2).residual)


def test_a_residual_is_part_of_payloads_of_its_own_kind_alone() -> None:
    residual = seeded_weights(SMALL, 1)

    for kind, other in ((DELTA, GRADIENT), (GRADIENT, DELTA)):
        found = Learned(None, residual, kind)
        assert found.residual_for(kind) is residual
        assert found.residual_for(other) is None


@pytest.mark.parametrize(("before", "after"), [(DELTA, GRADIENT), (GRADIENT, DELTA)])
def test_another_process_knows_what_kind_its_residual_is_of(
    tmp_path, before, after
) -> None:
    memory = Memory(Shelf(tmp_path))
    for seed, kind in ((1, before), (2, after)):
        memory.commit(RUN, Learned(None, seeded_weights(SMALL, seed), kind))

    found = Memory(Shelf(tmp_path)).recall(RUN)

    assert found is not None
    assert found.residual_for(before) is None
    np.testing.assert_array_equal(found.residual_for(after), seeded_weights(SMALL, 2))
    assert len(list(tmp_path.iterdir())) == 1


def test_files_of_another_run_are_left_until_there_is_something_better(
    tmp_path,
) -> None:
    Memory(Shelf(tmp_path)).commit(RUN, learned(1))
    other = replace(RUN, run_id="r2")
    memory = Memory(Shelf(tmp_path))

    assert memory.recall(other) is None
    assert_same(Memory(Shelf(tmp_path)).recall(RUN), learned(1))
    memory.commit(other, learned(2))

    assert {path.name for path in tmp_path.iterdir()} == {
        "r2.residual.frame",
        "r2.moments.frame",
    }


def test_what_is_of_another_layout_is_thrown_away(tmp_path, caplog) -> None:
    Memory(Shelf(tmp_path)).commit(RUN, learned(1))

    assert Memory(Shelf(tmp_path)).recall(replace(RUN, layout_hash=b"x" * 32)) is None

    assert list(tmp_path.iterdir()) == []
    assert "layout_hash must be" in caplog.text


@pytest.mark.parametrize("kind", ["residual", "moments"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:100] + b"xxxx" + content[104:],
    ],
)
def test_a_torn_file_is_thrown_away_and_the_other_one_counts(
    tmp_path, caplog, kind, damage
) -> None:
    Memory(Shelf(tmp_path)).commit(RUN, learned(1))
    path = tmp_path / f"r1.{kind}.frame"
    path.write_bytes(damage(path.read_bytes()))

    found = Memory(Shelf(tmp_path)).recall(RUN)

    assert found is not None
    assert (found.residual is None) == (kind == "residual")
    assert (found.moments is None) == (kind == "moments")
    assert not path.exists()
    assert f"{path} is of no use" in caplog.text


def test_a_write_that_was_killed_leaves_what_was_there(tmp_path) -> None:
    Memory(Shelf(tmp_path)).commit(RUN, learned(1))
    (tmp_path / "r1.residual.part").write_bytes(b"half")

    memory = Memory(Shelf(tmp_path))
    assert_same(memory.recall(RUN), learned(1))

    memory.commit(RUN, learned(2))
    assert not list(tmp_path.glob("*.part"))


def test_a_disk_that_fails_stops_no_work_and_leaves_nothing_old(
    tmp_path, caplog
) -> None:
    memory = Memory(Shelf(tmp_path))
    memory.commit(RUN, learned(1))
    # A folder in its place: the new file can't be written.
    (tmp_path / "r1.residual.part" / "x").mkdir(parents=True)

    memory.commit(RUN, learned(2))

    assert_same(memory.recall(RUN), learned(2))
    assert "is of no use" in caplog.text
    assert Memory(Shelf(tmp_path)).recall(RUN) is None


def test_a_residual_that_is_not_finite_is_not_kept(tmp_path) -> None:
    broken = learned(1)
    broken.residual[3] = np.inf

    Memory(Shelf(tmp_path)).commit(RUN, broken)

    found = Memory(Shelf(tmp_path)).recall(RUN)
    assert found is not None
    assert found.residual is None
