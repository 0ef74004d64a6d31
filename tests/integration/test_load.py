"""A crowd that only speaks is served by a real coordinator like real workers are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import crowd, load
from tests.bench.load import STAGES, run_load
from tests.integration.fleet import make_corpus


@pytest.mark.slow
def test_a_crowd_makes_versions_and_nothing_of_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So fast that a round is over in a second.
    monkeypatch.setattr(crowd, "SPEEDS", (1000.0, 2000.0))
    for module in (crowd, load):
        monkeypatch.setattr(module, "ARRIVAL_S", 0.1)
    manifest = make_corpus(tmp_path / "corpus")

    found = run_load(
        tmp_path / "load",
        tmp_path / "corpus",
        manifest,
        preset="tiny",
        num_workers=3,
        num_rounds=2,
        round_s=1.0,
    )

    assert len(found.closings) >= 2
    assert all(set(one.stages) == set(STAGES) for one in found.closings)
    assert found.num_tasks == len(found.submit_s) > 0
    assert all(seconds >= 0.0 for seconds in found.claim_s)
    assert found.feed_bytes > 0
    assert found.cpu_s > 0.0
    assert not found.refusals
    assert found.num_expired == 0
