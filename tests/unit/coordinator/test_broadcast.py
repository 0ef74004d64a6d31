"""Versions as a chain of links: what workers add up is what was published."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from bitnet_ext.chain import add_links
from bitnet_ext.layout import layout_hash
from coordinator.service.closing import RoundCloser
from coordinator.service.own_files import look_after
from coordinator.service.serving import open_weights
from coordinator.service.starting import reconcile
from coordinator.service.version_blobs import read_published
from coordinator.store import versions
from coordinator.store.blobs import BlobKind, version_blob
from tests.fakes import MadeToFailError
from tests.unit.coordinator.fleets import NUM_PARAMS, PLAN, SHAPE, World, open_world

#: Durability calls of a version: link and published frame, three parts each, and the
#: state, which has four.
NUM_CALLS = 2 * 9 + 10


def start(world: World, broadcast: str = "ternary") -> World:
    world.start_run(msgspec.structs.replace(PLAN, broadcast=broadcast))
    world.register("w1")
    return world


@pytest.fixture
def chained(world: World) -> World:
    """A fleet whose versions are a chain of ternary links, and its worker w1."""
    return start(world)


def train(world: World, num_rounds: int, seed: int = 0) -> None:
    for number in range(num_rounds):
        submit(world, (seed, number))
        assert world.close_round()


def submit(world: World, seed: tuple[int, int]) -> None:
    noise = np.random.default_rng(seed).standard_normal(NUM_PARAMS, dtype=np.float32)
    world.submit(world.claimed(), value=np.float32(0.1) * noise)


def served(world: World, version: int, held: int | None) -> tuple[str | None, bytes]:
    source = world.do(open_weights(world.fleet, version, held))
    try:
        return source.sha256, whole(source)
    finally:
        source.close()


def whole(source) -> bytes:
    """Read in odd pieces, over the ends of files."""
    content = b""
    while piece := source.read(len(content), 100):
        content += piece
    assert len(content) == source.num_bytes
    return content


def published(world: World, version: int):
    return read_published(world.fleet.blobs, version)


def followed(world: World, version: int, held: int):
    """Return what a worker has that holds a version and adds the links."""
    sha256, links = served(world, version, held)
    assert sha256 is None, "it came whole"
    weights = published(world, held)
    layout = layout_hash(SHAPE)
    add_links(links, weights, layout_hash=layout, held=held, version=version)
    return weights


def comes_whole(world: World, version: int, held: int) -> bool:
    row = world.read(lambda c: versions.find_version(c, version))
    return served(world, version, held)[0] == row.published_sha256


@pytest.mark.parametrize("broadcast", ["ternary", "int8"])
def test_who_adds_the_links_holds_the_published_bytes(world: World, broadcast):
    start(world, broadcast)
    train(world, 3)
    world.closer = RoundCloser(world.fleet)  # a new process remembers nothing
    train(world, 3)

    for held, version in [(1, 2), (4, 5), (3, 6), (5, 7)]:
        due = published(world, version)
        assert followed(world, version, held).tobytes() == due.tobytes()


def test_workers_hold_what_was_sent_and_the_master_goes_its_own_way(chained: World):
    train(chained, 4)

    master = chained.state(5).weights
    difference = np.abs(master - published(chained, 5))

    assert difference.max() > 0
    assert np.linalg.norm(difference) < np.linalg.norm(master - published(chained, 1))


def test_what_links_round_away_is_sent_in_the_end(chained: World):
    train(chained, 1)
    for _ in range(15):  # momentum runs out, and gradients are zeros
        chained.submit(chained.claimed(), value=0.0)
        assert chained.close_round()

    master = chained.state(17).weights
    left = np.linalg.norm(master - published(chained, 17))

    assert left < 0.2 * np.linalg.norm(master - published(chained, 1))


def test_the_root_and_joiners_get_whole_versions(chained: World):
    train(chained, 2)

    assert served(chained, 3, None)[0] is not None
    assert comes_whole(chained, 1, 0)
    assert comes_whole(chained, 3, 0)  # nothing leads to the root


@pytest.mark.parametrize("held", [3, 4, 10**17])
def test_who_holds_as_much_or_more_gets_the_version_whole(chained: World, held):
    train(chained, 2)

    assert comes_whole(chained, 3, held)


def test_a_chain_that_is_longer_than_the_frame_is_not_sent(world: World):
    start(world, "int8")  # a frame is 1904 bytes, a link 556
    train(world, 4)

    assert not comes_whole(world, 5, 2)
    assert comes_whole(world, 5, 1)


def test_a_link_that_is_missing_lets_the_version_come_whole(chained: World):
    train(chained, 3)
    chained.fleet.blobs.remove(BlobKind.LINK, [version_blob(3)])

    assert comes_whole(chained, 4, 1)
    assert not comes_whole(chained, 4, 3)


def test_links_go_with_their_versions_and_those_that_are_left_still_lead_on(
    chained: World,
):
    chained.fleet.keep_versions = 3
    train(chained, 5)

    assert chained.fleet.blobs.names(BlobKind.LINK) == [
        version_blob(number) for number in (4, 5, 6)
    ]
    assert comes_whole(chained, 6, 2)
    # A worker may hold a version that the coordinator does not keep any more.
    assert not comes_whole(chained, 6, 3)


def test_an_exact_plan_publishes_the_master_and_no_links(running: World):
    train(running, 2)

    assert running.fleet.blobs.names(BlobKind.LINK) == []
    assert comes_whole(running, 3, 2)
    assert (published(running, 3) == running.state(3).weights).all()


def test_a_difference_that_no_link_holds_is_published_whole(chained: World, caplog):
    base = chained.state(1).weights
    chained.submit(chained.claimed(), value=1e33)

    assert chained.close_round()

    (line,) = [r for r in caplog.records if r.event == "version.whole"]
    assert "version 2" in line.message
    assert comes_whole(chained, 2, 1)
    assert (published(chained, 2) == chained.state(2).weights).all()
    assert (published(chained, 2) != base).all()


def test_the_same_payloads_give_the_same_bytes_whoever_restarts(tmp_path: Path):
    found = []
    for restarts in (False, True):
        folder = tmp_path / str(restarts)
        folder.mkdir()
        with open_world(folder) as world:
            start(world)
            for seed in range(4):
                train(world, 1, seed)
                if restarts:
                    reconcile(world.fleet)
                    world.closer = RoundCloser(world.fleet)
            rows = world.read(versions.kept_versions)
            found.append([(r.published_sha256, r.state_sha256) for r in rows])

    assert found[0] == found[1]
    assert len(set(found[0])) == 5


@pytest.mark.parametrize("ordinal", range(1, NUM_CALLS + 1))
def test_after_a_crash_the_round_is_closed_again_with_the_same_bytes(
    chained: World, tmp_path: Path, ordinal
):
    train(chained, 1)
    (tmp_path / "twin").mkdir()
    with open_world(tmp_path / "twin") as twin:
        start(twin)
        train(twin, 1)
        train(twin, 1, seed=1)
        due = published(twin, 3)
    submit(chained, (1, 0))
    with chained.fs.crashing(ordinal), pytest.raises(MadeToFailError):
        chained.close_round()

    reconcile(chained.fleet)
    chained.closer = RoundCloser(chained.fleet)
    assert chained.close_round()

    assert published(chained, 3).tobytes() == due.tobytes()
    assert followed(chained, 3, 2).tobytes() == due.tobytes()


def test_a_failing_disk_changes_nothing_of_what_is_published_next(
    chained: World, tmp_path: Path
):
    train(chained, 2)
    (tmp_path / "twin").mkdir()
    with open_world(tmp_path / "twin") as twin:
        start(twin)
        train(twin, 2)
        train(twin, 1, seed=1)
        due = published(twin, 4)
    submit(chained, (1, 0))
    with chained.fs.failing(5), pytest.raises(MadeToFailError):
        chained.close_round()

    assert chained.close_round()  # by the same process, which remembers

    assert published(chained, 4).tobytes() == due.tobytes()


def test_a_published_frame_is_made_anew_from_the_one_before_and_its_link(
    chained: World,
):
    train(chained, 3)
    path = chained.fleet.blobs.path(BlobKind.PUBLISHED, version_blob(4))
    before = path.read_bytes()
    path.write_bytes(before[:-1])

    assert chained.do(look_after(chained.fleet, 4))

    assert path.read_bytes() == before
    assert not chained.fleet.file_faults


def test_a_frame_that_nothing_leads_to_is_not_made_up(chained: World):
    train(chained, 3)
    blobs = chained.fleet.blobs
    for kind, number in [(BlobKind.PUBLISHED, 4), (BlobKind.LINK, 4)]:
        blobs.remove(kind, [version_blob(number)])

    chained.do(look_after(chained.fleet, 4))

    assert (
        "nothing that is kept leads to version 4" in chained.fleet.file_faults[4].reason
    )
    assert version_blob(4) not in blobs.names(BlobKind.PUBLISHED)


def test_a_link_that_no_version_names_is_removed_at_the_start(chained: World):
    train(chained, 1)
    path = chained.fleet.blobs.path(BlobKind.LINK, version_blob(9))
    path.write_bytes(b"left over")

    reconcile(chained.fleet)

    assert chained.fleet.blobs.names(BlobKind.LINK) == [version_blob(2)]
