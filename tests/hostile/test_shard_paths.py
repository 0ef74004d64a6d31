"""No shard id, however it is spelt, opens a file outside the corpus."""

from __future__ import annotations

import os
from urllib.parse import unquote

import pytest

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.service.shard_files import UnknownShardError, find_shard

SECRET = "secret.txt"

UP = [
    "..",
    "../",
    "../../",
    "..\\",
    "....//",
    "...//",
    ".../",
    "./..",
    ".//../",
    "..;/",
    "%2e%2e/",
    "%2e%2e%2f",
    "..%2f",
    "..%5c",
    "%2e./",
    ".%2e/",
    "%252e%252e%252f",
    "..%252f",
    "..%c0%af",
    "%c0%ae%c0%ae/",
    "..%u2215",
    "..\u2215",
    "..\u2044",
    "..\uff0f",
    "\uff0e\uff0e/",
    "\u2024\u2024/",
    "\u2025/",
    "\u3002\u3002/",
    "..\x00/",
    "..\n/",
    "..\t/",
    ".. /",
    " ../",
]
ODD = [
    "",
    " ",
    ".",
    "..",
    "...",
    "/",
    "//",
    "\\",
    "~",
    "~root",
    "$HOME",
    "%00",
    "\x00",
    "-rf",
    ".hidden",
    "_x",
    "/etc/passwd",
    "//etc/passwd",
    "///etc/passwd",
    "\\\\server\\share",
    "C:\\boot.ini",
    "C:secret",
    "file:///etc/passwd",
    "http://127.0.0.1/",
    "tokenized/train-00000",
    "tokenized%2ftrain-00000",
    "train-00000/",
    "train-00000/.",
    "train-00000/../train-00000",
    "./train-00000",
    "/train-00000",
    "train-00000\n",
    "train-00000\x00",
    "train-00000\x00.bin",
    "train-00000 ",
    " train-00000",
    "train-00000\u200b",
    "train-00000\r\n",
    "train-00000?x=1",
    "train-00000#x",
    "train-00000;x",
    "train-00000:stream",
    "train-*",
    "train-0000?",
    "{train-00000}",
    "train-00000|ls",
    "`ls`",
    "$(ls)",
    "\u0661\u0662",
    "tra\u0131n-00000",
    "t\u0435xt",
    "x" * 65,
    "x" * 5000,
    "\ud800",
]
HOSTILE = [
    *ODD,
    *(up + SECRET for up in UP),
    *(up + "secret" for up in UP[:12]),
    *("tokenized/" + up + SECRET for up in UP[:12]),
]


@pytest.fixture
def corpus(tmp_path):
    """A corpus with one shard of each kind, and a secret beside it."""
    (tmp_path / SECRET).write_text("secret")
    (tmp_path / "secret.bin").write_text("secret")
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "corpus"
    (folder / "tokenized").mkdir(parents=True)
    (folder / "tokenized/train-00000.bin").write_bytes(b"\0" * 8)
    (folder / "tokenized/train-00000\n.bin").write_bytes(b"no id leads here")
    (folder / "book.txt").write_text("text")
    (folder / "raw").write_bytes(b"raw")
    return folder


@pytest.mark.parametrize("shard_id", HOSTILE)
@pytest.mark.parametrize("decoded", [False, True], ids=["as sent", "decoded"])
def test_a_hostile_id_is_unknown(corpus, shard_id, decoded):
    with pytest.raises(UnknownShardError) as caught:
        find_shard(corpus, unquote(shard_id) if decoded else shard_id)

    assert caught.value.code is ErrorCode.UNKNOWN_SHARD
    assert len(caught.value.message) < 1000


def test_about_a_hundred_spellings_are_tried():
    assert len(set(HOSTILE)) >= 100


def test_shards_are_found_in_order_with_type_and_size(corpus):
    for name, content in [("raw.txt", b"12345"), ("raw.bin", b"1234")]:
        assert find_shard(corpus, "raw").num_bytes < 5 + len(content)
        (corpus / name).write_bytes(content)
        assert find_shard(corpus, "raw").path == corpus / name
    (corpus / "tokenized/raw.bin").write_bytes(b"12345678")

    found = find_shard(corpus, "raw")

    assert found.path == corpus / "tokenized/raw.bin"
    assert (found.content_type, found.num_bytes) == ("application/octet-stream", 8)


def test_text_says_that_it_is_text(corpus):
    for shard_id in ("book", "book.txt"):
        found = find_shard(corpus, shard_id)
        assert found.path == corpus / "book.txt"
        assert found.content_type == "text/plain; charset=utf-8"
    assert find_shard(corpus, "raw").content_type == "application/octet-stream"


def test_a_link_is_never_followed(corpus, tmp_path):
    (corpus / "out").symlink_to(tmp_path / SECRET)
    (corpus / "out.txt").symlink_to(tmp_path / SECRET)
    (corpus / "inside.txt").symlink_to(corpus / "book.txt")
    (corpus / "dangling").symlink_to(tmp_path / "nowhere")
    (corpus / "loop").symlink_to(corpus / "loop")

    for shard_id in ("out", "out.txt", "inside", "dangling", "loop"):
        with pytest.raises(UnknownShardError):
            find_shard(corpus, shard_id)


def test_a_linked_folder_leads_nowhere(corpus, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "stolen.bin").write_bytes(b"1234")
    (corpus / "tokenized").rename(tmp_path / "aside")
    (corpus / "tokenized").symlink_to(outside)

    with pytest.raises(UnknownShardError):
        find_shard(corpus, "stolen")


def test_a_corpus_folder_that_is_itself_a_link_serves_its_shards(corpus, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(corpus)

    assert find_shard(link, "book").path == corpus / "book.txt"


def test_only_regular_files_are_served(corpus):
    os.mkfifo(corpus / "pipe")
    (corpus / "folder").mkdir()

    for shard_id in ("pipe", "folder", "tokenized"):
        with pytest.raises(UnknownShardError):
            find_shard(corpus, shard_id)
