"""Which versions lose their blobs, and which never do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain.retention import versions_to_prune


def test_the_last_ones_every_hundredth_and_what_is_in_use_stay():
    kept = [*range(95, 131)]

    gone = versions_to_prune(kept, newest=130, pinned={97, 105}, keep_last=20)

    assert gone == [95, 96, 98, 99, 101, 102, 103, 104, 106, 107, 108, 109, 110]


@given(
    kept=st.sets(st.integers(1, 400)),
    newest=st.integers(1, 400),
    pinned=st.sets(st.integers(1, 400)),
    keep_last=st.integers(1, 50),
)
def test_nothing_that_is_needed_is_pruned(kept, newest, pinned, keep_last):
    gone = versions_to_prune(
        sorted(kept), newest=newest, pinned=pinned, keep_last=keep_last
    )

    assert gone == sorted(set(gone) & kept)
    assert not set(gone) & pinned
    assert not set(gone) & set(range(newest - keep_last + 1, newest + 1))
    assert all(version % 100 for version in gone)
