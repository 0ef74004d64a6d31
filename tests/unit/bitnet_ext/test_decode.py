"""Decoding token by token, next to its twin and to the whole forward pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_ext import reference_decode
from bitnet_ext.decode import Decoder
from bitnet_ext.infer import Model
from bitnet_ext.isa import active_isa, choose_isa, supported_isas
from bitnet_ext.layout import ModelShape, SegmentKind, num_params, segments
from bitnet_ext.memory import aligned

SMALL = ModelShape(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    seq_len=40,
)
SHAPES = {
    "plain": SMALL,
    "grouped, squared relu": replace(SMALL, num_kv_heads=2, hidden_act="relu2"),
    "tails everywhere": ModelShape(
        vocab_size=61,
        hidden_size=108,
        intermediate_size=90,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        seq_len=37,
    ),
    "several panels and items": replace(
        SMALL, hidden_size=256, intermediate_size=700, vocab_size=1500, num_layers=1
    ),
}


def model_of(shape, seed=0) -> Model:
    random = np.random.default_rng(seed)
    flat = np.empty(num_params(shape), dtype=np.float32)
    for segment in segments(shape):
        part = flat[segment.offset : segment.offset + segment.size]
        part[:] = random.normal(0.0, 0.05, segment.size)
        if segment.kind is SegmentKind.NORM:
            part += 1.0
    return Model.from_flat(shape, flat)


def ids_of(shape, count=None, seed=3):
    random = np.random.default_rng(seed)
    return random.integers(0, shape.vocab_size, count or shape.seq_len)


def step_by_step(decoder, ids):
    return np.array([decoder.step(token).copy() for token in ids])


def assert_close(found, wanted):
    """Equal but for numbers that were rounded to the next int8."""
    error = np.abs(found - wanted).max(axis=-1) / wanted.std()
    assert np.median(error) < 2e-3
    assert error.max() < 0.1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_step_gives_the_logits_of_the_twin(shape):
    model, ids = model_of(shape), ids_of(shape)

    found = step_by_step(Decoder(model), ids)

    assert found.dtype == np.float32
    assert_close(found, reference_decode.decode(model, ids))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_variants_and_threads_give_the_same_bits(shape):
    model, ids = model_of(shape), ids_of(shape)
    before, found = active_isa(), set()
    for isa in supported_isas():
        for threads in (1, 2, 5):
            choose_isa(isa)
            try:
                found.add(step_by_step(Decoder(model, threads=threads), ids).tobytes())
            finally:
                choose_isa(before)

    assert len(found) == 1


@settings(max_examples=20)
@given(st.integers(1, 39), st.integers(0, 5), st.sampled_from(list(SHAPES.values())))
def test_a_prompt_that_is_read_at_once_is_as_one_that_is_read_in_steps(
    length, seed, shape
):
    length = min(length, shape.seq_len - 1)
    model, ids = model_of(shape), ids_of(shape, shape.seq_len, seed)
    decoder = Decoder(model, threads=2)

    found = [decoder.feed(ids[:length]).copy()]
    found += list(step_by_step(decoder, ids[length:]))

    wanted = step_by_step(Decoder(model), ids)[length - 1 :]
    assert np.abs(np.array(found) - wanted).max() < 0.1 * wanted.std()


def test_the_head_rounds_to_int8_and_no_more():
    model, ids = model_of(SMALL), ids_of(SMALL)

    found = step_by_step(Decoder(model), ids)

    exact = model.logits(ids)
    assert 1e-4 < np.abs(found - exact).max() < 0.05 * exact.std()


@pytest.mark.usefixtures("isa")
def test_a_full_text_goes_on_with_its_last_half():
    shape = SMALL
    model, ids = model_of(shape), ids_of(shape, shape.seq_len + 9)
    decoder = Decoder(model)

    found = step_by_step(decoder, ids)[-9:]

    rest = Decoder(model)
    kept = ids[shape.seq_len + 1 - shape.seq_len // 2 : shape.seq_len + 1]
    wanted = [rest.feed(kept).copy(), *step_by_step(rest, ids[-8:])]
    assert found.tobytes() == np.array(wanted).tobytes()


def test_of_a_prompt_that_is_too_long_the_end_counts():
    ids = ids_of(SMALL, 3 * SMALL.seq_len)

    found = Decoder(model_of(SMALL)).feed(ids).copy()

    wanted = Decoder(model_of(SMALL)).feed(ids[-SMALL.seq_len :])
    assert found.tobytes() == wanted.tobytes()


def test_what_is_not_finite_shows():
    model = model_of(SMALL)
    embeddings = model.embeddings.copy()
    embeddings[7, 3] = np.nan
    broken = Model(SMALL, embeddings, model.layers, model.final_norm)
    decoder = Decoder(broken)

    before = decoder.step(5).copy()
    after = step_by_step(decoder, [7, 5])

    # The row of token 7 is also a word of the head.
    assert np.isnan(before).nonzero()[0].tolist() == [7]
    assert np.isnan(after).all()


@pytest.mark.parametrize(
    ("ids", "said"), [([], "got none"), ([64], "0 to 63, got 64"), ([3, -1], "got -1")]
)
def test_ids_that_do_not_fit_are_refused(ids, said):
    with pytest.raises(ValueError, match=f"ids must .*{said}"):
        Decoder(model_of(SMALL)).feed(ids)
    if len(ids) == 1:
        with pytest.raises(ValueError, match=f"ids must .*{said}"):
            Decoder(model_of(SMALL)).step(ids[0])


def test_the_kernel_refuses_what_would_leave_its_memory():
    kernel = Decoder(model_of(SMALL))._kernel
    logits = aligned(64, np.float32)

    for token, position, out in [(64, 0, logits), (0, 48, logits), (0, 0, logits[1:])]:
        with pytest.raises(ValueError, match="has the wrong length"):
            kernel.step(token, position, out, 1)
