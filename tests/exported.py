"""Models to export: a real tokenizer, real shapes, first and trained weights."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_ext.exports.provenance import Format, Provenance, Variant
from bitnet_ext.exports.writing import Report, write_export
from bitnet_ext.layout import (
    ModelShape,
    layout_hash,
    num_params,
    preset_shape,
    shape_to_json,
)
from bitnet_ext.wire.messages import HyperParameters
from bitnet_ext.wire.verdicts import Optimiser
from coordinator.domain.initial import initial_weights
from coordinator.service.byte_tokenizer import ByteTokenizer
from worker.model.transformer import BitNetModel
from worker.train import Batch, LocalSteps, Moments

_HYPER = HyperParameters(
    optimiser=Optimiser.ADAMW,
    momentum=0.95,
    lr_start=3e-3,
    lr_end=3e-3,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    clip_norm=1.0,
)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A model that is ready to be exported."""

    shape: ModelShape
    flat: NDArray[np.float32]

    def about(self, form: Format, variant: Variant, **changes: object) -> Provenance:
        said = {
            "format": form,
            "variant": variant,
            "model": shape_to_json(self.shape),
            "preset": "tiny",
            "run_id": "r-1",
            "weight_version": 7,
            "layout_hash": layout_hash(self.shape).hex(),
            "frame_hash": "0" * 64,
            "corpus_hash": "1" * 64,
            "tokenizer_hash": hashlib.sha256(tokenizer().to_json()).hexdigest(),
            "eot_id": tokenizer().eot_id,
            "tokens_trained": 123456,
            "heldout_loss": 3.25,
            "heldout_bits_per_byte": 2.5,
            "num_params": num_params(self.shape),
            "package_version": "0.1.0",
        }
        return Provenance(**(said | changes))

    def write(self, target: Path, form: Format, variant: Variant) -> Report:
        about = self.about(form, variant)
        return write_export(target, self.flat, about, tokenizer().to_json())


def text(num_words: int = 4000) -> str:
    """Return invented prose: some words follow others, all by a seed."""
    chance = random.Random(0)
    syllables = ["ka", "lo", "mi", "ter", "un", "ves", "or", "dan", "pil", "quo"]
    known = [
        "".join(chance.choices(syllables, k=chance.randint(1, 3))) for _ in "x" * 60
    ]
    after = {word: chance.sample(known, 4) for word in known}
    word, said = known[0], []
    for _ in range(num_words):
        word = chance.choice(after[word])
        said.append(word)
    return " ".join(said)


@cache
def tokenizer() -> ByteTokenizer:
    """Return the tokenizer of that prose."""
    return ByteTokenizer.learn([text()], 320)


def shape_of(preset: str, **changes: object) -> ModelShape:
    return replace(preset_shape(preset, vocab_size=tokenizer().vocab_size), **changes)


SHAPES = {
    "tiny": shape_of("tiny"),
    "small": shape_of("small"),
    "grouped queries": shape_of("tiny", num_kv_heads=2),
}


def fresh(shape: ModelShape, seed: int = 0) -> Finished:
    return Finished(shape=shape, flat=initial_weights(shape, seed))


@cache
def trained(preset: str = "tiny", num_steps: int = 50) -> Finished:
    """Return a model after so many steps of the worker on that prose."""
    shape = shape_of(preset)
    model = BitNetModel(shape)
    model.flat.load(initial_weights(shape, 1))
    steps = LocalSteps(model, Moments.zeros(shape), _HYPER)
    ids = torch.tensor(tokenizer().encode(text()))
    chance = np.random.default_rng(0)
    for _ in range(num_steps):
        starts = chance.integers(len(ids) - shape.seq_len - 1, size=4)
        rows = torch.stack([ids[s : s + shape.seq_len + 1] for s in starts])
        batch = Batch(rows[:, :-1], rows[:, 1:], 4 * shape.seq_len)
        loss = steps.step(batch, _HYPER.lr_start)
    assert loss < 4.0, f"hardly trained: {loss}"
    return Finished(shape=shape, flat=model.flat.values.numpy().copy())
