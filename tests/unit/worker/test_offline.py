"""What is said of an exported folder that the worker can't open."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_ext.exports.provenance import Format, Variant
from tests.exported import fresh, shape_of
from worker.errors import SettingsError
from worker.offline import load_export


def said(folder: Path) -> str:
    with pytest.raises(SettingsError) as error:
        load_export(folder)
    return str(error.value)


def test_a_folder_that_is_no_export_is_named_once(tmp_path) -> None:
    folder = tmp_path / "nowhere"

    assert said(folder) == (
        f"{folder} is no exported folder: SHA256SUMS: No such file or directory"
    )


def test_a_file_of_an_export_that_cannot_be_read_is_named(tmp_path) -> None:
    folder = tmp_path / "out"
    model = fresh(shape_of("tiny", hidden_size=64, intermediate_size=64))
    model.write(folder, Format.HF, Variant.PACKED)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()

    assert said(folder) == f"{folder / 'tokenizer.json'}: Is a directory"
