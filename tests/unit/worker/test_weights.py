"""Weight versions: fetched once, verified before anything reads them."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace

import numpy as np
import pytest

from bitnet_ext.chain import next_link
from bitnet_ext.codecs import Codec, encode
from bitnet_ext.frames import FrameHeader, FrameKind, encode_frame
from bitnet_ext.layout import layout_hash
from bitnet_ext.wire.verdicts import ErrorCode
from tests.unit.worker.fleet import published
from tests.unit.worker.shapes import SMALL, seeded_weights
from tests.unit.worker.stand_in import Reply, part_of, refuses
from worker.errors import BadWeightsError, RefusedError, RetryLaterError
from worker.shelf import Shelf
from worker.weights import KEPT, Version, WeightCache, read_weights


@pytest.fixture
def cache(client) -> WeightCache:
    return WeightCache(client.continue_download, Shelf(None))


def sha256(frame: bytes) -> str:
    return hashlib.sha256(frame).hexdigest()


def get(cache, version: int, frame: bytes, on_bytes=lambda _: None):
    return cache.get(Version("r1", version, sha256(frame), SMALL), on_bytes)


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
    headers = {"Content-Type": "application/octet-stream"}
    coordinator.on("GET /weights/1", Reply(200, bytes(frame), headers))

    with pytest.raises(BadWeightsError, match=f"must have SHA-256 {expected}"):
        cache.get(Version("r1", 1, expected, SMALL), lambda _: None)


def test_weights_of_a_model_of_another_size_are_refused(coordinator, cache) -> None:
    frame = published(replace(SMALL, num_layers=1))
    coordinator.serve("/weights/1", frame)

    with pytest.raises(BadWeightsError, match="Content-Length must be"):
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


# -- links -----------------------------------------------------------------------


class Chain:
    """Versions 1, 2, ... that a stand-in serves whole and by their links."""

    def __init__(self, coordinator, cache, num_versions: int) -> None:
        self.coordinator, self.cache = coordinator, cache
        self.weights = {1: seeded_weights(SMALL, 1)}
        self.links: dict[int, bytes] = {}
        for number in range(2, num_versions + 1):
            now = self.weights[number - 1].copy()
            master = now + np.float32(0.01) * seeded_weights(SMALL, number)
            payload = next_link(Codec.TERNARY, master, now)
            self.weights[number] = now
            self.links[number] = framed(
                payload,
                kind=FrameKind.LINK,
                codec=Codec.TERNARY,
                version=number,
                num_elements=now.size,
            )
        for number in self.weights:
            coordinator.serve(f"/weights/{number}", self.frame(number))

    def frame(self, number: int) -> bytes:
        return framed(self.weights[number].tobytes(), version=number)

    def serve(self, held: int, version: int, content: bytes | None = None) -> None:
        links = [self.links[number] for number in range(held + 1, version + 1)]
        content = b"".join(links) if content is None else content
        self.coordinator.serve(f"/weights/{version}?from={held}", content)

    def get(self, number: int, **changes):
        wanted = Version("r1", number, sha256(self.frame(number)), SMALL, "ternary")
        return self.cache.get(replace(wanted, **changes), lambda _: None)

    def asked(self) -> list[str]:
        paths = [request.path for request in self.coordinator.requests]
        return [path.removeprefix("/weights/") for path in paths]


@pytest.fixture
def chain(coordinator, cache) -> Chain:
    return Chain(coordinator, cache, 5)


def test_a_held_version_becomes_the_newer_one_by_its_links(chain) -> None:
    chain.serve(1, 2)
    chain.serve(2, 5)
    chain.get(1)

    for number in (2, 5):
        assert chain.get(number).tobytes() == chain.weights[number].tobytes()

    assert chain.asked() == ["1", "2?from=1", "5?from=2"]
    assert np.array_equal(chain.get(2), chain.weights[2]), "an older one was changed"


def test_links_that_break_off_are_asked_for_again(coordinator, client) -> None:
    def patiently(download) -> None:
        with contextlib.suppress(RetryLaterError):
            client.continue_download(download)
        if download.received < len(download.into):
            client.continue_download(download)

    chain = Chain(coordinator, WeightCache(patiently, Shelf(None)), 2)
    chain.get(1)
    link = chain.links[2]
    coordinator.on(
        "GET /weights/2?from=1",
        lambda request: replace(part_of(link, request), cut_after=100),
        lambda request: part_of(link, request),
    )

    assert chain.get(2).tobytes() == chain.weights[2].tobytes()

    assert chain.asked() == ["1", "2?from=1", "2?from=1"]


def damaged(link: bytes) -> bytes:
    return link[:100] + bytes([link[100] ^ 1]) + link[101:]


@pytest.mark.parametrize(
    "tamper",
    [
        lambda chain: damaged(chain.links[2]),
        lambda chain: chain.links[3],  # a sound link, of another version
        lambda chain: chain.frame(2),  # all of it, because a link is missing
        lambda chain: b"",
    ],
)
def test_links_that_are_of_no_use_let_the_version_come_whole(
    chain, caplog, tamper
) -> None:
    chain.get(1)
    chain.serve(1, 2, tamper(chain))

    assert chain.get(2).tobytes() == chain.weights[2].tobytes()

    assert chain.asked() == ["1", "2?from=1", "2"]
    (line,) = [r for r in caplog.records if r.event == "links.refused"]
    assert "version 2 is fetched whole" in line.message


def test_links_that_lead_to_other_bytes_are_not_believed(chain) -> None:
    chain.get(1)
    wrong = seeded_weights(SMALL, 1)
    payload = next_link(Codec.TERNARY, seeded_weights(SMALL, 77), wrong)
    chain.serve(
        1,
        2,
        framed(
            payload,
            kind=FrameKind.LINK,
            codec=Codec.TERNARY,
            version=2,
            num_elements=wrong.size,
        ),
    )

    assert chain.get(2).tobytes() == chain.weights[2].tobytes()
    assert chain.asked()[-1] == "2"


def test_no_links_are_asked_for_where_they_are_longer_or_not_understood(
    coordinator, cache
) -> None:
    chain = Chain(coordinator, cache, 30)
    chain.get(1)

    for number, broadcast in [(30, "ternary"), (2, "exact"), (3, "top3")]:
        chain.get(number, broadcast=broadcast)

    assert chain.asked() == ["1", "30", "2", "3"]


def test_a_version_that_is_gone_altogether_is_a_bad_version(chain, coordinator) -> None:
    chain.get(1)
    coordinator.on("GET /weights/2", refuses(404, ErrorCode.UNKNOWN_VERSION))
    coordinator.on("GET /weights/2?from=1", refuses(404, ErrorCode.UNKNOWN_VERSION))

    with pytest.raises(BadWeightsError, match="unknown_version"):
        chain.get(2)


def test_a_worker_that_starts_again_goes_on_from_the_version_it_held(
    coordinator, client, tmp_path
) -> None:
    def cache() -> WeightCache:
        return WeightCache(client.continue_download, Shelf(tmp_path))

    chain = Chain(coordinator, cache(), 5)
    chain.serve(1, 2)
    chain.serve(2, 3)
    for number in (1, 2):
        chain.get(number)

    chain.cache = cache()
    assert chain.get(3).tobytes() == chain.weights[3].tobytes()
    chain.cache = cache()
    chain.get(3)

    assert chain.asked() == ["1", "2?from=1", "3?from=2"]


def test_scoring_an_old_version_leaves_the_newest_on_the_shelf(
    coordinator, client, tmp_path
) -> None:
    def cache() -> WeightCache:
        return WeightCache(client.continue_download, Shelf(tmp_path))

    chain = Chain(coordinator, cache(), 4)
    chain.get(4)
    chain.get(1)

    chain.cache = cache()
    chain.get(4)

    assert chain.asked() == ["4", "1"]


def test_whole_versions_are_not_kept_on_disk(coordinator, client, tmp_path) -> None:
    cache = WeightCache(client.continue_download, Shelf(tmp_path))
    coordinator.serve("/weights/1", published())

    get(cache, 1, published())

    assert list(tmp_path.iterdir()) == []


def test_a_held_version_of_another_coordinator_is_found_out(
    coordinator, client, tmp_path
) -> None:
    other = Chain(
        coordinator, WeightCache(client.continue_download, Shelf(tmp_path)), 2
    )
    other.weights[1] = seeded_weights(SMALL, 99)
    coordinator.serve("/weights/1", other.frame(1))
    other.get(1)
    cache = WeightCache(client.continue_download, Shelf(tmp_path))
    chain = Chain(coordinator, cache, 2)
    chain.serve(1, 2)

    assert chain.get(2).tobytes() == chain.weights[2].tobytes()
    assert chain.asked()[-2:] == ["2?from=1", "2"]
