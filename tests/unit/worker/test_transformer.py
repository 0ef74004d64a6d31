"""The whole model against its plain twin, forward and backward."""

from __future__ import annotations

import pytest
import torch

from bitnet_ext.layout import segments
from tests.unit.worker.shapes import (
    GROUPED,
    SMALL,
    loaded_model,
    plain_logits,
    plain_loss,
    plain_parameters,
    seeded_weights,
)
from worker.model import head, transformer
from worker.model.transformer import NO_TARGET, BitNetModel


def ids_of(shape, num_sequences: int = 4) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    size = (num_sequences, shape.seq_len)
    return torch.randint(shape.vocab_size, size, generator=random)


@pytest.mark.parametrize("shape", [SMALL, GROUPED])
def test_logits_are_those_of_the_plain_twin(shape) -> None:
    model, ids = loaded_model(shape), ids_of(shape)

    logits = model.logits(model(ids))

    expected = plain_logits(shape, plain_parameters(shape, seeded_weights(shape)), ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [SMALL, GROUPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_every_gradient_is_close_to_that_of_the_plain_twin(
    shape, dtype, monkeypatch
) -> None:
    monkeypatch.setattr(transformer, "head_dtype", lambda: dtype)
    model, ids = loaded_model(shape), ids_of(shape)
    targets = ids.roll(-1, dims=1)
    targets[0, 3:6] = NO_TARGET

    loss = model.loss(ids, targets)
    loss.backward()

    params = plain_parameters(shape, seeded_weights(shape))
    expected = plain_loss(shape, params, ids, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    grads = {name: value.grad for name, value in model.named_parameters()}
    for segment in segments(shape):
        wanted = params[segment.name].grad
        error = (grads[segment.name] - wanted).norm() / wanted.norm()
        assert error < 0.03, segment.name
    whole = torch.cat([params[s.name].grad.flatten() for s in segments(shape)])
    # Most of it are activations that the twin rounds to the other side.
    assert (model.flat.grads - whole).norm() / whole.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_number_of_threads_changes_no_bit_of_the_gradient(
    dtype, monkeypatch
) -> None:
    monkeypatch.setattr(transformer, "head_dtype", lambda: dtype)
    found = []
    for threads in (1, 3):
        model = BitNetModel(SMALL, threads=threads)
        model.flat.load(seeded_weights(SMALL))
        ids = ids_of(SMALL, 32)
        model.loss(ids, ids.roll(-1, dims=1)).backward()
        found.append(model.flat.grads)

    assert torch.equal(*found)


def test_chunks_of_the_head_add_up_to_the_whole(monkeypatch) -> None:
    monkeypatch.setattr(transformer, "head_dtype", lambda: torch.float32)
    found = []
    for num_tokens in (512, 20):
        monkeypatch.setattr(head, "CHUNK_TOKENS", num_tokens)
        model, ids = loaded_model(), ids_of(SMALL)
        loss = model.loss(ids, ids.roll(-1, dims=1))
        loss.backward()
        found.append((loss.detach(), model.flat.grads))

    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


def test_a_second_backward_through_one_loss_is_refused() -> None:
    model, ids = loaded_model(), ids_of(SMALL)
    loss = model.loss(ids, ids.roll(-1, dims=1))
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="written over"):
        loss.backward()


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, ids = loaded_model(), ids_of(SMALL)
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % SMALL.vocab_size

    before, after = model(ids), model(changed)

    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_the_position_of_a_token_matters() -> None:
    model = loaded_model()

    hidden = model(torch.tensor([[3, 5, 7], [5, 3, 7]]))

    assert not torch.allclose(hidden[0, 2], hidden[1, 2], atol=1e-3)


def test_padding_behind_a_sequence_changes_neither_loss_nor_gradient() -> None:
    model, ids = loaded_model(), ids_of(SMALL, 1)[:, :9]
    short = model.loss(ids[:, :8], ids[:, 1:])
    short.backward()
    grads = model.flat.grads.clone()
    model.flat.grads.zero_()

    padded = torch.zeros(1, 16, dtype=torch.int64)
    targets = torch.full((1, 16), NO_TARGET)
    padded[:, :8], targets[:, :8] = ids[:, :8], ids[:, 1:]
    loss = model.loss(padded, targets)
    loss.backward()

    assert loss.item() == pytest.approx(short.item(), rel=1e-4)
    torch.testing.assert_close(model.flat.grads, grads, rtol=1e-3, atol=1e-5)


def test_a_batch_without_any_target_costs_nothing_and_teaches_nothing() -> None:
    model = loaded_model()

    loss = model.loss(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[NO_TARGET]]))
    loss.backward()

    assert loss.item() == 0.0
    assert not model.flat.grads.any()


def test_zero_gains_of_a_block_leave_the_residual_stream_alone() -> None:
    model = BitNetModel(SMALL)
    model.flat.load(seeded_weights(SMALL))
    with torch.no_grad():
        for layer in model.layers:
            layer.attn_sub_norm.zero_()
            layer.ffn_sub_norm.zero_()
    ids = ids_of(SMALL)

    embedded = model.embeddings[ids]
    expected = torch.nn.functional.rms_norm(embedded, (64,), model.final_norm, 1e-5)

    torch.testing.assert_close(model(ids), expected)
