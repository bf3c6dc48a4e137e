"""Packed rows: every family that packs gives each sequence exactly what it gives it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.families import FAMILIES
from gossamer.kernels.packed import NO_MASK, Packing, Segment
from gossamer.models import tiny
from gossamer.running.packed import obstacle, packed_attention
from tests.running.test_blocks import made


def model_of(family: str) -> Any:
    model = made(family) if family == "qwen3" else tiny(family)
    assert model.config.model_type == family
    return model.eval()


def packed_logits(model: Any, rows: list[torch.Tensor], prefix: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Logits of each row after the prefix, from one packed row."""
    first = 0 if prefix is None else len(prefix)
    ids, positions = ([prefix] if prefix is not None else []), [torch.arange(first)]
    segments, start = ([Segment(0, first)] if first else []), first
    for row in rows:
        segments.append(Segment(start, start + len(row), first))
        positions.append(torch.arange(first, first + len(row)))
        start += len(row)
    with packed_attention(model):
        out = model(
            input_ids=torch.cat([*ids, *rows])[None],
            position_ids=torch.cat(positions)[None],
            packing=Packing.of(segments),
            attention_mask=NO_MASK,
            use_cache=False,
        )
    return [out.logits[0, segment.start : segment.stop] for segment in (segments[1:] if first else segments)]


@pytest.mark.parametrize("family", sorted(name for name, family in FAMILIES.items() if family.packable))
def test_each_sequence_gets_what_it_gets_alone(family: str) -> None:
    model, draw = model_of(family), torch.Generator().manual_seed(0)
    assert not obstacle(model)
    rows = [torch.randint(1, 250, (length,), generator=draw) for length in (7, 12, 5, 9)]
    prefix = torch.randint(1, 250, (4,), generator=draw)
    before = model.config._attn_implementation
    for row, got in zip(rows, packed_logits(model, rows), strict=True):
        torch.testing.assert_close(got, model(input_ids=row[None]).logits[0], rtol=1e-5, atol=2e-6)
    for row, got in zip(rows, packed_logits(model, rows, prefix), strict=True):
        alone = model(input_ids=torch.cat([prefix, row])[None]).logits[0, 4:]
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=2e-6)
    assert model.config._attn_implementation == before


def test_a_sliding_window_is_kept() -> None:
    model = tiny("mistral", sliding_window=4).eval()
    row = torch.arange(1, 12)
    (got, _) = packed_logits(model, [row, row.flip(0)])
    torch.testing.assert_close(got, model(input_ids=row[None]).logits[0], rtol=1e-5, atol=2e-6)
    wide = tiny("mistral", sliding_window=None).eval()
    assert not torch.allclose(got, wide(input_ids=row[None]).logits[0], atol=1e-3)


def test_other_calls_run_as_ever_while_it_is_open() -> None:
    model = tiny("llama").eval()
    ids, mask = torch.arange(1, 9).repeat(2, 1), torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    before = model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids).logits
    text = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with packed_attention(model):
        after = model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids).logits
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None), text)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_models_that_are_not_proven_say_why() -> None:
    assert "not proven for FalconForCausalLM" in obstacle(tiny("falcon"))
    eager = tiny("llama")
    eager.set_attn_implementation("eager")
    assert "eager" in obstacle(eager)
    dropping = tiny("llama", attention_dropout=0.1)
    assert "drops out" in obstacle(dropping)
    prefixed = tiny("llama")
    gs.attach(prefixed, gs.PrefixTuning(num_virtual_tokens=2))
    assert "virtual tokens" in obstacle(prefixed)
