"""Ternary linear layers against plain fp32 fake-quantisation."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import increment_version

from tests.unit.worker.shapes import plain_linear
from worker.model.bitlinear import BitLinear


def leaves(*sizes: tuple[int, ...], scale: float = 1.0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, generator=random) * scale).requires_grad_() for size in sizes
    ]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("lead", "num_in", "num_out"),
    [((2, 5), 64, 48), ((7,), 300, 33), ((1,), 256, 256), ((3, 4), 13, 5)],
)
def test_the_output_is_that_of_fake_quantisation(lead, num_in, num_out) -> None:
    x, weight = leaves((*lead, num_in), (num_out, num_in))

    (y,) = BitLinear()(x, weight)

    assert y.shape == (*lead, num_out)
    torch.testing.assert_close(y, plain_linear(x, weight), rtol=1e-5, atol=1e-4)


def test_gradients_are_close_to_those_of_fake_quantisation() -> None:
    x, weight, dy = leaves((512, 256), (320, 256), (512, 320))

    (y,) = BitLinear()(x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), dy.detach())

    expected = torch.autograd.grad(plain_linear(x, weight), (x, weight), dy.detach())
    assert relative_error(dx, expected[0]) < 0.01
    assert relative_error(dw, expected[1]) < 0.012


def test_the_precise_mode_takes_the_gradient_of_weights_in_fp32() -> None:
    x, weight, dy = leaves((512, 256), (320, 256), (512, 320))

    (y,) = BitLinear(precise=True)(x, weight)
    (dw,) = torch.autograd.grad(y, weight, dy.detach())

    (expected,) = torch.autograd.grad(plain_linear(x, weight), weight, dy.detach())
    torch.testing.assert_close(dw, expected, rtol=1e-4, atol=1e-3)


def test_gradients_are_added_where_the_parameter_keeps_them() -> None:
    x, weight = leaves((40, 64), (48, 64))
    (y,) = BitLinear()(x, weight)
    (expected,) = torch.autograd.grad(y.square().sum(), weight)
    kept = torch.ones_like(weight)
    weight.grad = kept

    (y,) = BitLinear(adds_to_grad=True)(x, weight)
    y.square().sum().backward()

    assert weight.grad is kept
    torch.testing.assert_close(kept, expected + 1)


def test_without_a_place_for_it_autograd_keeps_the_gradient() -> None:
    x, weight = leaves((40, 64), (48, 64))

    (y,) = BitLinear(adds_to_grad=True)(x, weight)
    y.square().sum().backward()

    assert weight.grad is not None
    assert weight.grad.any()


def test_a_large_gradient_rounds_only_its_own_group_of_columns() -> None:
    x, weight, dy = leaves((64, 64), (512, 64), (64, 512))
    dy = dy.detach()
    dy[:, 0] = 100.0
    # What the second group of columns alone sends back must survive.
    dy[:, 1:256] = 0.0

    (y,) = BitLinear()(x, weight)
    (dx,) = torch.autograd.grad(y, x, dy)

    (expected,) = torch.autograd.grad(plain_linear(x, weight), x, dy)
    dy[:, 256:] = 0.0
    (first_group,) = torch.autograd.grad(plain_linear(x, weight), x, dy)
    assert relative_error(dx - first_group, expected - first_group) < 0.02


def test_weights_that_share_an_input_give_what_they_give_alone() -> None:
    x, wide, narrow = leaves((6, 64), (96, 64), (32, 64))

    together = BitLinear()(x, wide, narrow)
    alone = BitLinear()(x, wide)[0], BitLinear()(x, narrow)[0]

    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    grads = torch.autograd.grad(together[0].sum() + together[1].sum(), (x, narrow))
    dx_wide, dx_narrow = (torch.autograd.grad(y.sum(), x)[0] for y in alone)
    torch.testing.assert_close(grads[0], dx_wide + dx_narrow)
    assert grads[1].shape == narrow.shape


def test_the_ternary_form_is_made_once_until_a_weight_changes() -> None:
    x, weight = leaves((4, 32), (16, 32))
    layer = BitLinear()

    first = layer.quantised((weight,))
    layer(x, weight)
    assert layer.quantised((weight,)) is first

    with torch.no_grad():
        weight.mul_(2.0)
    assert layer.quantised((weight,))[0].forward.scale == pytest.approx(
        2 * first[0].forward.scale
    )

    second = layer.quantised((weight,))
    increment_version(weight)
    assert layer.quantised((weight,)) is not second


def test_latent_weights_and_inputs_are_left_as_they_were() -> None:
    x, weight = leaves((8, 64), (32, 64))
    before = x.detach().clone(), weight.detach().clone()

    (y,) = BitLinear()(x, weight)
    y.square().sum().backward()

    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


def test_the_number_of_threads_changes_no_bit() -> None:
    x, weight = leaves((64, 256), (512, 256))

    results = []
    for threads in (1, 2):
        (y,) = BitLinear(threads=threads)(x, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))

    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
