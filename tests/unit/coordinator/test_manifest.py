"""A manifest is taken whole or refused with the file and the field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from coordinator.domain.manifest import (
    Manifest,
    ManifestError,
    Shard,
    corpus_hash,
    encode_manifest,
    load_manifest,
)

if TYPE_CHECKING:
    from pathlib import Path


def shard(
    shard_id: str,
    *,
    held_out: bool = False,
    sha256: str = "a" * 64,
    text_bytes: int = 100,
) -> Shard:
    return Shard(
        shard_id=shard_id,
        num_tokens=10,
        num_bytes=40,
        sha256=sha256,
        text_bytes=text_bytes,
        num_documents=1,
        held_out=held_out,
        synthetic=False,
    )


def hashed(
    shards: list[Shard],
    *,
    vocab_size: int = 300,
    eot_id: int = 0,
    tokenizer_sha256: str = "b" * 64,
) -> str:
    return corpus_hash(
        shards, vocab_size=vocab_size, eot_id=eot_id, tokenizer_sha256=tokenizer_sha256
    )


def manifest(shards: list[Shard] | None = None) -> Manifest:
    shards = shards or [shard("heldout-00000", held_out=True), shard("train-00000")]
    return Manifest(
        vocab_size=300,
        eot_id=0,
        tokenizer_sha256="b" * 64,
        corpus_sha256=hashed(shards),
        shards=shards,
        held_out_gzip_bytes=30,
        created_at=1.5,
    )


def changed(path: Path, change: dict[str, Any]) -> Path:
    """Write a manifest in which some fields are others."""
    body = msgspec.json.decode(encode_manifest(manifest()))
    body.update(change)
    path.write_bytes(msgspec.json.encode(body))
    return path


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(encode_manifest(manifest()))

    assert load_manifest(path) == manifest()


def test_shards_are_found_by_what_they_are_for():
    found = manifest()

    assert [s.shard_id for s in found.train_shards()] == ["train-00000"]
    assert found.held_out_shard().shard_id == "heldout-00000"
    assert found.shard("train-00000") == found.shards[1]
    assert found.shard("train-00001") is None


def test_gzip_is_given_in_bits_a_byte_of_the_held_out_text():
    assert manifest().gzip_bits_per_byte() == pytest.approx(8 * 30 / 100)


def test_the_hash_of_a_corpus_goes_by_content_and_not_by_order():
    one, two = shard("train-00000"), shard("train-00001")

    assert hashed([one, two]) == hashed([two, one])
    others = {
        hashed([one, two]),
        hashed([shard("train-00000", sha256="c" * 64)]),
        hashed([shard("train-00000", held_out=True)]),
        hashed([shard("train-00000", text_bytes=101)]),
        hashed([one], vocab_size=301),
        hashed([one], eot_id=1),
        hashed([one], tokenizer_sha256="d" * 64),
    }
    assert len(others | {hashed([one])}) == 8


@pytest.mark.parametrize(
    "change", [{"vocab_size": 301}, {"eot_id": 1}, {"tokenizer_sha256": "d" * 64}]
)
def test_a_manifest_that_was_edited_is_refused(tmp_path, change):
    path = changed(tmp_path / "manifest.json", change)

    with pytest.raises(ManifestError, match=r"corpus_sha256.*tokenize-corpus"):
        load_manifest(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 2}, "version"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"eot_id": 300}, "eot_id"),
        ({"tokenizer_sha256": "short"}, "tokenizer_sha256"),
        ({"corpus_sha256": "0" * 64}, "corpus_sha256"),
        ({"shards": []}, "shards"),
        ({"created_at": -1}, "created_at"),
        ({"held_out_gzip_bytes": None}, "held_out_gzip_bytes"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_field_is_refused_by_name(tmp_path, change, named):
    path = changed(tmp_path / "manifest.json", change)

    with pytest.raises(ManifestError, match=named) as caught:
        load_manifest(path)

    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "shards",
    [
        [shard("train-00000"), shard("train-00001")],
        [shard("heldout-00000", held_out=True)],
        [shard("a", held_out=True), shard("b", held_out=True)],
        [shard("a", held_out=True), shard("b"), shard("b")],
    ],
    ids=["none held out", "nothing to train on", "two held out", "same id twice"],
)
def test_shards_that_do_not_fit_together_are_refused(shards):
    with pytest.raises(ValueError, match="shards"):
        manifest(shards)


def test_a_shard_has_four_bytes_a_token(tmp_path):
    body = msgspec.json.decode(encode_manifest(manifest()))
    body["shards"][1]["num_bytes"] = 41
    path = changed(tmp_path / "manifest.json", {"shards": body["shards"]})

    with pytest.raises(ManifestError, match="num_bytes of train-00000"):
        load_manifest(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_file_that_is_no_manifest_is_refused_by_name(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)

    with pytest.raises(ManifestError, match=r"manifest\.json"):
        load_manifest(path)


def test_a_missing_manifest_is_refused_by_name(tmp_path):
    with pytest.raises(ManifestError, match=r"manifest\.json: No such file"):
        load_manifest(tmp_path / "manifest.json")
