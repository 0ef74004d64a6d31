"""Hugging Face `transformers` loads every layout, and its logits are ours.

Both round activations to int8, but what they round differs in the last bits of a float,
because sums before it are taken in another order. So now and then a number between two
neighbours goes to the other one, and every later logit moves by about a hundredth.
Here each such number is shown to lie on the edge between the two, our forward pass
takes the neighbour that theirs took, and then all logits must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bitnet_ext import fused, infer
from bitnet_ext.exports.parts import master_parts, ternary_parts
from bitnet_ext.exports.provenance import VARIANTS, Format, Variant
from bitnet_ext.infer import TernaryMatrix
from bitnet_ext.layout import ModelShape
from bitnet_ext.ternary import QuantisedRows
from tests.exported import SHAPES, Finished, fresh, shape_of, text, tokenizer, trained

#: How far from the edge between two neighbours a number may be that is rounded to the
#: other one: of int8 values, and of ternary ones.
EDGE = 1e-3
LAYOUTS = VARIANTS[Format.HF]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Compute on one thread: threads that wait for a busy core spin for seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def hub() -> Iterator[SimpleNamespace]:
    """What is used of the package, kept from the network and from compiling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.integrations.bitnet import WeightQuant
        from transformers.utils import logging

        logging.disable_progress_bar()
        yield SimpleNamespace(
            model=AutoModelForCausalLM.from_pretrained,
            tokenizer=AutoTokenizer.from_pretrained,
            quantise=WeightQuant.apply,
        )


class Theirs:
    """A model that `transformers` loaded; keeps what its linear layers were given."""

    def __init__(self, hub: SimpleNamespace, folder: Path) -> None:
        self.model = hub.model(folder)
        self.inputs: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            attention, wide = layer.self_attn, layer.mlp
            # k and v read what q reads, up what gate reads.
            for linear in (
                attention.q_proj,
                attention.o_proj,
                wide.gate_proj,
                wide.down_proj,
            ):
                linear.register_forward_pre_hook(self._keep)

    def _keep(self, _module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.inputs.append(args[0][0])

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.inputs.clear()
        with torch.no_grad():
            return self.model(torch.from_numpy(ids)[None]).logits[0].numpy()

    def rows(self) -> Iterator[NDArray[np.int8]]:
        """Yield the int8 rows of each product, by the formula of `transformers`."""
        for x in self.inputs:
            scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            yield (x * scale).round().clamp(-128, 127).to(torch.int8).numpy()


class _RoundedAlike(infer._Own):
    """Our numerics, but for numbers on an edge, which go where theirs went."""

    def __init__(self, rows: Iterator[NDArray[np.int8]]) -> None:
        super().__init__(threads=1)
        self._theirs = rows
        self.num_rows, self.num_other = 0, 0

    def rows(self, x: Any, gain_K: Any, eps: float) -> QuantisedRows:
        own = super().rows(x, gain_K, eps)
        opened = x.x if x.up is None else infer._activated(x.x, x.gate) * x.up
        exact = fused.norm(opened, gain_K, eps)[0] / own.scale
        theirs = next(self._theirs)
        assert np.abs(exact - theirs).max() <= 0.5 + EDGE
        self.num_rows += theirs.size
        self.num_other += int((theirs != own.q).sum())
        return QuantisedRows(np.ascontiguousarray(theirs), own.scale, own.group)


def weights_as_theirs(hub: SimpleNamespace, model: Finished, variant: Variant) -> Any:
    """Return our ternary parts; of `master`, weights on an edge go where theirs go."""
    parts = ternary_parts(model.shape, model.flat)
    if variant is not Variant.MASTER:
        return parts
    masters = master_parts(model.shape, model.flat)
    for name, part in parts.items():
        if isinstance(part, TernaryMatrix):
            weight = torch.from_numpy(masters[name].copy())
            values = (hub.quantise(weight) / part.scale).round().to(torch.int8).numpy()
            exact = np.clip(masters[name] / part.scale, -1, 1)
            assert np.abs(exact - values).max() <= 0.5 + EDGE
            parts[name] = TernaryMatrix(values, part.scale)
    return parts


def some_ids(shape: ModelShape) -> NDArray[np.int64]:
    return np.random.default_rng(5).integers(0, shape.vocab_size, shape.seq_len)


MODELS = {
    **{name: lambda shape=shape: fresh(shape) for name, shape in SHAPES.items()},
    "squared relu": lambda: fresh(shape_of("tiny", hidden_act="relu2")),
    "trained": trained,
}


@pytest.mark.parametrize("variant", LAYOUTS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_transformers_gives_our_logits(hub, tmp_path, make, variant) -> None:
    model = make()
    model.write(tmp_path / "out", Format.HF, variant)
    ids = some_ids(model.shape)
    ours = infer.Model.from_parts(model.shape, weights_as_theirs(hub, model, variant))
    reader = Theirs(hub, tmp_path / "out")

    theirs = reader.logits(ids)

    rules = _RoundedAlike(reader.rows())
    alike = rules.logits(ours._hidden(ids, rules), ours.embeddings)
    apart = np.abs(theirs - alike).max()
    plain = np.abs(theirs - ours.logits(ids)).max()
    print(
        f"{variant}: {apart:.1e} apart; {rules.num_other} of {rules.num_rows} numbers "
        f"rounded to the other neighbour, {plain:.1e} apart with our own"
    )
    assert apart <= 1e-4
    assert rules.num_other < 1e-4 * rules.num_rows
    assert plain < 0.1 * np.abs(theirs).max()


@pytest.mark.parametrize("variant", LAYOUTS)
def test_transformers_reads_the_tokenizer_and_writes_on(hub, tmp_path, variant) -> None:
    trained().write(tmp_path / "out", Format.HF, variant)
    words = hub.tokenizer(tmp_path / "out")
    prompt = " ".join(text().split()[:5])

    ids = words(words.bos_token + prompt, return_tensors="pt").input_ids
    said = hub.model(tmp_path / "out").generate(ids, max_new_tokens=5, do_sample=False)

    assert ids[0].tolist() == [tokenizer().eot_id, *tokenizer().encode(prompt)]
    assert words.decode(said[0], skip_special_tokens=True).startswith(prompt)
    assert said.shape[1] == ids.shape[1] + 5
