"""Exported folders: whole, checked, true to the model, and refused once damaged."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from safetensors import SafetensorError, safe_open

from bitnet_ext.exports import hugging_face, plain
from bitnet_ext.exports.folder import check_sums, open_export, write_sums
from bitnet_ext.exports.parts import difference, ternary_parts
from bitnet_ext.exports.provenance import (
    PROVENANCE_KEY,
    VARIANTS,
    ExportError,
    Format,
    UnwritableError,
    Variant,
    encode_provenance,
)
from bitnet_ext.exports.writing import check_export
from bitnet_ext.infer import Model, TernaryMatrix
from tests.exported import SHAPES, Finished, fresh, shape_of, tokenizer

TINY = fresh(SHAPES["tiny"])
EVERY = [(form, variant) for form in Format for variant in VARIANTS[form]]
ONE_EACH = [(form, VARIANTS[form][0]) for form in Format]
#: 64 wide: too narrow for TQ1_0 and TQ2_0.
NARROW = fresh(shape_of("tiny", hidden_size=64, intermediate_size=64))


NARROW_OR_TINY = {Format.HF: NARROW, Format.SAFETENSORS: NARROW, Format.GGUF: TINY}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with one export of each format, to be copied before it is damaged."""
    root = tmp_path_factory.mktemp("exports")
    for form, variant in ONE_EACH:
        NARROW_OR_TINY[form].write(root / form, form, variant)
    return root


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("form", "variant"), EVERY)
def test_an_export_that_is_opened_holds_the_model(
    tmp_path, shape, form, variant
) -> None:
    model = fresh(shape)

    report = model.write(tmp_path / "out", form, variant)

    export = open_export(tmp_path / "out")
    assert export.shape == shape
    assert export.about == model.about(form, variant)
    assert export.tokenizer.read_bytes() == tokenizer().to_json()
    assert report.num_bytes == sum(
        p.stat().st_size for p in export.tokenizer.parent.iterdir()
    )
    due = ternary_parts(shape, model.flat)
    for name, part in due.items():
        found = export.parts[name]
        if isinstance(part, TernaryMatrix) and isinstance(found, TernaryMatrix):
            np.testing.assert_array_equal(found.values, part.values)
            assert found.scale == pytest.approx(part.scale, rel=1e-6)
        elif not isinstance(part, TernaryMatrix):
            rounding = 2.0**-11 if form is Format.GGUF and part.ndim == 2 else 0
            np.testing.assert_allclose(found, part, rtol=rounding, atol=1e-7)
        else:
            assert variant is Variant.MASTER


@pytest.mark.parametrize("variant", [Variant.MASTER, Variant.FLOAT])
def test_exports_in_float32_answer_with_the_very_same_logits(tmp_path, variant) -> None:
    report = TINY.write(tmp_path / "out", Format.HF, variant)

    assert report.difference == 0
    assert report.logits > 0.1


def test_ternary_files_are_as_small_as_their_types_say(tmp_path) -> None:
    shape = SHAPES["tiny"]
    linear = sum(
        part.values.size
        for part in ternary_parts(shape, TINY.flat).values()
        if isinstance(part, TernaryMatrix)
    )
    sizes = {}
    for form, variant in EVERY:
        TINY.write(tmp_path / form / variant, form, variant)
        (path,) = (tmp_path / form / variant).glob("model*")
        sizes[variant] = path.stat().st_size

    for variant, bits in (
        (Variant.TQ1_0, 1.6875),
        (Variant.TQ2_0, 2.0625),
        (Variant.F16, 16),
    ):
        rest = 2 * shape.vocab_size * shape.hidden_size
        assert sizes[variant] == pytest.approx(rest + linear * bits / 8, abs=40_000)
    assert sizes[Variant.PACKED] == pytest.approx(
        4 * shape.vocab_size * shape.hidden_size + linear / 4, abs=20_000
    )


@pytest.mark.parametrize(("form", "variant"), ONE_EACH)
def test_the_same_version_gives_the_same_bytes(tmp_path, form, variant) -> None:
    model = NARROW_OR_TINY[form]
    for name in ("one", "other"):
        model.write(tmp_path / name, form, variant)

    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


