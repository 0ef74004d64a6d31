"""What a worker remembers belongs to one run and one layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitnet_ext.layout import layout_hash
from tests.unit.worker.shapes import SMALL
from worker.memory import Learned, Memory
from worker.registration import Run
from worker.train import Moments

RUN = Run(
    run_id="r1",
    shape=SMALL,
    layout_hash=layout_hash(SMALL),
    batch_size=4,
    heartbeat_s=5.0,
)
LEARNED = Learned(Moments.zeros(SMALL), None)


def test_what_was_committed_is_recalled() -> None:
    memory = Memory()
    assert memory.recall(RUN) is None

    memory.commit(RUN, LEARNED)

    assert memory.recall(RUN) is LEARNED


def test_a_commit_belongs_to_its_own_run_whatever_was_asked_before() -> None:
    memory = Memory()

    memory.commit(RUN, LEARNED)

    assert memory.recall(RUN) is LEARNED


@pytest.mark.parametrize(
    "other", [replace(RUN, run_id="r2"), replace(RUN, layout_hash=b"x" * 32)]
)
def test_another_run_or_layout_starts_from_nothing_and_forgets(other: Run) -> None:
    memory = Memory()
    memory.commit(RUN, LEARNED)

    assert memory.recall(other) is None
    assert memory.recall(RUN) is None
