"""The command line: results on standard output, mistakes in one line."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitnet_ext.decode import Decoder
from bitnet_ext.exports.folder import open_export
from bitnet_ext.exports.provenance import Format, Variant
from bitnet_ext.infer import Model
from bitnet_ext.layout import PRESETS
from bitnet_ext.ternary import supported_isas
from bitnet_ext.wire.verdicts import ErrorCode, Optimiser
from tests import exported
from tests.fakes import unread_pipe
from tests.unit.worker.fleet import ENV, published
from tests.unit.worker.shapes import (
    EOT,
    SMALL,
    random_tokens,
    seeded_weights,
    silent_hooks,
)
from tests.unit.worker.stand_in import Reply, refuses
from worker import cli, settings
from worker.cli import main
from worker.evaluate import evaluate
from worker.generate import Sampling, generate
from worker.model.transformer import BitNetModel
from worker.text import Tokenizer
from worker.trainer import TorchTrainer


@pytest.fixture(autouse=True)
def small_preset(monkeypatch) -> None:
    """Let `tiny` be as small as the tests; its vocabulary is 64 all the same."""
    monkeypatch.setitem(PRESETS, "tiny", replace(SMALL, vocab_size=5174))


@pytest.fixture(autouse=True)
def process_as_it_was(handlers) -> Iterator[None]:
    """Undo what a command does to its logging."""
    root = logging.getLogger()
    found, level = root.handlers[:], root.level
    yield
    root.handlers[:] = found
    root.setLevel(level)


@pytest.mark.parametrize(
    ("program", "begin"),
    [("worker", "bitnet-worker: error"), ("coordinator", "bitnet-coordinator")],
)
def test_an_unknown_kernel_variant_is_one_line_and_status_2(
    program: str, begin: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", program, "run"],
        env={**os.environ, "BITNET_EXT_ISA": "foo"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 2
    assert re.fullmatch(
        f"{begin}: BITNET_EXT_ISA must be one of portable.* on this "
        "machine, got 'foo'\n",
        done.stderr,
    )


@pytest.fixture
def frame(tmp_path):
    path = tmp_path / "v1.frame"
    path.write_bytes(published())
    return path


@pytest.fixture
def corpus(tmp_path):
    """Return a folder with a held-out shard and a manifest, as prepared."""
    tokens = random_tokens(200, seed=4)
    tokens[::40] = EOT
    folder = tmp_path / "corpus" / "tokenized"
    folder.mkdir(parents=True)
    content = tokens.astype("<i4").tobytes()
    (folder / "heldout-00000.bin").write_bytes(content)
    write_manifest(folder, content)
    return tmp_path / "corpus"


def write_manifest(folder, content: bytes, **changes: object) -> None:
    held_out = {
        "shard_id": "heldout-00000",
        "num_tokens": len(content) // 4,
        "sha256": hashlib.sha256(content).hexdigest(),
        "text_bytes": 600,
        "held_out": True,
        "synthetic": True,
    }
    other = held_out | {"shard_id": "train-00000", "held_out": False}
    manifest = {"version": 1, "vocab_size": 64, "eot_id": EOT, "created_at": 1.0}
    manifest["shards"] = [other, held_out]
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def fails(capsys, *argv: object) -> str:
    """Run a command that must fail with status 2; return its one line."""
    try:
        status = main([str(part) for part in argv])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    (line,) = err.splitlines()
    return line


def prints(capsys, *argv: object) -> list[str]:
    """Run a command that must succeed; return what it prints."""
    assert main([str(part) for part in argv]) == 0
    return capsys.readouterr().out.splitlines()


def test_eval_prints_the_score_and_ends_with_json(capsys, frame, corpus) -> None:
    tokens = np.fromfile(corpus / "tokenized" / "heldout-00000.bin", "<i4")
    expected = evaluate(
        BitNetModel(SMALL), seeded_weights(SMALL), tokens, EOT, 8, silent_hooks()
    )

    lines = prints(
        capsys, "eval", "--weights", frame, "--corpus", corpus, "--preset", "tiny"
    )

    last = json.loads(lines[-1])
    assert last["nats"] == pytest.approx(expected.nats)
    assert last["tokens"] == expected.tokens == 195
    bits = expected.nats / math.log(2) / 600
    assert last["bits_per_byte"] == pytest.approx(bits)
    assert f"bits per byte  {bits:.4f}" in lines
    assert "shard          heldout-00000" in lines


def test_a_score_that_nobody_reads_ends_it_without_a_word(
    capsys, frame, corpus, monkeypatch
) -> None:
    given = ["--weights", str(frame), "--corpus", str(corpus), "--preset", "tiny"]

    with unread_pipe() as output:  # closed as at the end of a process
        monkeypatch.setattr("sys.stdout", output)
        status = main(["eval", *given])

    assert (status, capsys.readouterr().err) == (141, "")


def test_eval_takes_the_tokenized_folder_too(capsys, frame, corpus) -> None:
    given = ("--weights", frame, "--preset", "tiny")

    outer = prints(capsys, "eval", *given, "--corpus", corpus)
    inner = prints(capsys, "eval", *given, "--corpus", corpus / "tokenized")

    assert json.loads(outer[-1])["nats"] == json.loads(inner[-1])["nats"]


def test_eval_refuses_what_does_not_belong_together(capsys, frame, corpus) -> None:
    folder = corpus / "tokenized"
    given = ("eval", "--weights", frame, "--corpus", corpus, "--preset", "tiny")
    content = (folder / "heldout-00000.bin").read_bytes()

    assert "has no shard nope" in fails(capsys, *given, "--shard", "nope")
    write_manifest(folder, content, vocab_size=65)
    assert "a vocabulary of 64, the corpus one of 65" in fails(capsys, *given)
    write_manifest(folder, content, eot_id=63)
    assert "tokens must start with EOT (63)" in fails(capsys, *given)
    write_manifest(folder, content[:-4])
    assert "must have SHA-256" in fails(capsys, *given)
    (folder / "manifest.json").write_text("{}")
    assert "manifest.json: " in fails(capsys, *given)
    (folder / "manifest.json").unlink()
    assert "manifest.json: No such file" in fails(capsys, *given)


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_a_file_that_is_no_frame_of_the_preset_is_named(
    capsys, frame, corpus, verb
) -> None:
    more = ("--corpus", corpus) if verb == "eval" else ()
    given = (verb, "--weights", frame, *more, "--preset")

    assert "are of preset tiny, not of small" in fails(capsys, *given, "small")
    frame.write_bytes(published(replace(SMALL, num_layers=7)))
    assert "of another model than preset tiny" in fails(capsys, *given, "tiny")
    frame.write_bytes(published()[:-1])
    assert f"{frame}: frame must have" in fails(capsys, *given, "tiny")
    frame.write_bytes(b"")
    assert f"{frame}: frame must have" in fails(capsys, *given, "tiny")
    frame.unlink()
    assert f"{frame}: No such file" in fails(capsys, *given, "tiny")


def test_generate_prints_ids(capsys, frame) -> None:
    given = ("generate", "--weights", frame, "--preset", "tiny", "--num-tokens", 9)
    expected = generate(
        Decoder(Model.from_flat(SMALL, seeded_weights(SMALL))),
        [3, 5],
        Sampling(num_tokens=9, temperature=0.5, top_k=30, top_p=0.9, seed=4),
    )

    lines = prints(
        capsys,
        *given,
        *("--prompt-ids", "3,5", "--temperature", 0.5, "--seed", 4),
        *("--top-k", 30, "--top-p", 0.9),
    )

    assert lines == [" ".join(map(str, expected))]
    assert prints(capsys, *given) == prints(capsys, *given, "--prompt-ids", "0")


def test_generate_prints_text_with_a_tokenizer(capsys, frame, tmp_path) -> None:
    path, tokenizer = a_tokenizer(tmp_path)
    given = ("generate", "--weights", frame, "--preset", "tiny", "--num-tokens", 30)

    def decoded(prompt_ids: str) -> list[str]:
        (ids,) = prints(capsys, *given, "--prompt-ids", prompt_ids)
        return [tokenizer.decode([int(part) for part in ids.split()])]

    text = prints(
        capsys, *given, *("--prompt-ids", "5", "--prompt", "ab", "--tokenizer", path)
    )

    assert tokenizer.encode("ab").ids == [10, 11]
    assert text == decoded("5,10,11")
    assert text != decoded("10,11")


def test_how_fast_it_was_goes_to_standard_error(capsys, frame) -> None:
    given = ("generate", "--weights", str(frame), "--preset", "tiny")

    assert main([*given, "--num-tokens", "9", "--prompt-ids", "3,5"]) == 0

    out, err = capsys.readouterr()
    assert len(out.split()) == 9
    assert re.fullmatch(r"prompt of 2 tokens: 0\.\d+ s; then [1-9]\d* tokens/s\n", err)


def test_chat_goes_on_with_one_text_in_turn(
    capsys, frame, tmp_path, monkeypatch
) -> None:
    path, tokenizer = a_tokenizer(tmp_path)
    given = ("chat", "--weights", frame, "--preset", "tiny", "--tokenizer", path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\ncab"))

    lines = prints(capsys, *given, "--num-tokens", 3, "--temperature", 0)

    decoder = Decoder(Model.from_flat(SMALL, seeded_weights(SMALL)))
    sampling = Sampling(num_tokens=3, temperature=0.0)
    first = list(generate(decoder, [EOT, 10, 11], sampling))
    second = list(generate(decoder, [first[-1], 12, 10, 11], sampling))
    assert lines == [tokenizer.decode(first), tokenizer.decode(second)]


@pytest.fixture
def folder(tmp_path):
    """Return an exported folder."""
    finished = exported.Finished(
        shape=replace(SMALL, vocab_size=exported.tokenizer().vocab_size),
        flat=seeded_weights(replace(SMALL, vocab_size=exported.tokenizer().vocab_size)),
    )
    finished.write(tmp_path / "model", Format.HF, Variant.PACKED)
    return tmp_path / "model"


def test_an_exported_folder_needs_no_more(capsys, folder) -> None:
    given = ("generate", "--model", folder, "--num-tokens", 9, "--temperature", 0)
    export = open_export(folder)
    tokenizer = Tokenizer(export.tokenizer)

    text = prints(capsys, *given, "--prompt", "ka lo")

    decoder = Decoder(Model.from_parts(export.shape, export.parts))
    prompt = [0, *tokenizer.encode("ka lo")]
    ids = list(generate(decoder, prompt, Sampling(num_tokens=9, temperature=0.0)))
    piece = tokenizer.pieces()
    assert "\n".join(text) == "".join(map(piece, ids))


def test_a_folder_that_is_damaged_or_none_is_named(capsys, folder) -> None:
    model = folder / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)

    assert "model.safetensors" in fails(capsys, "generate", "--model", folder)
    nowhere = folder / "nowhere"
    assert str(nowhere) in fails(capsys, "generate", "--model", nowhere)


def test_without_its_packages_a_folder_is_refused(capsys, folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitnet_ext.exports.folder", None)

    line = fails(capsys, "generate", "--model", folder)

    assert "--model needs the packages safetensors and gguf" in line


def test_where_weights_come_from_is_said_once(capsys, frame) -> None:
    given = ("generate", "--weights", frame)

    assert "--weights needs --preset" in fails(capsys, *given)
    assert "not allowed with" in fails(capsys, *given, "--model", frame)
    assert "one of the arguments --weights --model" in fails(capsys, "generate")


def test_chat_needs_a_tokenizer(capsys, frame) -> None:
    line = fails(capsys, "chat", "--weights", frame, "--preset", "tiny")

    assert "chat needs --tokenizer" in line


def test_letters_come_when_all_their_bytes_are_there(tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: number for number, letter in enumerate(sorted(alphabet))}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")

    piece = tokenizer.pieces()

    ids = tokenizer.encode("a é€ b")
    assert [piece(token) for token in ids] == [
        *("a", " ", "", "é", "", "", "€", " ", "b")
    ]


def a_tokenizer(folder):
    """Write a tokenizer of 64 letters; `a` is 10, `b` is 11, and so on."""
    tokenizers = pytest.importorskip("tokenizers")
    # From 40 on other letters: those after `~` end lines.
    letters = {chr(87 + n + 100 * (n > 39)): n for n in range(1, 64)}
    vocab = letters | {"<e>": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path, tokenizer


def test_without_the_package_ids_are_printed_and_a_text_prompt_is_refused(
    capsys, frame, tmp_path, monkeypatch
) -> None:
    path, _ = a_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    given = ("generate", "--weights", frame, "--preset", "tiny", "--num-tokens", 5)

    with_file = prints(capsys, *given, "--tokenizer", path)

    assert with_file == prints(capsys, *given)
    refused = fails(capsys, *given, "--prompt", "ab", "--tokenizer", path)
    assert "--tokenizer needs the package tokenizers" in refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt-ids", "3,x"], "must be ids with commas between, got '3,x'"),
        (["--prompt-ids", "64"], "0 to 63, got 64"),
        (["--prompt", "ab"], "--prompt needs --tokenizer"),
        (["--tokenizer", "/nowhere.json"], "/nowhere.json: No such file"),
        (["--tokenizer", __file__], "is no tokenizer"),
        (["--temperature", "nan"], "temperature must be finite"),
        (["--top-k", "0"], "--top-k: must be a whole number from 1"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["--num-tokens", "0"], "from 1 to 1048576, got '0'"),
        (["--seed", "-1"], "--seed"),
        (["--stop-id", "64"], "--stop-id must be from 0 to 63, got 64"),
        (["--threads", "4097"], "from 1 to 4096, got '4097'"),
        (["--preset", "tny"], "did you mean 'tiny'"),
    ],
)
def test_a_wrong_argument_is_named_and_shown(capsys, frame, arguments, said) -> None:
    given = ("generate", "--weights", frame, "--preset", "tiny", *arguments)

    assert said in fails(capsys, *given)


@pytest.mark.parametrize(
    ("argv", "said"), [([], "COMMAND"), (["dance"], "invalid choice: 'dance'")]
)
def test_a_command_that_is_missing_or_unknown_is_one_line(capsys, argv, said) -> None:
    assert said in fails(capsys, *argv)


def test_calibrate_prints_a_table_and_json(capsys) -> None:
    lines = prints(
        capsys,
        *("calibrate", "--preset", "tiny", "--threads", "1,2"),
        *("--batch-size", 2, "--vocab-size", 64),
    )

    heading, one, two, last = lines
    result = json.loads(last)
    assert heading.split() == ["threads", "variant", "micro-batch", "tokens/s"]
    assert [one.split()[0], two.split()[0]] == ["1", "2"]
    assert [row["threads"] for row in result["results"]] == [1, 2]
    assert {row["isa"] for row in result["results"]} <= set(supported_isas())
    assert {row["micro_batch"] for row in result["results"]} <= {1, 2}
    assert all(row["tokens_per_s"] > 0 for row in result["results"])
    assert (result["preset"], result["vocab_size"]) == ("tiny", 64)


@pytest.mark.parametrize(
    ("given", "due"),
    [
        ((), Optimiser.MUON),
        (("--optimiser", "adamw"), Optimiser.ADAMW),
        (("--round-kind", "delta"), Optimiser.MUON),
        (("--round-kind", "gradient"), None),
    ],
)
def test_calibrate_times_the_steps_of_a_kind_of_round(
    capsys, monkeypatch, given, due
) -> None:
    timed = []
    calibrate = TorchTrainer.calibrate

    def noted(self, shape, batch_size, optimiser, hooks):
        timed.append(optimiser)
        return calibrate(self, shape, batch_size, optimiser, hooks)

    monkeypatch.setattr(TorchTrainer, "calibrate", noted)
    quick = ("--threads", "1", "--batch-size", 1, "--vocab-size", 64)

    *_, last = prints(capsys, "calibrate", "--preset", "tiny", *quick, *given)

    assert timed == [due]
    assert json.loads(last)["round_kind"] == ("delta" if due else "gradient")


def test_an_optimiser_of_gradient_rounds_is_refused(capsys) -> None:
    given = ("--round-kind", "gradient", "--optimiser", "muon")

    assert fails(capsys, "calibrate", "--preset", "tiny", *given) == (
        "bitnet-worker: error: --optimiser is for --round-kind delta, got 'muon' with "
        "--round-kind gradient"
    )


@pytest.mark.parametrize("verb", ["calibrate", "eval"])
def test_a_device_that_torch_does_not_find_is_one_line(
    capsys, frame, corpus, monkeypatch, verb
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ("--weights", frame, "--corpus", corpus) if verb == "eval" else ()

    line = fails(capsys, verb, "--preset", "tiny", *given, "--device", "cuda")

    assert line == (
        "bitnet-worker: error: --device cuda: this torch finds no CUDA device on this "
        "machine"
    )


def test_what_the_operator_set_is_not_tuned(monkeypatch) -> None:
    """The worker tries threads and variants only where nobody chose."""
    given = []
    monkeypatch.setattr(cli.process, "work", lambda _, trainer: given.append(trainer))
    monkeypatch.setattr(cli, "supported_isas", lambda: ["portable", "avx2", "quick"])
    monkeypatch.setattr(settings, "usable_cpus", lambda: 4)
    monkeypatch.setattr(cli, "use_threads", lambda _: None)
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BITNET_COORDINATOR_URL", "http://127.0.0.1:1")

    main(["run"])
    monkeypatch.setenv("BITNET_CPU_THREADS", "3")
    monkeypatch.setenv("BITNET_EXT_ISA", "portable")
    main(["run"])

    free, fixed = given
    assert (free.threads, free.variants) == ((4, 2, 1), ("quick", "avx2"))
    assert (fixed.threads, fixed.variants) == ((3,), ("portable",))


def test_run_with_wrong_settings_is_one_line(capsys, monkeypatch) -> None:
    monkeypatch.delenv("BITNET_COORDINATOR_URL", raising=False)

    line = fails(capsys, "run")

    assert line == (
        "bitnet-worker: error: BITNET_COORDINATOR_URL is required and not set"
    )


def test_run_that_the_coordinator_refuses_is_one_line(
    capsys, monkeypatch, coordinator, tmp_path
) -> None:
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BITNET_COORDINATOR_URL", coordinator.url)
    monkeypatch.setenv("BITNET_HEALTH_BEACON", str(tmp_path / "alive"))
    monkeypatch.setenv("BITNET_LOG_LEVEL", "error")
    coordinator.on("POST /register", refuses(401, ErrorCode.UNAUTHORIZED))

    assert "refused to register us: unauthorized" in fails(capsys, "run")
    assert not (tmp_path / "alive").exists()

    pasted = f"{coordinator.url}/admin/dashboard"
    monkeypatch.setenv("BITNET_COORDINATOR_URL", pasted)
    coordinator.on("POST /admin/dashboard/register", refuses(404, ErrorCode.NOT_FOUND))
    line = fails(capsys, "run")
    assert line.startswith("bitnet-worker: error: BITNET_COORDINATOR_URL must be")
    assert f"got {pasted!r}: not_found" in line

    monkeypatch.setenv("BITNET_COORDINATOR_URL", coordinator.url)
    coordinator.on("POST /register", Reply(404, b"<html>"))
    assert main(["run"]) == 1
    assert "not an answer of a coordinator" in capsys.readouterr().err
