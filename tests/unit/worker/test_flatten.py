"""Parameters and gradients as views of one flat vector."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitnet_ext.layout import PRESETS, num_params, segments
from tests.unit.worker.shapes import GROUPED, SMALL, loaded_model, seeded_weights
from worker.model.flatten import check_layout
from worker.model.transformer import BitNetModel


@pytest.mark.parametrize("shape", [*PRESETS.values(), GROUPED])
def test_parameters_agree_with_the_layout_by_name_order_and_shape(shape) -> None:
    model = BitNetModel(shape)

    found = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert found == {segment.name: segment.shape for segment in segments(shape)}
    assert [tuple(p.shape) for p in model.flat.parameters] == [
        segment.shape for segment in segments(shape)
    ]


def test_a_model_of_another_shape_is_refused_by_the_name_of_a_parameter() -> None:
    model = BitNetModel(SMALL)

    with pytest.raises(ValueError, match=r"'layers\.0\.down' must have shape"):
        check_layout(model, replace(SMALL, intermediate_size=256))
    with pytest.raises(ValueError, match=r"'layers\.2\.attn_norm'"):
        check_layout(model, replace(SMALL, num_layers=3))


def test_every_number_of_the_flat_vector_is_where_the_layout_says() -> None:
    model = BitNetModel(SMALL)
    model.flat.load(np.arange(num_params(SMALL), dtype=np.float32))

    parameters = dict(model.named_parameters())
    for segment in segments(SMALL):
        values = parameters[segment.name].detach().flatten()
        expected = torch.arange(segment.offset, segment.offset + segment.size).float()
        assert torch.equal(values, expected)


def test_a_change_of_either_side_is_seen_on_the_other() -> None:
    model = loaded_model()
    norm = segments(SMALL)[1]

    with torch.no_grad():
        model.layers[0].attn_norm.fill_(3.0)
    assert (model.flat.values[norm.offset : norm.offset + norm.size] == 3.0).all()

    model.flat.values.zero_()
    assert not model.layers[0].attn_norm.any()


def test_gradients_arrive_in_the_flat_vector_and_add_up() -> None:
    model = loaded_model()
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(1))

    model.loss(ids, ids).backward()
    once = model.flat.grads.clone()
    model.loss(ids, ids).backward()

    assert all(
        once[segment.offset : segment.offset + segment.size].any()
        for segment in segments(SMALL)
    )
    torch.testing.assert_close(model.flat.grads, 2 * once)


def test_loading_copies_and_makes_ternary_weights_anew() -> None:
    model = loaded_model()
    ids = torch.arange(8).unsqueeze(0)
    first = model(ids)
    weights = seeded_weights(SMALL, seed=1)
    before = weights.copy()

    model.flat.load(weights)

    assert not torch.equal(model(ids), first)
    model.flat.values.zero_()
    assert np.array_equal(weights, before)


@pytest.mark.parametrize("bad", [np.zeros(5, np.float32), np.zeros(5, np.float64)])
def test_a_vector_of_another_length_or_type_is_refused(bad) -> None:
    with pytest.raises(ValueError, match=f"weights must be float32.*got {bad.dtype}"):
        BitNetModel(SMALL).flat.load(bad)
