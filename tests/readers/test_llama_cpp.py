"""llama.cpp loads every type of a trained model, and gives our probabilities.

It runs as it is shipped in the package `xllamacpp`, through its own completion server.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xllamacpp
from numpy.typing import NDArray

from bitnet_ext.exports.gguf_file import file_name
from bitnet_ext.exports.provenance import VARIANTS, Format, Variant
from bitnet_ext.infer import Model, Numerics
from tests.exported import text, tokenizer, trained

TYPES = VARIANTS[Format.GGUF]
NUM_PROMPTS = 20
#: Log-probabilities may be so far apart; ours that are farther must stand in order.
#: With F16 llama.cpp does not round activations to int8, which we do: what that moves
#: depends on the weights, and so on the machine that trained them (0.02 and 0.11 seen).
TOLERANCES = dict.fromkeys(TYPES, 0.1) | {Variant.F16: 0.2}
TOP = 5


def prompts() -> list[str]:
    """Return the first words of stretches all over the prose."""
    words = text().split()
    starts = range(0, len(words), len(words) // NUM_PROMPTS)[:NUM_PROMPTS]
    return [" ".join(words[s : s + 4 + s % 9]) for s in starts]


@pytest.fixture(scope="module", params=TYPES)
def served(request, tmp_path_factory) -> tuple[Variant, xllamacpp.Server]:
    """A server of the trained model in each type."""
    variant: Variant = request.param
    folder = tmp_path_factory.mktemp("gguf") / variant
    trained().write(folder, Format.GGUF, variant)
    return variant, serve(folder / file_name(variant))


def serve(path: Path) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = trained().shape.seq_len
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.verbosity = -1
    return xllamacpp.Server(params)


def likeliest(server: xllamacpp.Server, prompt: str) -> dict[int, float]:
    """Return the log-probability of the likeliest next tokens, likeliest first."""
    asked: dict[str, Any] = {
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 2 * TOP,
        "cache_prompt": False,
        "ignore_eos": True,  # for a greedy end of text it gives no probabilities
    }
    answer = server.handle_completions(asked)
    (first,) = answer["choices"][0]["logprobs"]["content"]
    return {top["id"]: top["logprob"] for top in first["top_logprobs"]}


def log_probabilities(model: Model, ids: list[int], numerics: Numerics) -> NDArray[Any]:
    logits = model.logits(ids, numerics=numerics)[-1].astype(np.float64)
    logits[tokenizer().eot_id] = -np.inf  # as `ignore_eos` does
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_llama_cpp_gives_our_probabilities_and_their_order(served) -> None:
    variant, server = served
    model = Model.from_flat(trained().shape, trained().flat)
    # It multiplies weights of F16 with activations that are not int8: ours are then.
    numerics = Numerics.OWN if variant is Variant.F16 else Numerics.LLAMA_CPP
    tolerance = TOLERANCES[variant]
    apart, apart_by_token, num_ordered = 0.0, 0.0, 0

    for prompt in prompts():
        ids = [tokenizer().eot_id, *tokenizer().encode(prompt)]
        theirs = likeliest(server, prompt)
        ours = log_probabilities(model, ids, numerics)
        by_token = log_probabilities(model, ids, Numerics.OWN)

        top = np.argsort(-ours)[:TOP].tolist()
        apart = max(apart, *(abs(theirs[token] - ours[token]) for token in top))
        apart_by_token = max(
            apart_by_token, *(abs(theirs[token] - by_token[token]) for token in top)
        )
        for one, other in pairwise(top):
            if ours[one] - ours[other] > tolerance:
                assert theirs[one] > theirs[other]
                num_ordered += 1

    print(
        f"{variant}: top {TOP} of {NUM_PROMPTS} prompts {apart:.4f} apart; with int8 a "
        f"token {apart_by_token:.4f}; {num_ordered} neighbours in order"
    )
    assert apart <= tolerance
    assert num_ordered >= NUM_PROMPTS


def test_llama_cpp_begins_each_prompt_as_each_text_was_trained(served) -> None:
    _, server = served
    prompt = prompts()[0]

    answer = server.handle_completions({"prompt": prompt, "max_tokens": 1})

    assert answer["usage"]["prompt_tokens"] == 1 + len(tokenizer().encode(prompt))
