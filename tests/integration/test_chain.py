"""A fleet on ternary links: killed or not, one chain, held by whoever adds it up."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bitnet_ext.codecs import Codec
from bitnet_ext.frames import frame_bytes
from bitnet_ext.layout import num_params
from bitnet_ext.wire.messages import Task
from coordinator.control import GoBack, Seed
from coordinator.domain.manifest import Manifest
from tests.integration.fleet import (
    CoordinatorProcess,
    Hand,
    coordinator,
    make_corpus,
    wait_for,
    workers,
)
from worker.client import Download
from worker.shelf import Shelf
from worker.weights import Version, WeightCache

NUM_ROUNDS = 6
KILLED_IN_ROUND = 3
SETTINGS = {
    "EVALUATE_EVERY": 1000,
    "CODEC": "ternary",
    "BROADCAST": "ternary",
    "HEARTBEAT_S": 60,
    "SEED": 7,
}


@dataclass
class Holder:
    """A worker moved by hand that holds weights as a real one does."""

    hand: Hand
    #: Path and length of every download.
    fetched: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = WeightCache(self._fetch, Shelf(None))

    def _fetch(self, download: Download) -> None:
        self.fetched.append((download.path, download.total))
        self.hand.client.continue_download(download)

    def hold(self, task: Task) -> NDArray[np.float32]:
        """Return the weights of a task: what the task says, or this raises."""
        wanted = Version(
            task.run_id,
            task.base_version,
            task.base_sha256,
            self.hand.shape,
            task.broadcast,
        )
        return self.cache.get(wanted, lambda _: None)


@dataclass(frozen=True)
class Story:
    """What came of it."""

    holder: Holder
    #: Version and hashes of all that was published.
    rows: list[tuple[Any, ...]]
    #: The newest version as the holder has it, and as one gets it who has none.
    held: NDArray[np.float32]
    joined: NDArray[np.float32]


def play(process: CoordinatorProcess, manifest: Manifest, *, killed: bool) -> Story:
    """Train some rounds; where `killed`, the coordinator dies while one is closed."""
    process.tell(Seed(tokens=1024))
    holder = Holder(Hand(process.url, manifest))
    hand = holder.hand
    hand.register()
    for number in range(1, NUM_ROUNDS + 1):
        task = hand.claim_training()
        holder.hold(task)
        train(hand, task, number)
        if killed and number == KILLED_IN_ROUND:
            process.kill()
            process.start()
            hand.move_to(process.url)
        process.wait_for_version(number + 1)
    task = hand.claim_training()
    rows = process.rows("SELECT version, published_sha256, state_sha256 FROM versions")
    return Story(holder, sorted(rows), holder.hold(task), Holder(hand).hold(task))


def train(hand: Hand, task: Task, seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal(num_params(hand.shape))
    hand.client.submit(hand.body(task, (0.01 * noise).astype(np.float32)))


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> list[Story]:
    """The same payloads twice: with a coordinator that lives, and with one killed."""
    found = []
    for killed in (False, True):
        folder = tmp_path_factory.mktemp("chain")
        manifest = make_corpus(folder / "corpus", num_files=12, words=300)
        with coordinator(folder, **SETTINGS) as process:
            found.append(play(process, manifest, killed=killed))
    return found


def test_the_same_payloads_give_the_same_versions_killed_or_not(
    stories: list[Story],
) -> None:
    alive, killed = stories

    assert len(alive.rows) == NUM_ROUNDS + 1
    assert alive.rows == killed.rows


def test_all_but_the_first_version_come_by_links(stories: list[Story]) -> None:
    for story in stories:
        size = num_params(story.holder.hand.shape)
        link = frame_bytes(Codec.TERNARY, size)
        due = [("/weights/1", frame_bytes(Codec.FP32, size))]
        due += [(f"/weights/{n + 1}?from={n}", link) for n in range(1, NUM_ROUNDS + 1)]

        assert story.holder.fetched == due


def test_who_joins_late_holds_the_same_bytes(stories: list[Story]) -> None:
    for story in stories:
        assert story.joined.tobytes() == story.held.tobytes()


def test_a_run_goes_back_over_a_kill_and_the_chain_goes_on(tmp_path: Path) -> None:
    """Version 4 is the root again: it comes whole, and the next one by a link."""
    manifest = make_corpus(tmp_path / "corpus", num_files=12, words=300)
    with coordinator(tmp_path, **SETTINGS) as process:
        process.tell(Seed(tokens=1024))
        holder = Holder(Hand(process.url, manifest))
        hand = holder.hand
        hand.register()
        root = holder.hold(task := hand.claim_training()).copy()
        train(hand, task, 1)
        holder.hold(task := hand.claim_training())
        process.tell(GoBack(version="1"))
        process.kill()
        process.start()
        hand.move_to(process.url)
        # Its round becomes a version as ever, and then comes one more.
        train(hand, task, 2)
        again = holder.hold(task := hand.claim_training()).copy()
        train(hand, task, 3)
        holder.hold(hand.claim_training())
        rows = process.rows("SELECT version, rolled_back_to FROM versions")

    assert dict(rows) == {1: None, 2: None, 3: None, 4: 1, 5: None}
    assert again.tobytes() == root.tobytes()
    paths = [path for path, _ in holder.fetched]
    assert paths[-3:] == ["/weights/4?from=2", "/weights/4", "/weights/5?from=4"]


def test_a_worker_killed_in_mid_task_goes_on_from_its_disk(tmp_path: Path) -> None:
    """It has moments, residual and weights: only the first version came whole."""
    make_corpus(tmp_path / "corpus", num_files=12, words=300)
    with coordinator(tmp_path, **SETTINGS | {"ROUND_S": 1}) as process:
        process.tell(Seed())
        with workers(tmp_path, process.url, "one") as (running,):
            process.wait_for_version(4)
            running.kill()
            running.wait(60.0)
        told = (tmp_path / "one.log").read_text()
        version = process.status()["run"]["newest_version"]
        with workers(tmp_path, process.url, "one"):
            wait_for(
                "two more versions",
                lambda: process.status()["run"]["newest_version"] >= version + 2,
                timeout_s=120.0,
            )
        ((frame,),) = process.rows("SELECT MAX(published_bytes) FROM versions")
        downloads = process.rows("SELECT download_bytes FROM submissions")

    assert "goes on in run" not in told
    again = (tmp_path / "one.log").read_text()[len(told) :]
    assert "the last residual, the last moments" in again
    assert "is of no use" not in again
    # The root was fetched before, to be scored.
    assert len(downloads) >= 5
    assert max(size for (size,) in downloads) < frame / 10
