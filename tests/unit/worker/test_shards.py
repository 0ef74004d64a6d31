"""Stretches of a shard: what is asked for, and what is refused."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pytest

from bitnet_ext.wire.messages import Task
from bitnet_ext.wire.verdicts import ErrorCode
from tests.unit.worker.shapes import a_task
from tests.unit.worker.stand_in import Reply, refuses
from worker.errors import BadShardError, RefusedError
from worker.shards import TextCache, fetch_tokens

VOCAB = 64
SHARD = np.random.default_rng(0).integers(0, VOCAB, 100, dtype=np.int32)
CONTENT = SHARD.astype("<i4").tobytes()


def of_shard(first: int, count: int, content: bytes = CONTENT, **changes) -> Task:
    fields = {
        "byte_offset": 4 * first,
        "byte_length": 4 * count,
        "shard_bytes": len(content),
        "shard_sha256": hashlib.sha256(content).hexdigest(),
        "block_size": 0,
    }
    return msgspec.structs.replace(a_task(count), **(fields | changes))


@pytest.fixture
def fetch(coordinator, client):
    coordinator.serve("/corpus/train-00000", CONTENT)

    def tokens_of(task: Task, on_bytes=lambda _: None):
        return fetch_tokens(client.continue_download, task, VOCAB, on_bytes)

    return tokens_of


@pytest.mark.parametrize(
    ("first", "count", "following"),
    [(0, 10, 1), (50, 49, 1), (50, 50, 0), (0, 100, 0), (0, 99, 1), (99, 1, 0)],
)
def test_a_stretch_comes_with_the_token_after_it_where_there_is_one(
    coordinator, fetch, first, count, following
) -> None:
    pieces: list[int] = []

    tokens = fetch(of_shard(first, count), pieces.append)

    assert tokens.dtype == np.int32
    assert tokens.tolist() == SHARD[first : first + count + following].tolist()
    assert sum(pieces) == 4 * (count + following)
    last = 4 * (first + count + following) - 1
    part = None if len(tokens) == len(SHARD) else f"bytes={4 * first}-{last}"
    assert coordinator.requests[0].headers.get("Range") == part


def test_in_training_whole_blocks_come(fetch) -> None:
    assert fetch(of_shard(16, 16, block_size=2)).tolist() == SHARD[:33].tolist()
    assert fetch(of_shard(16, 32, block_size=2)).tolist() == SHARD[:65].tolist()
    assert fetch(of_shard(64, 36, block_size=2)).tolist() == SHARD[64:].tolist()


def windows_of(shards, *tasks):
    return [shards.get(task, VOCAB, lambda _: None).tolist() for task in tasks]


@pytest.mark.usefixtures("fetch")
def test_what_lies_in_a_window_that_is_kept_is_not_fetched_again(
    coordinator, client
) -> None:
    shards = TextCache(client.continue_download)
    two_blocks = of_shard(16, 32, block_size=2)
    first, second = (of_shard(start, 16, block_size=2) for start in (0, 48))

    found = windows_of(shards, two_blocks, first, second, two_blocks)

    assert len(coordinator.requests) == 1
    whole = SHARD.tolist()
    assert found == [whole[:65], whole[:33], whole[32:65], whole[:65]]


@pytest.mark.usefixtures("fetch")
def test_the_end_of_a_shard_has_no_token_after_it_in_a_kept_window(client) -> None:
    shards = TextCache(client.continue_download)

    found = windows_of(
        shards, of_shard(64, 36, block_size=2), of_shard(96, 4, block_size=1)
    )

    assert found == [SHARD[64:].tolist(), SHARD[96:].tolist()]


@pytest.mark.usefixtures("fetch")
def test_the_two_latest_windows_are_kept_each_for_its_own_shard_and_vocabulary(
    coordinator, client
) -> None:
    shards = TextCache(client.continue_download)
    first, second, third = (of_shard(start, 10) for start in (0, 30, 60))
    other = np.arange(10, 60, dtype="<i4").tobytes()

    windows_of(shards, first, second, second, first, third, first)
    assert len(coordinator.requests) == 3
    windows_of(shards, second)
    assert len(coordinator.requests) == 4
    shards.get(second, VOCAB + 1, lambda _: None)
    assert len(coordinator.requests) == 5
    coordinator.serve("/corpus/train-00000", other)
    assert windows_of(shards, of_shard(30, 10, other)) == [list(range(40, 51))]


@pytest.mark.usefixtures("fetch")
def test_a_window_that_tasks_share_cannot_be_changed(client) -> None:
    tokens = TextCache(client.continue_download).get(
        of_shard(0, 10), VOCAB, lambda _: None
    )

    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"byte_offset": 2}, "byte_offset must be a multiple of 4, got 2"),
        ({"byte_length": 5}, "byte_length must be a multiple of 4, got 5"),
        ({"shard_bytes": 401}, "shard_bytes must be a multiple of 4, got 401"),
        ({"byte_offset": 396}, "must end within its 400 bytes, got 436"),
    ],
)
def test_a_stretch_that_fits_no_shard_is_refused_unasked(
    coordinator, fetch, changes, said
) -> None:
    with pytest.raises(BadShardError, match=said):
        fetch(of_shard(0, 10, **changes))

    assert not coordinator.requests


def test_a_whole_shard_must_have_its_hash(coordinator, fetch) -> None:
    damaged = CONTENT[:-4] + b"\1\0\0\0"
    task = of_shard(0, 100)

    def without_etag(_request) -> Reply:
        return Reply(200, damaged, {"Content-Type": "application/octet-stream"})

    coordinator.on("GET /corpus/train-00000", without_etag)

    with pytest.raises(BadShardError, match=r"must have SHA-256 .* got"):
        fetch(task)


def test_another_shard_under_the_same_name_is_refused(fetch) -> None:
    with pytest.raises(BadShardError, match="ETag must be"):
        fetch(of_shard(0, 10, shard_sha256="1" * 64))


def test_text_is_refused(coordinator, fetch) -> None:
    text = Reply(
        206,
        CONTENT[:44],
        {
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Range": f"bytes 0-43/{len(CONTENT)}",
        },
    )
    coordinator.on("GET /corpus/train-00000", text)

    with pytest.raises(BadShardError, match="got text/plain"):
        fetch(of_shard(0, 10))


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_is_refused(coordinator, fetch, wrong) -> None:
    content = np.append(SHARD[:20], wrong).astype("<i4").tobytes()
    coordinator.serve("/corpus/train-00000", content)

    with pytest.raises(BadShardError, match=f"from 0 to 63, got {wrong}"):
        fetch(of_shard(0, 20, content))


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, ErrorCode.UNKNOWN_SHARD), (416, ErrorCode.BAD_RANGE)],
)
def test_a_shard_that_is_not_served_is_a_bad_shard(
    coordinator, fetch, status, code
) -> None:
    coordinator.on("GET /corpus/train-00000", refuses(status, code))

    with pytest.raises(BadShardError, match=code):
        fetch(of_shard(0, 10))


def test_any_other_refusal_is_no_fault_of_the_shard(coordinator, fetch) -> None:
    coordinator.on("GET /corpus/train-00000", refuses(401, ErrorCode.UNAUTHORIZED))

    with pytest.raises(RefusedError, match="unauthorized"):
        fetch(of_shard(0, 10))
