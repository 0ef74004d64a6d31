"""The order of a shard: each sequence once, shuffled in blocks, the same for all."""

from __future__ import annotations

import msgspec
import pytest

from bitnet_ext.wire.messages import Task
from tests.unit.worker.shapes import a_task
from worker.errors import BadShardError, TaskError
from worker.order import sequence_starts, text_window

SEQ_LEN = 16
BLOCK = 4
#: Three blocks, two whole sequences, and one of 8 tokens.
SHARD = 232


def a_stretch(first: int, end: int, *, shard: int = SHARD, **changes: int) -> Task:
    """Return the task of tokens `first` to `end` of the order of a shard."""
    return msgspec.structs.replace(
        a_task(end - first),
        byte_offset=4 * first,
        byte_length=4 * (end - first),
        shard_bytes=4 * shard,
        **changes,
    )


def starts(first: int, end: int, **changes: int) -> list[int]:
    return sequence_starts(a_stretch(first, end, **changes)).tolist()


@pytest.mark.parametrize("shard", [1, 15, 16, 17, 63, 64, 65, 128, 129, 200, SHARD])
def test_a_whole_shard_is_every_sequence_once(shard) -> None:
    assert sorted(starts(0, shard, shard=shard)) == list(range(0, shard, SEQ_LEN))


@pytest.mark.parametrize("cut", [16, 48, 64, 80, 128, 192, 224])
def test_wherever_it_is_cut_both_parts_together_are_the_whole(cut) -> None:
    assert starts(0, cut) + starts(cut, SHARD) == starts(0, SHARD)


def test_sequences_are_shuffled_within_their_block_only() -> None:
    found = starts(0, 192)

    for block in range(3):
        size = BLOCK * SEQ_LEN
        part = [start - block * size for start in found[BLOCK * block :][:BLOCK]]
        assert sorted(part) == [0, 16, 32, 48]
    assert found != sorted(found)


def test_the_short_sequence_at_the_end_of_a_shard_goes_last() -> None:
    for seed in range(20):
        assert starts(128, SHARD, seed=seed)[-1] == 224


def test_the_order_goes_by_the_seed_and_the_block() -> None:
    one, other = (starts(0, 1024, shard=1024, seed=s, block_size=32) for s in (7, 8))

    assert one == starts(0, 1024, shard=1024, seed=7, block_size=32)
    assert one != other
    assert [start - 512 for start in one[32:]] != one[:32]


def test_the_order_is_the_same_with_every_numpy() -> None:
    # Two workers share a block: were this to change, one would train what another has.
    assert starts(0, 128, shard=128) == [48, 0, 32, 16, 80, 112, 96, 64]


@pytest.mark.parametrize(
    ("first", "end", "window"),
    [
        (0, 16, (0, 64)),
        (48, 64, (0, 64)),
        (48, 80, (0, 128)),
        (64, 128, (64, 128)),
        (208, SHARD, (192, SHARD)),
    ],
)
def test_the_text_of_a_task_is_that_of_the_blocks_it_reaches_into(
    first, end, window
) -> None:
    assert text_window(a_stretch(first, end)) == window


def test_an_evaluation_needs_its_own_stretch_only() -> None:
    assert text_window(a_stretch(20, 30, block_size=0)) == (20, 30)


@pytest.mark.parametrize(
    ("first", "end", "changes"), [(8, 24, {}), (0, 24, {}), (0, 16, {"block_size": 0})]
)
def test_a_task_that_is_not_whole_sequences_in_blocks_is_refused(
    first, end, changes
) -> None:
    said = f"tokens {first} to {end}, block_size {changes.get('block_size', BLOCK)}"

    with pytest.raises(TaskError, match=said):
        starts(first, end, **changes)


def test_a_stretch_beyond_the_shard_is_refused() -> None:
    with pytest.raises(BadShardError, match="within its 928 bytes, got 960"):
        text_window(a_stretch(224, 240))
