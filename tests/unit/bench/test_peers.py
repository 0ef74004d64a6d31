"""The peers train the same model as we do, and their recipes change only the speed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from bitnet_ext.layout import SegmentKind, segments
from tests.bench import ours
from tests.bench.gradients import reference, relative_error
from tests.bench.peers.cached import CachedTransformer
from tests.bench.peers.dense import dense_transformer
from tests.bench.peers.head import CHUNK_ROWS, chunked_cross_entropy
from tests.bench.peers.plain import Transformer
from tests.bench.peers.recipes import DENSE, PLAIN, STRONGEST, Trainer, load
from tests.unit.worker.shapes import GROUPED, SMALL, seeded_weights

GROUPED_SILU = replace(GROUPED, hidden_act="silu")
EAGER = [recipe for recipe in (PLAIN, DENSE, *STRONGEST) if not recipe.compiled]


def a_batch(shape=SMALL, num_sequences=4):
    chance = torch.Generator().manual_seed(0)
    size = (num_sequences, shape.seq_len)
    return [torch.randint(0, shape.vocab_size, size, generator=chance) for _ in "xy"]


def flat_weights(shape=SMALL):
    return torch.from_numpy(seeded_weights(shape))


def a_trainer(recipe, micro_batch=4):
    return Trainer(SMALL, recipe, flat_weights(), micro_batch=micro_batch)


@pytest.mark.parametrize("shape", [SMALL, GROUPED_SILU], ids=["heads", "grouped"])
def test_the_plain_peer_and_ours_have_the_same_loss_from_the_same_weights(shape):
    ids, targets = a_batch(shape)
    peer = Transformer(shape)
    load(peer, flat_weights(shape))
    own = ours.OurTrainer(shape, seeded_weights(shape)).model

    difference = peer.loss(ids, targets) - own.loss(ids, targets)

    assert abs(difference.item()) < 2e-3


def test_the_plain_peer_and_ours_learn_at_the_same_pace():
    ids, targets = a_batch()
    peer, own = a_trainer(PLAIN), ours.OurTrainer(SMALL, seeded_weights(SMALL))

    for _ in range(8):
        theirs, mine = peer.step(ids, targets), own.step(ids, targets)

    assert mine < 0.98 * torch.tensor(float(SMALL.vocab_size)).log()
    assert mine == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize("make", [Transformer, dense_transformer])
def test_parameters_come_in_layout_order(make):
    names = [name for name, _ in make(SMALL).named_parameters()]
    sizes = [tuple(parameter.shape) for parameter in make(SMALL).parameters()]

    assert names == [f"{segment.name}.weight" for segment in segments(SMALL)]
    assert sizes == [segment.shape for segment in segments(SMALL)]


def test_the_dense_peer_quantises_nothing():
    ids, targets = a_batch()
    models = [Transformer(SMALL), dense_transformer(SMALL)]
    for model in models:
        load(model, flat_weights())

    plain, dense = (model.loss(ids, targets).item() for model in models)

    assert plain != pytest.approx(dense, rel=1e-3)


@pytest.mark.parametrize("recipe", EAGER, ids=lambda recipe: recipe.name)
def test_a_recipe_changes_the_loss_by_rounding_alone(recipe):
    ids, targets = a_batch()
    exact = replace(PLAIN, quantised=recipe.quantised)
    trainer = a_trainer(recipe)

    first = trainer.step(ids, targets)

    assert first == pytest.approx(a_trainer(exact).step(ids, targets), rel=5e-3)
    assert trainer.step(ids, targets) < first


@pytest.mark.parametrize("recipe", [PLAIN, EAGER[-1]], ids=lambda recipe: recipe.name)
def test_the_micro_batch_does_not_change_the_gradient(recipe):
    ids, targets = a_batch()
    whole, parts = a_trainer(recipe, 4), a_trainer(recipe, 1)

    losses = [trainer.backward(ids, targets) for trainer in (whole, parts)]

    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    pairs = zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    for one, other in pairs:
        assert relative_error(other.grad, one.grad) < 0.03


def test_a_step_that_is_no_multiple_of_the_micro_batch_is_refused():
    ids, targets = a_batch(num_sequences=4)

    with pytest.raises(ValueError, match="multiple of 3 sequences, got 4"):
        a_trainer(PLAIN, 3).step(ids, targets)


def test_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match="weights must hold"):
        load(Transformer(SMALL), torch.zeros(3))


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS, CHUNK_ROWS + 7])
def test_chunked_cross_entropy_is_the_usual_one_but_for_bf16(rows):
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 32, generator=chance, requires_grad=True)
    table = torch.randn(50, 32, generator=chance, requires_grad=True)
    targets = torch.randint(0, 50, (rows,), generator=chance)
    usual = functional.cross_entropy(hidden @ table.T, targets)
    wanted = torch.autograd.grad(usual, (hidden, table))

    loss = chunked_cross_entropy(hidden, table, targets)
    found = torch.autograd.grad(loss, (hidden, table))

    assert loss.item() == pytest.approx(usual.item(), rel=2e-2, abs=1e-2)
    for own, exact in zip(found, wanted, strict=True):
        assert relative_error(own, exact) < 2e-2


def test_the_forced_reference_agrees_with_our_gradients():
    ids, targets = a_batch()
    model = ours.OurTrainer(SMALL, seeded_weights(SMALL)).model

    own, inputs = ours.gradients_and_inputs(model, ids, targets)
    exact = reference(SMALL, model.flat.values, inputs, ids, targets)

    kinds = (SegmentKind.LINEAR, SegmentKind.RESIDUAL)
    assert set(inputs) == {s.name for s in segments(SMALL) if s.kind in kinds}
    assert relative_error(own, exact) < 0.02
    assert relative_error(own, -exact) > 1.0


@pytest.mark.parametrize("shape", [SMALL, GROUPED_SILU], ids=["heads", "grouped"])
def test_the_peer_that_generates_gives_the_logits_of_the_dense_model(shape):
    peer, (ids, _) = CachedTransformer(shape), a_batch(shape, 1)
    load(peer.model, flat_weights(shape))
    with torch.no_grad():
        hidden = peer.model(ids)
        expected = functional.linear(hidden, peer.model.embeddings.weight)[0]

    first, *rest = ids[0, 4:].tolist()
    found = [peer.feed(ids[0, :4].tolist()), peer.feed([first])]
    found += [peer.feed([token]) for token in rest]

    torch.testing.assert_close(torch.stack(found), expected[3:], rtol=0, atol=1e-5)
