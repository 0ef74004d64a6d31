"""Text to token ids and back, where the package `tokenizers` happens to be installed.

A worker needs none to train, and the worker image holds none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker.errors import SettingsError


class Tokenizer:
    """The tokenizer of a prepared corpus.

    Raises SettingsError when the package is missing or the file is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        if not is_installed():
            raise SettingsError("--tokenizer needs the package tokenizers")
        self._inner: Any = _load(path)
        # Text that happens to spell the end-of-text token is text like any other.
        self._inner.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; raises SettingsError for one that is not UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SettingsError(f"text must be UTF-8, got {text!r}") from error
        return list(self._inner.encode(text).ids)

    def pieces(self) -> Callable[[int], str]:
        """Return what turns ids, one after the other, into the text that each adds.

        Letters whose bytes are not all there yet come with their last.
        """
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._inner, token) or ""


def is_installed() -> bool:
    """Whether ids can be turned into text here."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        return False
    return True


def _load(path: Path) -> Any:
    from tokenizers import Tokenizer as Inner

    try:
        return Inner.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # the package raises nothing more precise
        raise SettingsError(f"{path} is no tokenizer: {error}") from error
