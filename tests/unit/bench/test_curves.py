"""The contenders of the loss curves differ in what their names say, and no more."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from tests.bench.curves import (
    CONTENDERS,
    LAST,
    OURS,
    PLAIN,
    Curve,
    Text,
    differences,
    parting,
    run,
)
from tests.bench.gradients import relative_error
from tests.bench.peers.plain import BitLinear
from tests.bench.plot import write_plot
from tests.bench.rounding import Int8Dw, Int8Dx
from tests.unit.worker.shapes import SMALL


def a_text() -> Text:
    """Return a text with something to learn: numbers that go up and around."""
    tokens = np.arange(2000, dtype=np.int64) * 3 % SMALL.vocab_size
    return Text(SMALL.vocab_size, tokens, tokens[:300])


def gradients(kind: type[BitLinear]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the input and of the weight of one layer."""
    torch.manual_seed(0)
    layer, x = kind(48, 320, bias=False), torch.randn(2, 100, 48, requires_grad=True)
    layer(x).backward(torch.randn(2, 100, 320))
    return x.grad, layer.weight.grad


@pytest.mark.parametrize(("kind", "rounded"), [(Int8Dx, 0), (Int8Dw, 1)])
def test_one_gradient_is_rounded_a_little_and_the_other_not(kind, rounded) -> None:
    exact, found = gradients(BitLinear), gradients(kind)

    errors = [relative_error(*pair) for pair in zip(found, exact, strict=True)]

    assert 1e-3 < errors[rounded] < 2e-2
    assert errors[1 - rounded] < 1e-6


@pytest.mark.parametrize("name", CONTENDERS)
def test_all_learn_from_the_same_start_at_the_same_pace(name) -> None:
    plain, other = (
        run(CONTENDERS[which], SMALL, a_text(), seed=3, num_steps=10, rate=1e-3)
        for which in (PLAIN, name)
    )

    assert plain.losses[-1] < 0.97 * plain.losses[0]
    assert other.losses == pytest.approx(plain.losses, rel=1e-2)
    assert other.held_out == pytest.approx(plain.held_out, rel=1e-2)


def test_another_seed_is_another_start() -> None:
    first, second = (
        run(CONTENDERS[OURS], SMALL, a_text(), seed=seed, num_steps=1, rate=1e-3)
        for seed in (0, 1)
    )

    assert first.losses != second.losses


def test_a_difference_is_of_the_last_steps_and_a_share_of_plain() -> None:
    plain = Curve([9.0] * LAST + [4.0] * LAST, held_out=5.0)
    own = Curve([1.0] * LAST + [4.2] * LAST, held_out=4.5)

    train, held_out = differences([own, plain], [plain, plain])

    assert train == pytest.approx([0.05, 0.0])
    assert held_out == pytest.approx([-0.1, 0.0])


def test_curves_part_by_the_distance_at_a_step() -> None:
    plain, own = Curve([3.0, 2.0], 0.0), Curve([3.0, 1.5], 0.0)

    assert parting([own], [plain], 1) == 0.0
    assert parting([own, plain], [plain, plain], 2) == 0.25


def test_a_plot_has_a_line_for_each_curve_within_the_picture(tmp_path) -> None:
    curves = {"a < b": [(30.0, 6.5), (60.0, 5.0)], "c": [(30.0, 6.4), (60.0, 5.1)]}

    write_plot(tmp_path / "plot.svg", "losses", curves)

    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    lines = [part for part in root.iter() if part.tag.endswith("polyline")]
    names = [part.text for part in root.iter() if part.get("text-anchor") == "end"]
    points = [float(n) for n in lines[0].get("points").replace(",", " ").split()]
    assert len(lines) == len(curves)
    assert set(curves) <= set(names)
    assert points[0] < points[2] <= 720
    assert 0 <= points[1] < points[3] <= 360