@pytest.mark.parametrize("form", list(Format))
def test_where_it_comes_from_is_inside_the_model_and_beside_it(whole, form) -> None:
    about = NARROW_OR_TINY[form].about(form, VARIANTS[form][0])
    (path,) = (whole / form).glob("model*")

    match form:
        case Format.GGUF:
            inside = json.loads(GGUFReader(path).fields[PROVENANCE_KEY].contents())
        case Format.SAFETENSORS:
            with safe_open(path, "numpy") as file:
                inside = json.loads(file.metadata()[PROVENANCE_KEY])
        case Format.HF:
            inside = json.loads((whole / form / "config.json").read_text())
            inside = inside[PROVENANCE_KEY]

    assert inside == json.loads(encode_provenance(about))
    assert inside == json.loads((whole / form / "provenance.json").read_text())
    card = (whole / form / "README.md").read_text()
    for said in (about.layout_hash, about.corpus_hash, about.tokenizer_hash):
        assert said in card
    assert "123,456 tokens" in card
    assert "3.2500 nats" in card


@pytest.mark.parametrize("form", list(Format))
def test_sha256sum_finds_every_file_whole(whole, form) -> None:
    subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=whole / form,
        check=True,
        capture_output=True,
    )


@pytest.mark.parametrize("form", list(Format))
@pytest.mark.parametrize("damage", ["shortened", "flipped", "emptied", "missing"])
def test_a_damaged_file_is_refused_by_name(whole, tmp_path, form, damage) -> None:
    for name in sorted(path.name for path in (whole / form).iterdir()):
        folder = tmp_path / name
        shutil.copytree(whole / form, folder)
        content = bytearray((folder / name).read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
        (folder / name).write_bytes(
            content[: {"shortened": -1, "emptied": 0}.get(damage)]
        )
        if damage == "missing":
            (folder / name).unlink()

        with pytest.raises(
            ExportError, match=r"damaged|missing|must list|no exported"
        ) as error:
            open_export(folder)

        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)


