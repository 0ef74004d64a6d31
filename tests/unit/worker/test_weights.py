"""Weight versions: fetched once, verified before anything reads them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from bitnet_ext.codecs import Codec, encode
from bitnet_ext.frames import FrameHeader, FrameKind, encode_frame
from bitnet_ext.layout import layout_hash
from bitnet_ext.wire.verdicts import ErrorCode
from tests.unit.worker.fleet import published
from tests.unit.worker.shapes import SMALL, seeded_weights
from tests.unit.worker.stand_in import Reply, refuses
from worker.errors import BadWeightsError, RefusedError
from worker.weights import KEPT, WeightCache, read_weights


@pytest.fixture
def cache(client) -> WeightCache:
    return WeightCache(client.continue_download)


def sha256(frame: bytes) -> str:
    return hashlib.sha256(frame).hexdigest()


def get(cache, version: int, frame: bytes, on_bytes=lambda _: None):
    return cache.get(version, sha256(frame), SMALL, on_bytes)


def test_a_version_is_fetched_and_decoded(coordinator, cache) -> None:
    frame, pieces = published(version=7, seed=3), []
    coordinator.serve("/weights/7", frame)

    weights = get(cache, 7, frame, pieces.append)

    assert np.array_equal(weights, seeded_weights(SMALL, 3))
    assert sum(pieces) == len(frame)


def test_nobody_can_write_to_what_others_will_read(coordinator, cache) -> None:
    frame = published()
    coordinator.serve("/weights/1", frame)

    with pytest.raises(ValueError, match="read-only"):
        get(cache, 1, frame)[0] = 1.0


def test_the_newest_two_are_kept(coordinator, cache) -> None:
    frames = {version: published(version=version) for version in (1, 2, 3)}
    for version, frame in frames.items():
        coordinator.serve(f"/weights/{version}", frame)

    for version in (1, 2, 1, 3, 1, 2):
        get(cache, version, frames[version])

    assert KEPT == 2
    asked = [request.path.rpartition("/")[2] for request in coordinator.requests]
    assert asked == ["1", "2", "3", "2"]


def test_a_version_with_another_hash_is_another_version(coordinator, cache) -> None:
    one, other = published(seed=1), published(seed=2)
    coordinator.serve("/weights/1", one)
    get(cache, 1, one)
    coordinator.serve("/weights/1", other)

    assert np.array_equal(get(cache, 1, other), seeded_weights(SMALL, 2))


def test_bytes_with_another_hash_are_refused(coordinator, cache) -> None:
    frame = bytearray(published())
    expected = sha256(bytes(frame))
    frame[500] ^= 1
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Range": f"bytes 0-{len(frame) - 1}/{len(frame)}",
    }
    coordinator.on("GET /weights/1", Reply(206, bytes(frame), headers))

    with pytest.raises(BadWeightsError, match=f"must have SHA-256 {expected}"):
        cache.get(1, expected, SMALL, lambda _: None)


def test_weights_of_a_model_of_another_size_are_refused(coordinator, cache) -> None:
    frame = published(replace(SMALL, num_layers=1))
    coordinator.serve("/weights/1", frame)

    with pytest.raises(BadWeightsError, match="Content-Range must be"):
        get(cache, 1, frame)


def test_a_version_that_is_not_kept_is_a_bad_version(coordinator, cache) -> None:
    coordinator.on(
        "GET /weights/1",
        refuses(404, ErrorCode.UNKNOWN_VERSION),
        refuses(401, ErrorCode.UNAUTHORIZED),
    )

    with pytest.raises(BadWeightsError, match="unknown_version"):
        get(cache, 1, published())
    with pytest.raises(RefusedError, match="unauthorized"):
        get(cache, 1, published())


def test_another_version_in_the_frame_is_refused(coordinator, cache) -> None:
    frame = published(version=2)
    coordinator.serve("/weights/1", frame)

    with pytest.raises(BadWeightsError, match="version must be 1, got 2"):
        get(cache, 1, frame)


def framed(payload: bytes, **changes: object) -> bytes:
    fields = {
        "kind": FrameKind.WEIGHTS,
        "codec": Codec.FP32,
        "layout_hash": layout_hash(SMALL),
        "version": 1,
        "num_elements": len(payload) // 4,
    }
    return encode_frame(FrameHeader(**(fields | changes)), payload)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": FrameKind.DELTA}, "kind must be weights, got delta"),
        ({"layout_hash": b"\0" * 32}, "layout_hash must be"),
    ],
)
def test_a_frame_of_something_else_is_refused(change, said) -> None:
    payload = encode(Codec.FP32, seeded_weights(SMALL))

    with pytest.raises(BadWeightsError, match=said):
        read_weights(framed(payload, **change), SMALL)


def test_numbers_that_are_not_finite_are_refused() -> None:
    weights = seeded_weights(SMALL)
    weights[17] = np.nan

    with pytest.raises(BadWeightsError, match="finite"):
        read_weights(framed(weights.tobytes()), SMALL)


def test_a_damaged_frame_is_refused() -> None:
    frame = bytearray(published())
    frame[1000] ^= 1

    with pytest.raises(BadWeightsError, match="checksum"):
        read_weights(frame, SMALL)
