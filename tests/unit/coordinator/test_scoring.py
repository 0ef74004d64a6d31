"""`bitnet-coordinator eval`: a version or an exported folder, on any text."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from bitnet_ext.infer import Model
from bitnet_ext.layout import preset_shape
from bitnet_ext.scoring import score_text
from coordinator.cli import main
from coordinator.domain.manifest import load_manifest
from coordinator.service.byte_tokenizer import ByteTokenizer
from tests.integration.fleet import make_corpus
from tests.unit.coordinator.test_exporting import published

FIGURES = re.compile(
    r"loss +([0-9.]+) nats a token\n"
    r"perplexity +([0-9.]+)\n"
    r"bits per byte +([0-9.]+)\n"
    r"of +([0-9]+) tokens, ([0-9]+) bytes\n"
)


def scored(capsys, *arguments: str) -> tuple[float, ...]:
    """Score; return loss, perplexity, bits per byte, tokens and bytes."""
    assert main(["eval", *arguments]) == 0
    found = FIGURES.fullmatch(capsys.readouterr().out)
    assert found is not None
    return tuple(float(figure) for figure in found.groups())


def refused(capsys, *arguments: str) -> str:
    """Score in vain; return the line that says why."""
    assert main(["eval", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def exported(fleet, tmp_path, capsys, *form: str) -> str:
    assert main(["export", *fleet, "--out", str(tmp_path / "out"), *form]) == 0
    capsys.readouterr()
    return str(tmp_path / "out")


def test_a_version_is_scored_on_the_held_out_text(fleet, tmp_path, capsys):
    folder = tmp_path / "corpus" / "tokenized"
    manifest = load_manifest(folder / "manifest.json")
    shard = manifest.held_out_shard()
    tokens = np.fromfile(folder / f"{shard.shard_id}.bin", dtype="<i4")
    shape = preset_shape("tiny", vocab_size=manifest.vocab_size)
    due = score_text(
        Model.from_flat(shape, published(tmp_path)),
        tokens,
        eot_id=manifest.eot_id,
        num_bytes=shard.text_bytes,
    )

    loss, perplexity, bits, num_tokens, num_bytes = scored(capsys, *fleet)

    assert (num_tokens, num_bytes) == (due.tokens, shard.text_bytes)
    assert num_tokens == shard.num_tokens - shard.num_documents
    assert loss == pytest.approx(due.loss, abs=1e-4)
    assert perplexity == pytest.approx(math.exp(due.loss), abs=0.01)
    assert bits == pytest.approx(due.bits_per_byte, abs=1e-4)
    # A model that has learned nothing is about as good as a guess.
    assert loss == pytest.approx(math.log(manifest.vocab_size), rel=0.05)


def test_an_exported_folder_has_the_score_of_its_version(fleet, tmp_path, capsys):
    folder = exported(fleet, tmp_path, capsys, "--format", "hf", "--layout", "float")

    assert scored(capsys, *fleet, "--model", folder) == scored(capsys, *fleet)


def test_a_file_is_scored_without_a_fleet(fleet, tmp_path, capsys):
    folder = exported(fleet, tmp_path, capsys, "--format", "gguf")
    prose = tmp_path / "prose.txt"
    prose.write_text("kalo miter <|endoftext|> unves \u00e9.\n" * 30)
    tokenizer = ByteTokenizer.load(tmp_path / "corpus" / "tokenized" / "tokenizer.json")

    by_folder = scored(
        capsys, "--data", "/nowhere", "--model", folder, "--text", str(prose)
    )

    assert by_folder[3:] == (
        len(tokenizer.encode(prose.read_text())),
        len(prose.read_bytes()),
    )
    by_version = scored(capsys, *fleet, "--text", str(prose))
    assert by_folder == pytest.approx(by_version, rel=0.01)


def test_what_cannot_be_scored_is_refused_by_name(fleet, tmp_path, capsys):
    folder = exported(fleet, tmp_path, capsys, "--format", "gguf")
    make_corpus(tmp_path / "other", vocab_size=290)
    other = ["--corpus", str(tmp_path / "other")]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")

    line = refused(capsys, *fleet, *other, "--model", folder)
    assert "must be tokenized as the model was trained" in line
    for name in ("empty.txt", "bytes.txt", "none.txt"):
        path = str(tmp_path / name)
        assert path in refused(capsys, *fleet, "--text", path)
    model = tmp_path / "out" / "model-TQ2_0.gguf"
    model.write_bytes(model.read_bytes()[:-1])
    assert f"{model} must have SHA-256" in refused(capsys, "--model", folder)


def test_a_damaged_held_out_shard_is_refused(fleet, tmp_path, capsys):
    shard = tmp_path / "corpus" / "tokenized" / "heldout-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-4] + bytes(4))

    assert f"{shard} is damaged" in refused(capsys, *fleet)
