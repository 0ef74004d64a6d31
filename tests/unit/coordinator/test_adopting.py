"""A corpus is taken whole: its shards are what the manifest says, and its run is there.

What was hashed once is served under its hash for as long as the file stays the same.
"""

from __future__ import annotations

import hashlib
import logging
import os

import numpy as np
import pytest

from bitnet_ext.layout import num_params
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError, StartError
from coordinator.service.adopting import adopt_corpus
from coordinator.service.serving import open_shard
from coordinator.service.starting import RunSettings, load_corpus
from coordinator.service.sweeping import sweep
from coordinator.store import runs
from tests.unit.coordinator.fleets import PLAN, World

SETTINGS = RunSettings(preset="tiny", seed=3, plan=PLAN)
SHARD = "train-00001"


def quickly(shape, seed):
    """First weights that take no time: all the same number."""
    return np.full(num_params(shape), 0.25, dtype=np.float32)


def adopt(world):
    return adopt_corpus(world.fleet, SETTINGS, quickly)


@pytest.fixture
def bare(world: World) -> World:
    """A fleet that has not looked into its corpus folder yet."""
    world.fleet.manifest = None
    return world


@pytest.fixture
def adopted(bare: World) -> World:
    """A fleet that has taken its corpus."""
    adopt(bare)
    return bare


def shard_path(world):
    return world.fleet.corpus / f"tokenized/{SHARD}.bin"


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def refusal(world):
    """Adopt, and be refused; return why. Nothing may have been made."""
    with pytest.raises(StartError) as caught:
        adopt(world)
    assert caught.value.exit_code == 2
    assert world.fleet.manifest is None
    assert world.read(runs.newest_run) is None
    assert world.blobs() == {}
    return str(caught.value)


def test_a_whole_corpus_gets_its_run(bare: World, caplog):
    caplog.set_level(logging.INFO)

    assert adopt(bare)

    assert bare.run_row().corpus_hash == bare.fleet.the_manifest().corpus_sha256
    checked = [r for r in caplog.records if getattr(r, "event", "") == "corpus.checked"]
    assert [(r.num_bytes, r.seconds >= 0.0) for r in checked] == [(4 * 1604, True)]


def test_without_a_corpus_there_is_none_to_take(bare: World, tmp_path):
    bare.fleet.corpus = tmp_path / "nowhere"

    assert not adopt(bare)

    assert bare.fleet.manifest is None


def test_a_shard_whose_bytes_changed_is_named_with_both_hashes(bare: World):
    path = shard_path(bare)
    due = hashlib.sha256(path.read_bytes()).hexdigest()
    flip(path)

    why = refusal(bare)

    got = hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(part in why for part in (str(path), due, got))


def test_a_shard_of_another_size_is_named_with_both_sizes(bare: World):
    cut(shard_path(bare))

    assert "its bytes must be 2016, got 2012" in refusal(bare)


@pytest.mark.parametrize("lose", [os.unlink, link])
def test_a_shard_that_is_gone_or_a_link_is_named(bare: World, lose):
    lose(shard_path(bare))

    assert f"{SHARD}.bin" in refusal(bare)


def test_a_tokenizer_that_is_gone_is_named(bare: World):
    path = bare.fleet.corpus / "tokenized/tokenizer.json"
    path.unlink()

    assert f"cannot read {path}: No such file" in refusal(bare)


def test_a_tokenizer_whose_bytes_changed_is_named_with_both_hashes(bare: World):
    path = bare.fleet.corpus / "tokenized/tokenizer.json"
    path.write_bytes(b"another")

    why = refusal(bare)

    got = hashlib.sha256(b"another").hexdigest()
    due = load_corpus(bare.fleet.corpus).tokenizer_sha256
    assert all(part in why for part in (str(path), due, got))


def test_a_damaged_shard_stops_the_start_of_a_run_that_is_there(adopted: World):
    flip(shard_path(adopted))
    before = adopted.everything()

    with pytest.raises(StartError, match="is damaged"):
        adopt(adopted)

    assert adopted.everything() == before


# -- while the coordinator runs ------------------------------------------------


def no_run(world):
    """Ask as workers do; each of them must hear that there is no run."""
    for ask in (world.register, world.claim):
        with pytest.raises(RefusedError) as caught:
            ask()
        assert caught.value.code is ErrorCode.NO_RUN


def test_until_the_run_is_there_workers_are_told_that_there_is_none(bare: World):
    def look(shape, seed):
        no_run(bare)
        return quickly(shape, seed)

    adopt_corpus(bare.fleet, SETTINGS, look)

    assert bare.register().run_id == bare.run_row().run_id


def test_a_run_that_could_not_be_made_is_made_at_the_next_sweep(bare: World, caplog):
    with bare.fs.failing(2):
        bare.do(sweep(bare.fleet, SETTINGS))

    assert "made to fail" in caplog.text
    assert "made to fail" in bare.fleet.corpus_fault
    assert bare.read(runs.newest_run) is None
    no_run(bare)

    bare.do(sweep(bare.fleet, SETTINGS))

    assert bare.register().run_id == bare.run_row().run_id
    assert bare.fleet.corpus_fault is None


def test_a_damaged_corpus_that_appears_is_looked_at_again(bare: World, caplog):
    path = shard_path(bare)
    whole = path.read_bytes()
    flip(path)
    for _ in range(2):
        bare.do(sweep(bare.fleet, SETTINGS))
    no_run(bare)
    assert caplog.text.count(f"{path} is damaged") == 2

    path.write_bytes(whole)
    bare.do(sweep(bare.fleet, SETTINGS))

    assert bare.register().run_id == bare.run_row().run_id


# -- serving -------------------------------------------------------------------


def opened(world, shard_id=SHARD):
    source = world.do(open_shard(world.fleet, shard_id))
    try:
        content = source.read(0, source.num_bytes)
    finally:
        source.close()
    return source.sha256, source.num_bytes, content


def test_a_shard_is_served_under_its_hash(adopted: World):
    content = shard_path(adopted).read_bytes()

    assert opened(adopted) == (hashlib.sha256(content).hexdigest(), 2016, content)


@pytest.mark.parametrize("change", [flip, cut])
def test_a_shard_that_changed_since_is_not_served(adopted: World, change):
    path = shard_path(adopted)
    before = path.stat()
    change(path)
    # A coarse clock could give the new content the old time.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    with pytest.raises(RefusedError) as caught:
        opened(adopted)

    assert caught.value.code is ErrorCode.UNKNOWN_SHARD
    assert SHARD in caught.value.message
    assert f"{path} is damaged" in adopted.fleet.file_faults[SHARD].reason


def test_another_file_of_the_corpus_has_no_known_hash(adopted: World):
    (adopted.fleet.corpus / "book.txt").write_text("words")

    assert opened(adopted, "book") == (None, 5, b"words")
