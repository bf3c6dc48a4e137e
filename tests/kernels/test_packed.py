"""Packed attention: each sequence sees itself and its prefix, and nothing of the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.kernels.packed import WASTE, Packing, Segment, attention, rotated

DOUBLE = torch.float64


def by_hand(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float, window: int | None) -> Tensor:
    """The definition, with a mask written out."""
    outs, times = [], query.shape[1] // key.shape[1]
    for start, stop, prefix, origin in packing.segments:
        keys, values = (
            torch.cat([one[origin : origin + prefix], one[start:stop]]).repeat_interleave(times, 1)
            for one in (key, value)
        )
        place = torch.arange(stop - start).unsqueeze(1) + prefix
        seen = torch.arange(stop - start + prefix) <= place
        if window is not None:
            seen &= torch.arange(stop - start + prefix) > place - window
        scores = torch.einsum("thd,shd->hts", query[start:stop], keys) * scaling
        chances = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hts,shd->thd", chances, values))
    return torch.cat(outs)


def segments_of(lengths: list[int], prefix: int) -> list[Segment]:
    found = [Segment(0, prefix)] if prefix else []
    for length in lengths:
        start = found[-1].stop if found else 0
        found.append(Segment(start, start + length, prefix))
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(0, 4),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([None, 1, 3]),
)
def test_equals_the_definition_and_so_do_its_gradients(
    lengths: list[int], prefix: int, heads: tuple[int, int], window: int | None
) -> None:
    torch.manual_seed(sum(lengths))
    packing = Packing.of(segments_of(lengths, prefix))
    tokens = len(packing.back)
    query, key, value = (
        torch.randn(tokens, n, 4, dtype=DOUBLE, requires_grad=True) for n in (heads[0], *[heads[1]] * 2)
    )
    out = attention(query, key, value, packing, 0.7, window)
    expected = by_hand(query, key, value, packing, 0.7, window)
    torch.testing.assert_close(out, expected)
    slope = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad(out, (query, key, value), slope),
        torch.autograd.grad(expected, (query, key, value), slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20), st.integers(0, 30))
def test_every_token_stands_once_and_little_is_padded(lengths: list[int], prefix: int) -> None:
    packing = Packing.of(segments_of(lengths, prefix))
    laid = torch.cat([index.flatten() for index in packing.buckets])
    assert torch.equal(laid[packing.back], torch.arange(sum(lengths) + prefix))
    assert len(set(packing.back.tolist())) == len(packing.back)
    assert packing.longest == max(lengths) + prefix
    whole = sum(lengths) + prefix * (len(lengths) + bool(prefix))
    assert laid.numel() <= WASTE * whole


def test_two_packings_one_after_the_other_keep_their_own_prefixes() -> None:
    torch.manual_seed(0)
    one, other = (Packing.of(segments_of(lengths, 3)) for lengths in ([4, 6], [5, 2, 2]))
    both = Packing.joined([one, other])
    query, key, value = (torch.randn(13 + 12, 2, 4, dtype=DOUBLE) for _ in range(3))
    parts = [
        attention(query[rows], key[rows], value[rows], packing)
        for rows, packing in ((slice(0, 13), one), (slice(13, None), other))
    ]
    torch.testing.assert_close(attention(query, key, value, both), torch.cat(parts))
    torch.testing.assert_close(by_hand(query, key, value, both, 0.5, None), torch.cat(parts))


def test_what_another_sequence_holds_changes_not_a_bit() -> None:
    torch.manual_seed(0)
    packing = Packing.of(segments_of([5, 6, 5, 6], 0))  # side by side, padded
    assert len(packing.buckets) == 1
    for spoilt in (range(5), range(5, 11)):
        inputs = [torch.randn(22, 2, 4, requires_grad=True) for _ in range(3)]
        spoiled = [one.detach().clone().requires_grad_() for one in inputs]
        for one in spoiled:
            one.data[[*spoilt]] = torch.nan
        kept = [token for token in range(22) if token not in spoilt]
        before, after = attention(*inputs, packing), attention(*spoiled, packing)
        assert torch.equal(before[kept], after[kept])
        assert after[[*spoilt]].isnan().all()
        slopes = (torch.autograd.grad(out.sum(), of) for out, of in ((before, inputs), (after, spoiled)))
        for one, other in zip(*slopes, strict=True):
            assert torch.equal(one[kept], other[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
def test_rotation_is_what_transformers_does(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=dtype)
    angles = torch.rand(2, 5, 4, dtype=dtype).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    out = rotated(x, cos.unsqueeze(2), sin.unsqueeze(2))
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=tolerance, atol=2 * tolerance)


def test_the_gradient_of_a_rotation_whose_halves_differ() -> None:
    torch.manual_seed(0)
    x, cos, sin = (torch.randn(5, 2, 6, dtype=DOUBLE) for _ in range(3))
    assert torch.autograd.gradcheck(lambda one: rotated(one, cos, sin), (x.requires_grad_(),))
