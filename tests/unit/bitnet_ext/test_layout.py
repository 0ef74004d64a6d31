"""The flat vector: no gaps, one order, and a hash that everything moves."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from bitnet_ext.layout import (
    PRESETS,
    ModelShape,
    SegmentKind,
    UnknownPresetError,
    layout_hash,
    num_params,
    preset_shape,
    segments,
    shape_from_json,
    shape_to_json,
)

TINY = PRESETS["tiny"]


@pytest.mark.parametrize("shape", PRESETS.values(), ids=PRESETS)
def test_segments_follow_each_other_without_gaps(shape):
    end = 0
    for segment in segments(shape):
        assert segment.offset == end
        end += segment.size
    assert num_params(shape) == end


def test_linear_is_what_the_forward_pass_takes_as_ternary():
    others = {each.name.split(".")[-1] for each in segments(TINY) if not each.is_linear}

    assert others == {
        "embeddings",
        "attn_norm",
        "attn_sub_norm",
        "ffn_norm",
        "ffn_sub_norm",
        "final_norm",
    }


def test_a_layer_has_the_agreed_order():
    names = [segment.name for segment in segments(TINY)]

    assert names[0] == "embeddings"
    assert names[-1] == "final_norm"
    assert [name.removeprefix("layers.1.") for name in names[12:23]] == [
        "attn_norm", "q", "k", "v", "attn_sub_norm", "o",
        "ffn_norm", "gate", "up", "ffn_sub_norm", "down",
    ]  # fmt: skip


def test_grouped_heads_have_narrow_keys_and_values():
    shape = replace(TINY, num_kv_heads=2)
    found = {segment.name: segment for segment in segments(shape)}

    assert found["layers.0.q"].shape == (256, 256)
    assert found["layers.0.k"].shape == found["layers.0.v"].shape == (128, 256)
    assert found["layers.0.down"].shape == (256, 512)


def test_only_what_writes_to_the_residual_stream_is_residual():
    residual = {s.name for s in segments(TINY) if s.kind is SegmentKind.RESIDUAL}

    assert residual == {"layers.0.o", "layers.0.down", "layers.1.o", "layers.1.down"}


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 5175},
        {"hidden_size": 512},
        {"intermediate_size": 1024},
        {"num_layers": 3},
        {"num_heads": 8},
        {"num_kv_heads": 2},
        {"seq_len": 64},
        {"rope_theta": 500_000.0},
        {"rms_norm_eps": 1e-6},
        {"hidden_act": "relu2"},
    ],
)
def test_every_field_of_the_shape_moves_the_hash(change):
    assert layout_hash(replace(TINY, **change)) != layout_hash(TINY)


def test_a_shape_survives_json():
    body = msgspec.json.decode(msgspec.json.encode(shape_to_json(TINY)))

    assert shape_from_json(body) == TINY
    assert layout_hash(shape_from_json(body)) == layout_hash(TINY)


@pytest.mark.parametrize("body", [{}, {"hidden_size": 256}, {"colour": "blue"}])
def test_json_that_is_no_shape_is_refused(body):
    with pytest.raises(ValueError, match="model must be a model shape, got"):
        shape_from_json(body)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"num_layers": 2.0}, "num_layers must be a positive integer, got 2.0"),
        ({"hidden_size": 100, "num_heads": 3}, r"multiple of 2 \* num_heads, got 100"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads, got 4 with num_kv_heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu or relu2, got 'gelu'"),
    ],
)
def test_a_shape_that_does_not_fit_together_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UnknownPresetError, match="got 'smal', did you mean 'small'"):
        preset_shape("smal")


def test_a_preset_takes_the_vocabulary_of_the_corpus():
    shape = preset_shape("small", vocab_size=300)

    assert shape.vocab_size == 300
    assert shape.num_layers == PRESETS["small"].num_layers
    assert isinstance(shape, ModelShape)
