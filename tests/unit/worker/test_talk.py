"""What `generate` does when those it writes to, or who reads, are not there."""

from __future__ import annotations

import errno
import io
import os

import pytest

from bitnet_ext.infer import check_ids
from worker import cli, talk
from worker.errors import SettingsError
from worker.text import Tokenizer


class Output(io.StringIO):
    """Standard output that fails, with a descriptor of its own."""

    def __init__(self, error: BaseException, descriptor: int) -> None:
        super().__init__()
        self._error, self._descriptor = error, descriptor

    def write(self, text: str) -> int:
        raise self._error

    def fileno(self) -> int:
        return self._descriptor


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Let standard output fail; return how `generate` ended, and its complaint."""

    def run(error: BaseException, capsys) -> tuple[int, str]:
        def say(arguments: object) -> None:
            talk._write("a word")

        monkeypatch.setattr(cli, "run_generate", say)
        with open(tmp_path / "out", "w") as file:
            monkeypatch.setattr("sys.stdout", Output(error, os.dup(file.fileno())))
            status = cli.main(["generate", "--model", str(tmp_path)])
        return status, capsys.readouterr().err

    return run


def test_a_reader_that_has_gone_ends_it_without_a_word(written, capsys) -> None:
    assert written(BrokenPipeError(errno.EPIPE, "Broken pipe"), capsys) == (141, "")


def test_ctrl_c_ends_it_without_a_word(written, capsys) -> None:
    assert written(KeyboardInterrupt(), capsys) == (130, "")


def test_a_full_disk_is_one_line(written, capsys) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    status, said = written(full, capsys)

    assert status == 1
    assert said == ("bitnet-worker: error: standard output: No space left on device\n")


def test_a_closed_output_is_named(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout", None)

    with pytest.raises(SettingsError, match=r"^standard output is closed$"):
        talk._open_output()


def test_letters_without_a_code_come_out_as_question_marks(monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))

    talk._open_output()
    talk._write("na\u00efve")

    assert raw.getvalue() == b"na?ve"


def test_a_prompt_that_is_not_utf_8_is_refused() -> None:
    tokenizer = Tokenizer.__new__(Tokenizer)

    with pytest.raises(SettingsError, match=r"^text must be UTF-8, got '.udcff'$"):
        tokenizer.encode("\udcff")


def test_lines_that_are_not_utf_8_are_refused(monkeypatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)

    with pytest.raises(SettingsError, match=r"^standard input must be UTF-8"):
        talk._next_line()


@pytest.mark.parametrize("wrong", [10**30, -(10**30)])
def test_an_id_beyond_all_integers_is_out_of_range(wrong) -> None:
    with pytest.raises(ValueError, match=rf"^ids must be from 0 to 9, got {wrong}$"):
        check_ids([1, wrong], 10)