def test_every_bit_of_the_list_of_hashes_counts(tmp_path) -> None:
    for name in ("provenance.json", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    check_sums(tmp_path)
    path = tmp_path / "SHA256SUMS"
    whole = path.read_bytes()

    # The hash of one line, its name and its end: all that there is in a list.
    for place in range(8 * len(whole.split(b"\n")[0]) + 8):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(ExportError):
            check_sums(tmp_path)


def test_a_file_that_is_not_listed_is_refused(whole, tmp_path) -> None:
    shutil.copytree(whole / "hf", tmp_path / "out")
    (tmp_path / "out" / "more.py").touch()

    with pytest.raises(ExportError, match=r"more\.py is not listed"):
        open_export(tmp_path / "out")


def test_a_folder_that_is_no_export_is_refused(tmp_path) -> None:
    with pytest.raises(ExportError, match="is no exported folder"):
        open_export(tmp_path)
    with pytest.raises(ExportError, match="is no exported folder"):
        open_export(tmp_path / "nowhere")


def test_a_file_that_cannot_be_read_is_named(whole, tmp_path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole / "hf", folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()

    with pytest.raises(ExportError) as error:
        open_export(folder)

    assert str(error.value) == f"{folder}/config.json: Is a directory"


@pytest.mark.parametrize(
    ("name", "content"), [("provenance.json", "{}"), ("model.safetensors", "?")]
)
def test_a_file_that_was_never_right_is_named_with_its_folder(
    whole, tmp_path, name, content
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole / "hf", folder)
    (folder / name).write_text(content)
    (folder / "SHA256SUMS").unlink()
    write_sums(folder)

    with pytest.raises(ExportError) as error:
        open_export(folder)

    assert str(error.value).startswith(f"{folder}: {name}: ")


@pytest.mark.parametrize("there", ["a folder", "a file", "a link to nothing"])
def test_what_is_there_already_is_never_touched(tmp_path, there) -> None:
    target = tmp_path / "out"
    match there:
        case "a folder":
            target.mkdir()
        case "a file":
            target.write_text("mine")
        case _:
            target.symlink_to(tmp_path / "nothing")

    with pytest.raises(ExportError, match="is there already"):
        NARROW.write(target, Format.HF, Variant.FLOAT)

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def failing(monkeypatch):
    """Let the libraries fail to write a model file, with so many bytes left."""

    def begin(failure: Exception, free: int) -> None:
        def fail(*_: object, **__: object) -> None:
            raise failure

        monkeypatch.setattr(hugging_face, "save_file", fail)
        monkeypatch.setattr(plain, "save_file", fail)
        monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", fail)
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    return begin


@pytest.mark.parametrize("form", list(Format))
@pytest.mark.parametrize(
    ("failure", "free", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1 << 40, True),
        (OSError(errno.EIO, "Input/output error"), 0, False),
        (OSError("9216 requested and 4096 written"), 4096, True),
        (OSError("9216 requested and 4096 written"), 1 << 40, False),
        (SafetensorError("I/O error: No space left on device"), 4096, True),
    ],
)
def test_a_disk_that_fails_is_told_of_by_the_folder(
    tmp_path, failing, form, failure, free, full
) -> None:
    failing(failure, free)
    out = tmp_path / "out"

    with pytest.raises(UnwritableError) as error:
        NARROW_OR_TINY[form].write(out, form, VARIANTS[form][0])

    due = f"there is no room for {out}: " if full else f"{out} can't be written: "
    assert error.value.full is full
    assert str(error.value) == due + str(getattr(failure, "strerror", "") or failure)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"

    with pytest.raises(UnwritableError, match=f"{out} can't be written: Not a dir"):
        NARROW.write(out, Format.HF, Variant.FLOAT)


@pytest.mark.parametrize("variant", [Variant.TQ1_0, Variant.TQ2_0])
def test_a_model_that_a_type_cannot_hold_is_refused_and_leaves_nothing(
    tmp_path, variant
) -> None:
    with pytest.raises(
        ExportError, match="hidden_size that is a multiple of 256, got 64"
    ):
        NARROW.write(tmp_path / "out", Format.GGUF, variant)

    assert list(tmp_path.iterdir()) == []
    NARROW.write(tmp_path / "out", Format.GGUF, Variant.F16)


def test_the_packed_layout_refuses_rows_that_fill_no_byte(tmp_path) -> None:
    odd = fresh(shape_of("tiny", intermediate_size=254))

    with pytest.raises(
        ExportError, match=r"multiple of 4 rows, layers\.0\.gate has 254"
    ):
        odd.write(tmp_path / "out", Format.HF, Variant.PACKED)


def test_a_tokenizer_of_another_size_is_refused(tmp_path) -> None:
    other = fresh(shape_of("tiny", vocab_size=100))

    with pytest.raises(ExportError, match="ids 0 to 99, got 320"):
        other.write(tmp_path / "out", Format.GGUF, Variant.TQ2_0)


def test_only_llama_cpp_is_warned_of_squared_relu(tmp_path) -> None:
    squared = fresh(shape_of("tiny", hidden_act="relu2"))
    warned = squared.about(Format.GGUF, Variant.TQ2_0).warnings()

    squared.write(tmp_path / "out", Format.GGUF, Variant.TQ2_0)

    assert len(warned) == 1
    assert "ignore the activation relu2" in warned[0]
    assert warned[0] in (tmp_path / "out" / "README.md").read_text()
    assert squared.about(Format.HF, Variant.PACKED).warnings() == []
    assert TINY.about(Format.GGUF, Variant.TQ2_0).warnings() == []


def test_parts_that_are_not_those_written_are_found(whole) -> None:
    export = open_export(whole / "hf")
    due = export.parts
    swapped = due | {"layers.0.gate": due["layers.0.up"]}
    one_value = TernaryMatrix(due["layers.1.o"].values.copy(), due["layers.1.o"].scale)
    one_value.values[3, 5] = -1 if one_value.values[3, 5] == 0 else 0
    scaled = TernaryMatrix(due["layers.0.q"].values, due["layers.0.q"].scale * 1.001)

    assert difference(due, due) is None
    assert difference(due, swapped) == "layers.0.gate"
    assert difference(due, due | {"layers.1.o": one_value}) == "layers.1.o"
    assert difference(due, due | {"layers.0.q": scaled}) == "layers.0.q"
    assert difference(due, {k: v for k, v in due.items() if k != "final_norm"})


def test_an_export_that_answers_unlike_the_model_is_refused(whole) -> None:
    export = open_export(whole / "hf")
    other = Finished(shape=NARROW.shape, flat=fresh(NARROW.shape, seed=1).flat)

    with pytest.raises(ExportError, match="answers differently"):
        check_export(
            whole / "hf", export.parts, Model.from_flat(other.shape, other.flat)
        )
    with pytest.raises(ExportError, match=r"read back, layers\.0\.gate is not"):
        check_export(
            whole / "hf",
            export.parts | {"layers.0.gate": export.parts["layers.0.up"]},
            Model.from_flat(NARROW.shape, NARROW.flat),
        )
