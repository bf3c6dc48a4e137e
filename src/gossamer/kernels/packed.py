"""Attention of several sequences that lie one after another in one row, each for itself; and rotary positions.

    o_t = sum over s of  softmax_s(scale * q_t . k_s) v_s     s: t, and before it its sequence and prefix

torch's own attention runs on sequences of about the same length side by side. They are padded on the right, where a
causal mask hides the padding from every real token, so no mask is needed and nothing changes but for rounding.

Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; Su et al. 2021, arXiv:2104.09864, equation 34.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch gives no types for what autograd functions and its linear algebra return)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.kernels import elementwise

WASTE = 1.25
"""How much longer than the shortest a sequence may be that stands beside it in one call."""

NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""What a transformers model is given as a mask for a packed row, so that it makes none of N x N."""


class Segment(NamedTuple):
    """One sequence in a row: its tokens `start..stop`, which continue the `prefix` tokens from `origin` on."""

    start: int
    stop: int
    prefix: int = 0
    origin: int = 0

    @property
    def length(self) -> int:
        """Tokens, prefix included."""
        return self.prefix + self.stop - self.start


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row are, and how they are laid side by side for attention.

    Attributes:
        segments: cover the row's N tokens once each.
        buckets: (sequences, tokens) indices into the row, one tensor a call; a sequence is padded with its last token.
        back: (N,), where each token's result is in the results of all buckets, one after the other.
        longest: tokens of the longest sequence, prefix included.
    """

    segments: tuple[Segment, ...]
    buckets: tuple[Tensor, ...]
    back: Tensor
    longest: int

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Packing:
        """Sequences of about one length together; the result is on the CPU."""
        waiting: list[list[Segment]] = []
        for segment in sorted(segments, key=lambda one: one.length):
            if not waiting or segment.length > WASTE * waiting[-1][0].length:
                waiting.append([])
            waiting[-1].append(segment)
        back = torch.empty(max(segment.stop for segment in segments), dtype=torch.int64)
        buckets, offset = [], 0
        for members in waiting:
            longest = members[-1].length
            index = torch.empty(len(members), longest, dtype=torch.int64)
            for row, (start, stop, prefix, origin) in zip(index, members, strict=True):
                row[:prefix] = torch.arange(origin, origin + prefix)
                row[prefix : prefix + stop - start] = torch.arange(start, stop)
                row[prefix + stop - start :] = stop - 1  # of its own: not even a NaN gets from one to another
                back[start:stop] = torch.arange(offset + prefix, offset + prefix + stop - start)
                offset += longest
            buckets.append(index)
        return cls(tuple(segments), tuple(buckets), back, max(one.length for one in segments))

    @cached_property
    def aligned(self) -> bool:
        """Whether the row is its sequences side by side already: all of one length, and nothing shared."""
        return len(self.buckets) == 1 and torch.equal(
            self.buckets[0].flatten(), torch.arange(len(self.back)).to(self.back)
        )

    @classmethod
    def joined(cls, packings: Sequence[Packing]) -> Packing:
        """Packed rows put one after another, as one row."""
        segments: list[Segment] = []
        for packing in packings:
            first = max((segment.stop for segment in segments), default=0)
            segments += [
                Segment(first + one.start, first + one.stop, one.prefix, first + one.origin) for one in packing.segments
            ]
        return cls.of(segments)

    def to(self, device: torch.device | str) -> Packing:
        """The same on another device."""
        return replace(self, buckets=tuple(one.to(device) for one in self.buckets), back=self.back.to(device))


def attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None = None, window: int | None = None
) -> Tensor:
    """Causal attention of each sequence of a packed row with itself and its prefix.

    Args:
        query: (N, H, d); key, value: (N, G, d), each of the G heads serving H / G heads of queries.
        scaling: of the scores; 1 / sqrt(d) when None.
        window: how many tokens back a token sees, itself included; None sees all.

    Returns:
        (N, H, d).
    """
    outs = [_beside(query, key, value, packing, index, scaling, window) for index in packing.buckets]
    return outs[0] if packing.aligned else torch.cat(outs).index_select(0, packing.back)


def _beside(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    index: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One bucket, (sequences * tokens, H, d)."""
    rows, tokens = index.shape

    def laid(tensor: Tensor) -> Tensor:
        there = tensor if packing.aligned else tensor.index_select(0, index.flatten())
        return there.unflatten(0, (rows, tokens)).transpose(1, 2)

    options: Any = {"is_causal": True}
    if window is not None and window < tokens:
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        options = {"attn_mask": seen & ~seen.tril(-window)}
    out = nn.functional.scaled_dot_product_attention(
        laid(query), laid(key), laid(value), scale=scaling, enable_gqa=query.shape[1] != key.shape[1], **options
    )
    return out.transpose(1, 2).flatten(0, 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x cos + half_turned(x) sin`, half_turned((a, b)) = (-b, a): keeps cos and sin alone, makes no halves.

    Args:
        x: (..., d). cos, sin: broadcast against it.
    """
    return _Rotated.apply(x, cos, sin)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return elementwise.turned(x, cos, sin, -1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        swapped = torch.cat([*reversed(sin.chunk(2, -1))], -1)  # each half of the result came from the other one
        return elementwise.turned(slopes[0], cos, swapped, 1), None, None
