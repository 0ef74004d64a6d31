"""A folder of text becomes shards: exact, each text once, nothing leaks."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from coordinator.domain.manifest import ManifestError, load_manifest
from coordinator.service.byte_tokenizer import END_OF_TEXT, ByteTokenizer
from coordinator.service.corpus import (
    Recipe,
    Stage,
    prepare_corpus,
)
from coordinator.service.corpus_lock import CorpusInUseError
from coordinator.service.documents import CorpusError

WORDS = ["ternary", "weight", "worker", "round", "lease", "épée", "火", "train", "text"]
SMALL = Recipe(vocab_size=300, held_out_bytes=2000, shard_tokens=4096)


def prose(seed, num_words=120):
    words = random.Random(seed).choices(WORDS, k=num_words)
    lines = [" ".join(words[i : i + 8]) for i in range(0, num_words, 8)]
    return f"document {seed}\n" + "\n".join(lines)


def fill(folder, num_documents=60):
    """Write documents into nested folders; return their texts."""
    texts = [prose(seed) for seed in range(num_documents)]
    for number, text in enumerate(texts):
        path = (
            folder
            / f"part{number % 3}"
            / f"{number:03d}.{'md' if number % 2 else 'txt'}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return texts


def prepare(folder, recipe=SMALL, **options):
    return prepare_corpus(folder, recipe, now=1.0, **options)


def documents(folder, manifest, shard):
    """Return the texts of a shard, cut at the end-of-text tokens."""
    tokenizer = ByteTokenizer.load(folder / "tokenized/tokenizer.json")
    ids = tokens(folder, shard).tolist()
    assert ids[0] == manifest.eot_id
    found = [[]]
    for token in ids[1:]:
        if token == manifest.eot_id:
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.decode(part) for part in found]


def tokens(folder, shard):
    return np.fromfile(folder / f"tokenized/{shard.shard_id}.bin", dtype="<i4")


def everything(folder):
    root = folder / "tokenized"
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def test_every_document_is_in_one_shard_with_its_exact_bytes(tmp_path):
    texts = fill(tmp_path)

    manifest = prepare(tmp_path)

    found = []
    for shard in manifest.shards:
        in_shard = documents(tmp_path, manifest, shard)
        assert len(in_shard) == shard.num_documents
        assert sum(len(text.encode()) for text in in_shard) == shard.text_bytes
        found += in_shard
    assert sorted(found) == sorted(texts)


def test_the_manifest_tells_the_truth_about_the_files(tmp_path):
    fill(tmp_path)

    manifest = prepare(tmp_path)

    folder = tmp_path / "tokenized"
    assert load_manifest(folder / "manifest.json") == manifest
    names = {f"{shard.shard_id}.bin" for shard in manifest.shards}
    assert set(os.listdir(folder)) == names | {"manifest.json", "tokenizer.json"}
    tokenizer = (folder / "tokenizer.json").read_bytes()
    assert hashlib.sha256(tokenizer).hexdigest() == manifest.tokenizer_sha256
    for shard in manifest.shards:
        data = (folder / f"{shard.shard_id}.bin").read_bytes()
        assert (len(data), len(data) // 4) == (shard.num_bytes, shard.num_tokens)
        assert hashlib.sha256(data).hexdigest() == shard.sha256
        ids = tokens(tmp_path, shard)
        assert ids.min() >= 0
        assert ids.max() < manifest.vocab_size == 300


def test_shards_are_numbered_and_hold_at_most_the_tokens_asked_for(tmp_path):
    fill(tmp_path)

    shards = prepare(tmp_path).train_shards()

    assert len(shards) >= 2
    assert [s.shard_id for s in shards] == [
        f"train-{number:05d}" for number in range(len(shards))
    ]
    assert all(shard.num_tokens <= SMALL.shard_tokens for shard in shards)


def test_held_out_text_is_whole_documents_in_one_shard_of_the_size_asked_for(tmp_path):
    texts = fill(tmp_path)

    manifest = prepare(tmp_path)

    held_out = documents(tmp_path, manifest, manifest.held_out_shard())
    assert manifest.held_out_shard().shard_id == "heldout-00000"
    assert set(held_out) < set(texts)
    sizes = [len(text.encode()) for text in held_out]
    assert sum(sizes) >= SMALL.held_out_bytes > sum(sizes[:-1])


def test_held_out_text_never_passes_a_third_of_the_corpus(tmp_path):
    texts = fill(tmp_path)
    total = sum(len(text.encode()) for text in texts)

    manifest = prepare(tmp_path, Recipe(vocab_size=300))

    share = manifest.held_out_shard().text_bytes / total
    assert 0.25 < share <= 1 / 3


def test_a_share_of_a_large_corpus_is_held_out(tmp_path):
    texts = fill(tmp_path)
    total = sum(len(text.encode()) for text in texts)

    recipe = Recipe(vocab_size=300, held_out_bytes=1, held_out_share=0.2)

    assert prepare(tmp_path, recipe).held_out_shard().text_bytes >= 0.2 * total


def test_the_tokenizer_never_sees_held_out_text(tmp_path):
    fill(tmp_path / "one")
    manifest = prepare(tmp_path / "one")
    before = everything(tmp_path / "one")["tokenizer.json"]
    held_out = documents(tmp_path / "one", manifest, manifest.held_out_shard())

    texts = [text for text in fill(tmp_path / "two") if text not in held_out]
    learnt = ByteTokenizer.learn(sorted(texts), SMALL.vocab_size)

    assert learnt.to_json() == before


def test_exact_duplicates_are_removed_wherever_they_lie(tmp_path):
    texts = fill(tmp_path)
    for number, text in enumerate(texts):
        (tmp_path / f"copy{number}.txt").write_bytes(text.encode())

    manifest = prepare(tmp_path)

    found = [text for s in manifest.shards for text in documents(tmp_path, manifest, s)]
    assert sorted(found) == sorted(texts)


def test_training_documents_are_shuffled_by_the_seed(tmp_path):
    texts = fill(tmp_path)
    orders = []
    for seed in (1, 2):
        recipe = Recipe(vocab_size=300, held_out_bytes=2000, seed=seed)
        manifest = prepare(tmp_path, recipe)
        (shard,) = manifest.train_shards()
        orders.append(documents(tmp_path, manifest, shard))

    assert orders[0] != sorted(orders[0], key=texts.index)
    assert orders[0] != orders[1]


def test_the_same_text_gives_the_same_bytes_under_other_names_and_processes(tmp_path):
    for folder in ("one", "two"):
        fill(tmp_path / folder)
    (tmp_path / "two/part0/000.txt").rename(tmp_path / "two/zebra.txt")
    code = (
        "import sys; from pathlib import Path\n"
        "from coordinator.service.corpus import Recipe, prepare_corpus\n"
        "recipe = Recipe(vocab_size=300, held_out_bytes=2000, shard_tokens=4096)\n"
        "prepare_corpus(Path(sys.argv[1]), recipe, now=1.0)\n"
    )

    for folder, seed in (("one", "1"), ("two", "2")):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / folder)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()},
        )

    assert everything(tmp_path / "one") == everything(tmp_path / "two")


def test_gzip_is_measured_on_one_stream_of_the_held_out_text(tmp_path):
    fill(tmp_path)

    manifest = prepare(tmp_path)

    text = "".join(documents(tmp_path, manifest, manifest.held_out_shard()))
    assert manifest.held_out_gzip_bytes == len(gzip.compress(text.encode(), 9))


def test_odd_text_survives_exactly(tmp_path):
    odd = "\ufeffbom\r\n\ttab \x00 nul \u0301 e\u0301 é  two   spaces \U0001f9ee\n\n\n "
    fill(tmp_path)
    for number in range(20):
        (tmp_path / f"odd{number}.txt").write_bytes(f"{odd}{number}".encode())

    manifest = prepare(tmp_path)

    found = [text for s in manifest.shards for text in documents(tmp_path, manifest, s)]
    assert {text for text in found if text.startswith("\ufeff")} == {
        f"{odd}{number}" for number in range(20)
    }


def test_text_that_spells_the_end_of_text_is_not_one(tmp_path):
    texts = fill(tmp_path)
    spelt = f"before {END_OF_TEXT} after"
    (tmp_path / "spelt.txt").write_text(spelt)

    manifest = prepare(tmp_path)

    found = [text for s in manifest.shards for text in documents(tmp_path, manifest, s)]
    assert sorted(found) == sorted([*texts, spelt])


def test_a_document_longer_than_a_shard_is_cut_and_loses_nothing(tmp_path):
    fill(tmp_path)
    long = "\n".join(prose(seed) for seed in range(100, 130)) + "x" * 3000
    (tmp_path / "long.txt").write_text(long, encoding="utf-8")

    manifest = prepare(tmp_path)

    tokenizer = ByteTokenizer.load(tmp_path / "tokenized/tokenizer.json")
    shards = manifest.train_shards()
    assert all(shard.num_tokens <= SMALL.shard_tokens for shard in shards)
    ids = np.concatenate([tokens(tmp_path, shard) for shard in shards]).tolist()
    assert long in tokenizer.decode(ids).split(END_OF_TEXT)
    assert sum(shard.num_documents for shard in shards) == ids.count(manifest.eot_id)


def test_text_of_many_bytes_a_character_still_fits_into_shards(tmp_path):
    fill(tmp_path)
    wide = "".join(chr(0x20000 + number) for number in range(6000))
    (tmp_path / "wide.txt").write_text(wide, encoding="utf-8")

    manifest = prepare(tmp_path, Recipe(vocab_size=257, shard_tokens=1024))

    assert all(shard.num_tokens <= 1024 for shard in manifest.train_shards())
    assert sum(shard.text_bytes for shard in manifest.train_shards()) > 24000


def test_synthetic_text_is_marked_on_every_shard(tmp_path):
    fill(tmp_path)

    manifest = prepare(tmp_path, Recipe(vocab_size=300, synthetic=True))

    assert all(shard.synthetic for shard in manifest.shards)


def test_a_short_text_fills_a_smaller_vocabulary(tmp_path):
    fill(tmp_path)

    manifest = prepare(tmp_path, Recipe(vocab_size=5000))

    assert 257 < manifest.vocab_size < 5000


def test_hidden_files_other_suffixes_and_the_prepared_corpus_are_no_documents(tmp_path):
    texts = fill(tmp_path)
    for name in (
        ".hidden.txt",
        ".git/x.txt",
        "code.py",
        "tokenized/old.txt",
        "a.txt/x",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(prose(name))
    (tmp_path / "empty.txt").write_text("")

    manifest = prepare(tmp_path)

    assert sum(shard.num_documents for shard in manifest.shards) == len(texts)


def test_progress_is_told_from_the_first_byte_to_the_last(tmp_path):
    fill(tmp_path)
    told = []

    prepare(tmp_path, progress=lambda *step: told.append(step))

    assert list(dict.fromkeys(stage for stage, _, _ in told)) == list(Stage)
    for stage in Stage:
        steps = [(done, total) for of, done, total in told if of is stage]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 256),
        ("held_out_bytes", 0),
        ("held_out_share", 0.5),
        ("held_out_share", -0.1),
        ("held_out_share", float("nan")),
        ("shard_tokens", 1023),
    ],
)
def test_a_recipe_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .* got {value}"):
        Recipe(**{field: value})


def test_the_smallest_vocabulary_is_the_bytes(tmp_path):
    fill(tmp_path)

    manifest = prepare(tmp_path, Recipe(vocab_size=257))

    assert manifest.vocab_size == 257
    held_out = manifest.held_out_shard()
    assert held_out.num_tokens == held_out.text_bytes + held_out.num_documents


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(CorpusError, match="nowhere cannot be opened: No such file"):
        prepare(tmp_path / "nowhere")


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "code.py").write_text("pass")

    with pytest.raises(CorpusError, match=r"no text in .*: put \.txt or \.md files"):
        prepare(tmp_path)


def test_text_that_is_not_utf8_is_refused_with_file_and_byte(tmp_path):
    fill(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")

    with pytest.raises(
        CorpusError, match=r"latin\.txt is not UTF-8: byte 0xe9 at .* 3"
    ):
        prepare(tmp_path)


def test_too_little_text_is_refused_with_its_size(tmp_path):
    (tmp_path / "short.txt").write_text("short")

    with pytest.raises(CorpusError, match="too little text: 5 bytes"):
        prepare(tmp_path)


def test_one_large_document_cannot_be_held_out(tmp_path):
    (tmp_path / "one.txt").write_text(prose(1, num_words=5000), encoding="utf-8")
    (tmp_path / "empty.txt").write_text("")

    with pytest.raises(CorpusError, match="split the text into more files"):
        prepare(tmp_path)


def test_the_corpus_of_a_running_run_is_never_replaced(tmp_path):
    fill(tmp_path)
    running = prepare(tmp_path)
    before = everything(tmp_path)
    (tmp_path / "more.txt").write_text(prose(77), encoding="utf-8")

    with pytest.raises(CorpusInUseError, match=r"finish the run first .*train-for 1"):
        prepare(tmp_path, protected_hash=running.corpus_sha256)

    assert everything(tmp_path) == before


def test_a_corpus_that_no_run_needs_is_replaced_whole(tmp_path):
    fill(tmp_path)
    first = prepare(tmp_path)
    (tmp_path / "tokenized/leftover.bin").write_bytes(b"old")
    (tmp_path / "more.txt").write_text(prose(77), encoding="utf-8")

    second = prepare(tmp_path, protected_hash="0" * 64)

    assert second.corpus_sha256 != first.corpus_sha256
    assert "leftover.bin" not in everything(tmp_path)
    assert not list(tmp_path.glob(".tokenized*"))


def test_a_manifest_that_cannot_be_read_protects_its_corpus(tmp_path):
    fill(tmp_path)
    prepare(tmp_path)
    (tmp_path / "tokenized/manifest.json").write_text("{")

    with pytest.raises(ManifestError, match=r"manifest\.json"):
        prepare(tmp_path, protected_hash="0" * 64)


def test_a_failure_halfway_leaves_the_old_corpus_and_no_rubbish(tmp_path):
    fill(tmp_path)
    prepare(tmp_path)
    before = everything(tmp_path)
    changing = tmp_path / "part0/000.txt"

    def change(stage, done, total):
        if stage is Stage.ENCODING:
            changing.write_text("another text")

    with pytest.raises(CorpusError, match=r"000\.txt changed while"):
        prepare(tmp_path, Recipe(vocab_size=300), progress=change)

    assert everything(tmp_path) == before
    assert not list(tmp_path.glob(".tokenized*"))


def test_a_swap_cut_short_is_undone_by_the_next_preparation(tmp_path):
    fill(tmp_path)
    running = prepare(tmp_path)
    before = everything(tmp_path)
    (tmp_path / "tokenized").rename(tmp_path / ".tokenized-old")
    (tmp_path / ".tokenized-new").mkdir()

    with pytest.raises(CorpusInUseError):
        prepare(tmp_path, protected_hash=running.corpus_sha256)

    assert everything(tmp_path) == before


def test_two_preparations_of_one_folder_exclude_each_other(tmp_path):
    fill(tmp_path)
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)

        with pytest.raises(CorpusError, match="being prepared by another process"):
            prepare(tmp_path)
    finally:
        os.close(other)

    assert prepare(tmp_path).shards
