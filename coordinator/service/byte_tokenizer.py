"""Byte-level BPE: every text has tokens, and they give back its exact bytes.

A narrow, typed door to Hugging Face `tokenizers`; nothing else here imports it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT: Final = "<|endoftext|>"
#: One entry for each byte, and the end of text.
MIN_VOCAB_SIZE: Final = 257


class ByteTokenizer:
    """Text to tokens and back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        eot_id = tokenizer.token_to_id(END_OF_TEXT)
        if eot_id is None:
            raise ValueError(f"tokenizer has no token {END_OF_TEXT}")
        #: The token that starts each document.
        self.eot_id = eot_id
        # Text that happens to spell the end-of-text token is text like any other.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> ByteTokenizer:
        """Learn at most `vocab_size` tokens; the end of text is token 0."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer=trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> ByteTokenizer:
        """Read a `tokenizer.json`."""
        return cls.parse(path.read_bytes())

    @classmethod
    def parse(cls, content: bytes) -> ByteTokenizer:
        """Return the tokenizer of the content of a `tokenizer.json`."""
        return cls(Tokenizer.from_str(content.decode("utf-8")))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without an end of text."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def to_json(self) -> bytes:
        """Return the content of `tokenizer.json` (Hugging Face `tokenizers`)."""
        return str(self._tokenizer.to_str(pretty=True)).encode()
