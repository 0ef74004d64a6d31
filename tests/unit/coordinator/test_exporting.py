"""Which version is exported, what is said of it, and what is refused."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import msgspec
import pytest
from gguf import GGUFWriter
from safetensors import SafetensorError

from bitnet_ext.codecs import decode
from bitnet_ext.exports import hugging_face, plain
from bitnet_ext.exports.folder import open_export
from bitnet_ext.exports.provenance import Format, Variant
from bitnet_ext.frames import decode_frame
from bitnet_ext.layout import num_params, preset_shape
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator import verbs
from coordinator.cli import main
from coordinator.domain.errors import RefusedError
from coordinator.domain.manifest import load_manifest
from coordinator.service.downloading import open_archive
from coordinator.service.exporting import Pick, choose
from coordinator.store import versions
from coordinator.store.lock import DataLock
from tests.integration.fleet import make_corpus
from tests.unit.coordinator.fleets import PLAN, World


def trained(world: World, *, nats: tuple[float, ...]) -> World:
    """Let a fleet train a version for each score, and score the root and each."""
    every = msgspec.structs.replace(PLAN, evaluate_every=1)
    world.start_run(every, scored=True)
    for name in ("w1", "w2"):
        world.register(name)
    for score in nats:
        world.submit(world.claimed("w1"))
        world.score(world.claimed("w2"), score, worker_id="w2")
        assert world.close_round()
    return world


def wished(world: World, wish: int | Pick):
    return world.read(lambda connection: choose(connection, wish))


def test_latest_is_the_newest_version_and_best_the_one_with_the_lowest_loss(world):
    trained(world, nats=(300.0, 200.0, 250.0))

    assert wished(world, Pick.LATEST).version.version == 4
    assert wished(world, Pick.BEST).version.version == 2
    assert wished(world, 3).version.version == 3


def test_the_score_of_a_version_goes_with_it(world):
    trained(world, nats=(300.0, 200.0))

    best, latest = wished(world, Pick.BEST), wished(world, Pick.LATEST)

    assert best.score is not None
    assert best.score.nats == 200.0
    assert latest.score is None
    assert latest.version.tokens_total > best.version.tokens_total > 0


def test_a_version_that_is_not_kept_is_refused_with_those_that_are(world):
    trained(world, nats=(300.0, 200.0))
    world.write(lambda connection: versions.mark_pruned(connection, [2]))

    for wish in (2, 77):
        with pytest.raises(RefusedError, match=rf"kept \(1, 3\), got {wish}") as error:
            wished(world, wish)
        assert error.value.code is ErrorCode.UNKNOWN_VERSION


def test_nothing_is_best_before_a_score_and_nothing_at_all_before_a_run(world):
    with pytest.raises(RefusedError, match="there is no run yet"):
        wished(world, Pick.LATEST)

    world.start_run()

    assert wished(world, Pick.LATEST).version.version == 1
    with pytest.raises(RefusedError, match="latest or a number while none was scored"):
        wished(world, Pick.BEST)


def published(tmp_path):
    (path,) = (tmp_path / "data" / "published").iterdir()
    header, payload = decode_frame(path.read_bytes())
    return decode(header.codec, payload, header.num_elements)


@pytest.mark.parametrize(
    ("options", "form", "variant"),
    [
        (["hf"], Format.HF, Variant.PACKED),
        (["hf", "--layout", "master"], Format.HF, Variant.MASTER),
        (["gguf", "--type", "TQ1_0"], Format.GGUF, Variant.TQ1_0),
        (["safetensors"], Format.SAFETENSORS, Variant.MASTER),
    ],
)
def test_a_version_is_exported_while_a_coordinator_holds_the_folder(
    fleet, tmp_path, capsys, options, form, variant
):
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    lock = DataLock(tmp_path / "data")
    try:
        assert main(["export", *fleet, "--out", str(out), "--format", *options]) == 0
    finally:
        lock.close()

    said, warned = capsys.readouterr()
    assert said.startswith(f"version 1 as {form} {variant} in {out}: ")
    assert said.count("\n") == 1
    assert warned == ""
    export = open_export(out)
    manifest = load_manifest(tmp_path / "corpus" / "tokenized" / "manifest.json")
    about = export.about
    assert export.shape == preset_shape("tiny", vocab_size=manifest.vocab_size)
    assert (about.format, about.variant) == (form, variant)
    assert (about.weight_version, about.tokens_trained) == (1, 0)
    assert about.tokenizer_hash == manifest.tokenizer_sha256
    assert about.corpus_hash == manifest.corpus_sha256
    assert about.heldout_loss is None
    assert about.num_params == num_params(export.shape) == published(tmp_path).size
    made = {out, *out.iterdir()}
    left = [p for p in tmp_path.rglob("*") if p not in made and ".db-" not in p.name]
    assert set(left) - {tmp_path / "data" / ".lock"} == {
        p for p in before if ".db-" not in p.name
    } - {tmp_path / "data" / ".lock"}


def refused(capsys, *arguments: str) -> str:
    """Run an export that has to be refused with one line; return the line."""
    assert main(["export", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bitnet-coordinator: ")
    assert err.count("\n") == 1
    return err


def test_an_export_that_cannot_be_made_says_why_and_leaves_nothing(
    fleet, tmp_path, capsys
):
    out = tmp_path / "out"
    to_out = [*fleet, "--out", str(out)]

    assert "got 9" in refused(capsys, *to_out, "--format", "hf", "--version", "9")
    assert "got '-1'" in refused(capsys, *to_out, "--format", "hf", "--version=-1")
    assert "none was scored" in refused(
        capsys, *to_out, "--format", "hf", "--version", "best"
    )
    assert "--type is for --format gguf, got --format hf" in refused(
        capsys, *to_out, "--format", "hf", "--type", "TQ1_0"
    )
    assert "is there already" in refused(
        capsys, *fleet, "--out", str(tmp_path), "--format", "hf"
    )
    nowhere = ["--data", str(tmp_path / "x"), "--out", str(out), "--format", "hf"]
    assert "holds no fleet" in refused(capsys, *nowhere)
    assert not out.exists()


def test_a_tokenizer_of_another_corpus_is_refused(fleet, tmp_path, capsys):
    make_corpus(tmp_path / "other", vocab_size=290)
    options = [*fleet, "--out", str(tmp_path / "out"), "--format", "hf"]

    line = refused(capsys, *options, "--corpus", str(tmp_path / "other"))

    assert "must be the tokenizer of run" in line
    assert "--corpus" in line


def test_damaged_weights_are_not_exported(fleet, tmp_path, capsys):
    (frame,) = (tmp_path / "data" / "published").iterdir()
    content = bytearray(frame.read_bytes())
    content[1000] ^= 1
    frame.write_bytes(content)

    line = refused(capsys, *fleet, "--out", str(tmp_path / "out"), "--format", "gguf")

    assert f"{frame} is damaged" in line
    assert not (tmp_path / "out").exists()


def test_only_one_export_is_written_for_the_page_at_a_time(running):
    wish = (Format.HF, Variant.PACKED)

    async def ask_twice() -> None:
        async with running.fleet.exporting:
            await open_archive(running.fleet, Pick.LATEST, wish)

    with pytest.raises(RefusedError, match="another export") as error:
        running.do(ask_twice())
    assert error.value.code is ErrorCode.BUSY
    assert error.value.retry_after_s


def test_what_cannot_be_exported_is_told_to_the_page(running):
    # Its corpus has no byte-level BPE, and its hidden size is 8.
    with pytest.raises(RefusedError, match="multiple of 256, got 8") as error:
        running.do(
            open_archive(running.fleet, Pick.LATEST, (Format.GGUF, Variant.TQ2_0))
        )
    assert error.value.code is ErrorCode.BAD_REQUEST
    assert not list(running.fleet.blobs.folder.glob(".export-*"))


@pytest.mark.parametrize("form", list(Format))
def test_a_disk_that_fills_up_in_mid_export_is_one_line(
    fleet, tmp_path, capsys, monkeypatch, form
):
    full_disk(monkeypatch)
    out = tmp_path / "out"

    line = refused(capsys, *fleet, "--out", str(out), "--format", form)

    assert f"there is no room for {out}: " in line
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("form", [Format.HF, Format.SAFETENSORS])
def test_a_disk_that_fills_up_in_mid_export_is_told_to_the_page(
    running, monkeypatch, form
):
    full_disk(monkeypatch)
    wish = (form, Variant.MASTER)

    with pytest.raises(RefusedError, match="no room") as error:
        running.do(open_archive(running.fleet, Pick.LATEST, wish))

    assert error.value.code is ErrorCode.DISK_LOW
    assert not list(running.fleet.blobs.folder.glob(".export-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_that_is_ended_by_a_signal_leaves_nothing(
    fleet, tmp_path, capsys, monkeypatch, number
):
    def signalled(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half of it")
        signal.raise_signal(number)

    monkeypatch.setattr(hugging_face, "save_file", signalled)
    out = tmp_path / "out"
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        status = ended(["export", *fleet, "--out", str(out), "--format", "hf"])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, ignored)

    assert status == 128 + number
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.glob("*out*"))


def test_a_score_that_is_interrupted_ends_without_a_word(fleet, capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(verbs, "score", interrupted)

    assert ended(["eval", *fleet]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")


def ended(arguments: list[str]) -> int:
    """Run a command; return its exit status, however it ends."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def full_disk(monkeypatch) -> None:
    """Let the libraries fail to write, as they do on a full disk: with no number."""

    def fail_safetensors(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def fail_numpy(*_: object) -> None:
        raise OSError("9216 requested and 4096 written")

    for module in (hugging_face, plain):
        monkeypatch.setattr(module, "save_file", fail_safetensors)
    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", fail_numpy)
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
