"""The commands `generate` and `chat`: text of a model, as it is drawn.

Text, or ids where there is no tokenizer, goes to standard output token by token; speed
goes to standard error.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from bitnet_ext.decode import Decoder
from bitnet_ext.infer import Model
from worker import offline
from worker.errors import SettingsError, WorkerError
from worker.generate import Sampling, generate
from worker.text import Tokenizer, is_installed

#: What is shown where a line is waited for.
PROMPT: Final = "> "


def run_generate(arguments: argparse.Namespace) -> None:
    """Print what a model draws after a prompt.

    Raises SettingsError that names an argument or a file which is wrong.
    """
    if arguments.prompt is not None and not (arguments.tokenizer or arguments.model):
        raise SettingsError("--prompt needs --tokenizer; --prompt-ids does not")
    talk = _talk(arguments, text_needed=arguments.prompt is not None)
    prompt = list(arguments.prompt_ids)
    if arguments.prompt is not None and talk.tokenizer is not None:
        prompt += talk.tokenizer.encode(arguments.prompt)
    talk.say(prompt)


def run_chat(arguments: argparse.Namespace) -> None:
    """Let lines of standard input and the model go on with one text, in turn.

    Raises SettingsError as `run_generate`.
    """
    talk = _talk(arguments, text_needed=True)
    if talk.tokenizer is None:
        raise SettingsError("chat needs --tokenizer, or --model that has one")
    before = list(arguments.prompt_ids)
    try:
        while line := _next_line():
            talk.say(before + talk.tokenizer.encode(line))
            before = talk.unread
    except KeyboardInterrupt:
        print()


@dataclass(slots=True)
class _Talk:
    """One text that people and the model write."""

    decoder: Decoder
    sampling: Sampling
    random: np.random.Generator
    tokenizer: Tokenizer | None
    #: The last id that was drawn: the decoder has not read it yet.
    unread: list[int]

    def say(self, prompt: Sequence[int]) -> None:
        """Print what is drawn after the prompt, and how fast that was."""
        began_s = time.perf_counter()
        drawn = generate(self.decoder, prompt, self.sampling, self.random)
        try:
            first = next(drawn)
        except ValueError as error:
            raise SettingsError(f"prompt: {error}") from error
        read_s = time.perf_counter() - began_s
        count = self._print(first, drawn)
        seconds = time.perf_counter() - began_s - read_s
        print(_speed(len(prompt), read_s, count, seconds), file=sys.stderr)

    def _print(self, first: int, drawn: Iterable[int]) -> int:
        """Print as ids come; return how many came after the first."""
        piece = str if self.tokenizer is None else self.tokenizer.pieces()
        gap = " " if self.tokenizer is None else ""
        _write(piece(first))
        self.unread, count = [first], 0
        for token in drawn:
            _write(gap + piece(token))
            self.unread, count = [token], count + 1
        _write("\n")
        return count


def _write(text: str) -> None:
    """Send text on its way; raises WorkerError where that fails."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WorkerError(f"standard output: {error.strerror}") from error


def _talk(arguments: argparse.Namespace, *, text_needed: bool) -> _Talk:
    _open_output()
    sampling = _sampling(arguments)
    model, path = _model(arguments)
    stop_id, vocab_size = sampling.stop_id, model.shape.vocab_size
    if stop_id is not None and not 0 <= stop_id < vocab_size:
        raise SettingsError(
            f"--stop-id must be from 0 to {vocab_size - 1}, got {stop_id}"
        )
    return _Talk(
        Decoder(model, threads=arguments.threads),
        sampling,
        np.random.default_rng(sampling.seed),
        _tokenizer(arguments.tokenizer or path, text_needed=text_needed),
        [],
    )


def _open_output() -> None:
    """Let letters that the terminal has no code for come out as question marks."""
    if sys.stdout is None:
        raise SettingsError("standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _sampling(arguments: argparse.Namespace) -> Sampling:
    try:
        return Sampling(
            num_tokens=arguments.num_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            stop_id=arguments.stop_id,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _model(arguments: argparse.Namespace) -> tuple[Model, Path | None]:
    """Return the model, and the tokenizer that came with it."""
    if arguments.model is not None:
        export = offline.load_export(arguments.model)
        return Model.from_parts(export.shape, export.parts), export.tokenizer
    if arguments.preset is None:
        raise SettingsError("--weights needs --preset; --model does not")
    weights = offline.load_weights(arguments.weights, arguments.preset)
    return Model.from_flat(weights.shape, weights.flat), None


def _speed(num_read: int, read_s: float, num_drawn: int, seconds: float) -> str:
    """Return a line about a reply; the first token came with the prompt."""
    line = f"prompt of {num_read} tokens: {read_s:.3f} s"
    if num_drawn:
        line += f"; then {num_drawn / seconds:.0f} tokens/s"
    return line


def _next_line() -> str:
    """Return a line with its end; nothing when there are no more."""
    if sys.stdin.isatty():
        sys.stderr.write(PROMPT)
        sys.stderr.flush()
    try:
        return sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise SettingsError(f"standard input must be UTF-8: {error}") from error


def _tokenizer(path: Path | None, *, text_needed: bool) -> Tokenizer | None:
    """Return the tokenizer to print text with; None prints ids."""
    if path is None:
        return None
    if not text_needed and not is_installed():
        print("no package tokenizers, ids follow", file=sys.stderr)
        return None
    return Tokenizer(path)
