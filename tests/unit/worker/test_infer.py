"""The forward pass without torch, next to the model that is trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitnet_ext.infer import Model, Numerics, TernaryMatrix
from bitnet_ext.layout import PRESETS, SegmentKind, segments
from bitnet_ext.ternary import quantise_weight
from tests.unit.worker.shapes import (
    GROUPED,
    SMALL,
    plain_logits,
    plain_parameters,
    seeded_weights,
)
from worker.model.transformer import BitNetModel

SHAPES = {
    "a small one": SMALL,
    "grouped queries, squared relu": GROUPED,
    "grouped queries": replace(PRESETS["tiny"], num_kv_heads=2, vocab_size=300),
    "tiny": PRESETS["tiny"],
    "small": replace(PRESETS["small"], vocab_size=999),
}


def ids_of(shape, count=None):
    random = np.random.default_rng(3)
    return random.integers(0, shape.vocab_size, count or shape.seq_len)


def parts_of(shape, flat):
    return {
        part.name: flat[part.offset : part.offset + part.size].reshape(part.shape)
        for part in segments(shape)
    }


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_the_model_that_is_trained(shape) -> None:
    flat, ids = seeded_weights(shape), ids_of(shape)
    trained = BitNetModel(shape)
    trained.flat.load(flat)
    with torch.no_grad():
        expected = trained.logits(trained(torch.from_numpy(ids)[None]))[0].numpy()

    logits = Model.from_flat(shape, flat).logits(ids, threads=2)

    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [SMALL, GROUPED])
def test_logits_are_those_of_a_twin_that_shares_no_code(shape) -> None:
    flat, ids = seeded_weights(shape), ids_of(shape)
    params = plain_parameters(shape, flat)
    expected = plain_logits(shape, params, torch.from_numpy(ids)[None])[0]

    logits = Model.from_flat(shape, flat).logits(ids)

    np.testing.assert_allclose(logits, expected.detach(), rtol=0, atol=1e-4)


def test_ternary_parts_give_the_bits_of_the_weights_that_they_come_from() -> None:
    flat, ids = seeded_weights(GROUPED), ids_of(GROUPED)
    parts = parts_of(GROUPED, flat)
    for part in segments(GROUPED):
        if part.kind in (SegmentKind.LINEAR, SegmentKind.RESIDUAL):
            packed = quantise_weight(parts[part.name]).forward
            parts[part.name] = TernaryMatrix(packed.values(), packed.scale)

    found = Model.from_parts(GROUPED, parts).logits(ids)

    assert found.tobytes() == Model.from_flat(GROUPED, flat).logits(ids).tobytes()


def test_a_position_does_not_know_those_after_it() -> None:
    model, ids = Model.from_flat(SMALL, seeded_weights(SMALL)), ids_of(SMALL, 40)

    for numerics in Numerics:
        whole = model.logits(ids, numerics=numerics)
        start = model.logits(ids[:23], numerics=numerics)
        np.testing.assert_allclose(whole[:23], start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [GROUPED, replace(PRESETS["tiny"], vocab_size=300)])
def test_the_numerics_of_llama_cpp_round_elsewhere_and_mean_the_same(shape) -> None:
    model, ids = Model.from_flat(shape, seeded_weights(shape)), ids_of(shape)

    own = model.logits(ids)
    other = model.logits(ids, numerics=Numerics.LLAMA_CPP)

    difference = np.abs(own - other).max()
    assert 1e-4 < difference < 0.5 * own.std()


def test_llama_cpp_rounds_each_256_columns_by_themselves() -> None:
    shape = replace(SMALL, hidden_size=512, intermediate_size=64, num_layers=1)
    parts = parts_of(shape, seeded_weights(shape))
    # With one scale for a token, its first half would be rounded to nothing.
    parts["layers.0.attn_norm"][256:] = 1e6
    for name in "qk":
        parts[f"layers.0.{name}"][:] = 0.0
    values = parts["layers.0.v"]
    values[:, :256], values[:, 256:] = 0.1, 0.0
    model, ids = Model.from_parts(shape, parts), ids_of(shape)

    without = dict(parts)
    without["layers.0.o"] = np.zeros_like(parts["layers.0.o"])
    idle = Model.from_parts(shape, without)

    def gathered(numerics):
        found = model.logits(ids, numerics=numerics)
        return np.abs(found - idle.logits(ids, numerics=numerics)).max()

    assert gathered(Numerics.OWN) == 0.0
    assert gathered(Numerics.LLAMA_CPP) > 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.0.q": None}, "'layers.0.q' is missing"),
        ({"layers.9.q": np.zeros(1, np.float32)}, "'layers.9.q' is unknown"),
        (
            {"final_norm": np.ones(3, np.float32)},
            r"'final_norm' must be float32 \(64,\)",
        ),
        ({"embeddings": np.ones((64, 64))}, r"got float64 \(64, 64\)"),
        ({"layers.1.o": np.ones((64, 63), np.float32)}, r"got float32 \(64, 63\)"),
        (
            {"layers.1.o": TernaryMatrix(np.ones((3, 64), np.int8), 1.0)},
            r"'layers.1.o' must be int8 \(64, 64\), got int8 \(3, 64\)",
        ),
        (
            {"layers.1.o": TernaryMatrix(np.full((64, 64), 2, np.int8), 1.0)},
            "values must be -1, 0 or 1",
        ),
        (
            {"final_norm": TernaryMatrix(np.ones((64, 1), np.int8), 1.0)},
            "'final_norm' must be float32, got a ternary matrix",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(change, said) -> None:
    parts = parts_of(SMALL, seeded_weights(SMALL)) | change
    parts = {name: part for name, part in parts.items() if part is not None}

    with pytest.raises(ValueError, match=said):
        Model.from_parts(SMALL, parts)


def test_a_flat_vector_of_another_length_or_type_is_refused() -> None:
    flat = seeded_weights(SMALL)

    for wrong in (flat[1:], flat.astype(np.float64)):
        with pytest.raises(ValueError, match="flat must be float32"):
            Model.from_flat(SMALL, wrong)


@pytest.mark.parametrize(
    ("ids", "said"), [([], "got none"), ([3, 64], "0 to 63, got 64"), ([-1], "got -1")]
)
def test_ids_that_do_not_fit_are_refused(ids, said) -> None:
    model = Model.from_flat(SMALL, seeded_weights(SMALL))

    with pytest.raises(ValueError, match=f"ids must .*{said}"):
        model.logits(ids)
