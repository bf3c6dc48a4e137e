"""Steps over a cache of rows: the logits of transformers' own model, whoever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.models import tiny
from gossamer.running.cached import CachedDecoder
from gossamer.running.steps import Chunk, StepInput
from tests.running.test_blocks import FAMILIES, made


def alone(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def run(decoder: CachedDecoder, cache: Any, given: list[tuple[int, int, list[int]]]) -> Tensor:
    """Logits after the last token of each (row, start, ids)."""
    chunks = tuple(Chunk(row, start, len(ids)) for row, start, ids in given)
    tokens = torch.tensor([one for _, _, ids in given for one in ids])
    return decoder(StepInput(tokens, chunks, tuple(range(len(chunks)))), cache)


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "windowed"])
def test_every_token_has_the_logits_of_transformers(family: str, prepack: bool) -> None:
    """Prompts read whole and in chunks, rows continued in any order, one resting: as alone, without a cache."""
    model = made("mistral", sliding_window=5) if family == "windowed" else made(family)
    decoder = CachedDecoder(model, prepack)
    assert bool(decoder.copied) == prepack
    cache = decoder.cache(4)
    texts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26, 27, 28], [31, 32, 33]]
    right = [alone(model, text) for text in texts]
    for step in (
        [(0, 0, 4), (2, 0, 3)],
        [(0, 4, 1), (2, 3, 1), (1, 0, 5)],  # row 1 is read while 0 and 2 go on
        [(2, 4, 1), (0, 5, 1)],  # row 1 rests, and they come in another order
        [(0, 6, 1), (1, 5, 1), (2, 5, 1), (3, 0, 1)],
        [(0, 7, 2), (2, 6, 2), (3, 1, 2)],
    ):
        out = run(decoder, cache, [(row, start, texts[row][start : start + count]) for row, start, count in step])
        known = torch.stack([right[row][start + count - 1] for row, start, count in step])
        torch.testing.assert_close(out, known, rtol=1e-4, atol=1e-5)


def test_a_copied_row_goes_on_as_the_one_it_was_copied_from() -> None:
    model = tiny("llama")
    decoder = CachedDecoder(model)
    cache = decoder.cache(3)
    run(decoder, cache, [(0, 0, [5, 6, 7, 8])])
    cache.copy(0, 2, 3)
    out = run(decoder, cache, [(2, 3, [9, 10])])
    torch.testing.assert_close(out, alone(model, [5, 6, 7, 9, 10])[-1:], rtol=1e-4, atol=1e-5)


def test_what_was_kept_of_a_row_goes_on_in_another() -> None:
    model = tiny("llama")
    decoder = CachedDecoder(model)
    cache, fresh = decoder.cache(3), decoder.cache(2)
    run(decoder, cache, [(0, 0, [5, 6, 7, 8])])
    kept = cache.keep(0, 3)
    assert kept.nbytes == 2 * len(decoder.layers) * 3 * model.model.layers[0].self_attn.k_proj.out_features * 4
    fresh.give(1, kept, 3)
    out = run(decoder, fresh, [(1, 3, [9, 10])])
    torch.testing.assert_close(out, alone(model, [5, 6, 7, 9, 10])[-1:], rtol=1e-4, atol=1e-5)


def test_the_cache_grows_and_keeps_what_it_has() -> None:
    model = tiny("llama")
    decoder = CachedDecoder(model)
    cache = decoder.cache(1)
    text = [one % 250 for one in range(140)]
    run(decoder, cache, [(0, 0, text[:100])])
    before = cache.tokens
    out = run(decoder, cache, [(0, 100, text[100:])])
    assert cache.tokens > before
    torch.testing.assert_close(out, alone(model, text)[-1:], rtol=1e-4, atol=1e-5)


def test_other_models_are_not_taken() -> None:
    assert CachedDecoder.takes(tiny("qwen2"))
    assert not CachedDecoder.takes(tiny("gpt2"))
    assert not CachedDecoder.takes(tiny("mixtral"))
