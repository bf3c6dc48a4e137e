"""Where the tokens of a step stand in a cache of rows, and attention of each over what its own row holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.kernels.packed import Packing, Segment, attention
from gossamer.running.steps import Chunk, StepInput


class RowAttention:
    """Attention of a step's tokens, the same for all layers: where each token stands, and what it may look at.

    Sequences that are continued by one token look at the cache together, as many rows of it as there are up to the
    last of theirs; a row between them that is not continued takes part for nothing. Prompts that are begun stand side
    by side where they are of about one length; each later chunk of one looks by itself.

    Attributes:
        rows, positions: (N,) of each token, in the cache and in its sequence.
        last: tokens after which logits are wanted.
        count: tokens that continue a sequence; they come first.
        longest: tokens of the cache that these look at.
        own: their rows; None where these are rows 0, 1, 2, ...
        cos, sin: (N, 1, d), from `set_angles` on.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rows: Tensor, positions: Tensor, last: Tensor, count: int, longest: int) -> None:
        self.rows, self.positions, self.last, self.count, self.longest = rows, positions, last, count, longest
        self.own: Tensor | None = None
        self.seen_to = positions[:count]
        """Of each row of the cache that takes part, the last place that it looks at."""
        self.every = torch.arange(longest, device=rows.device)
        self.masks: dict[int | None, Tensor] = {}
        self.later: list[tuple[Chunk, slice]] = []
        self.packing: Packing | None = None
        self.fresh: slice | Tensor = slice(0, 0)
        self.angles_set = False

    @classmethod
    def of(cls, step: StepInput, device: torch.device) -> RowAttention:
        """Attention of a step."""
        ends = [*itertools.accumulate(chunk.length for chunk in step.chunks)]
        places = [(chunk.row, chunk.start + place) for chunk in step.chunks for place in range(chunk.length)]
        rows, positions = torch.tensor(places, device=device).T
        last = torch.tensor([ends[number] - 1 for number in step.wanted], dtype=torch.int64, device=device)
        alone = [chunk for chunk in step.chunks if chunk.continues]
        found = cls(rows, positions, last, len(alone), max((chunk.end for chunk in alone), default=0))
        if any(chunk.row != row for row, chunk in enumerate(alone)):
            found.own = rows[: found.count]
            # a row that is not continued sees one token
            found.seen_to = rows.new_zeros(max(chunk.row for chunk in alone) + 1)
            found.seen_to[found.own] = positions[: found.count]
        read = [(chunk, slice(end - chunk.length, end)) for chunk, end in zip(step.chunks, ends, strict=True)]
        found.later = [(chunk, tokens) for chunk, tokens in read[found.count :] if chunk.start]
        found._lay_fresh([tokens for chunk, tokens in read[found.count :] if not chunk.start])
        return found

    def _lay_fresh(self, slices: Sequence[slice]) -> None:
        """Prompts that are read from their first token on, which have nothing in the cache to look at."""
        if slices:
            lengths = [one.stop - one.start for one in slices]
            ends = itertools.accumulate(lengths)
            segments = [Segment(end - length, end) for length, end in zip(lengths, ends, strict=True)]
            self.packing = Packing.of(segments).to(self.rows.device)
            self.fresh = slice(slices[0].start, slices[-1].stop)
            if self.later:
                self.fresh = torch.cat([torch.arange(one.start, one.stop, device=self.rows.device) for one in slices])

    def set_angles(self, rotary: Any, like: Tensor) -> None:
        """Rotary angles of every token in the dtype of `like`; set again, they stay in the same memory."""
        cos, sin = (one[0].unsqueeze(1) for one in rotary(like, self.positions.unsqueeze(0)))
        if self.angles_set:
            self.cos.copy_(cos)
            self.sin.copy_(sin)
        else:
            self.cos, self.sin, self.angles_set = cos, sin, True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pair: tuple[Tensor, Tensor], scaling: float, window: int | None
    ) -> Tensor:
        """(N, H, d) of each token with what is in the cache of its own row, k and v (N, G, d) among it."""
        out = torch.empty_like(q)
        if self.count:
            out[: self.count] = self._continued(q[: self.count], pair, scaling, window)
        if self.packing is not None:
            at = self.fresh
            out[at] = attention(q[at], k[at], v[at], self.packing, scaling, window)
        for chunk, tokens in self.later:
            out[tokens] = _later(q[tokens], pair, chunk, scaling, window)
        return out

    def _continued(self, q: Tensor, pair: tuple[Tensor, Tensor], scaling: float, window: int | None) -> Tensor:
        """One query a row, (rows, H, d); heads that share keys are as so many queries of one head."""
        laid, extent = q, len(self.seen_to)
        if self.own is not None:
            laid = q.new_zeros(extent, *q.shape[1:])
            laid[self.own] = q
        keys, values = (one[:extent, :, : self.longest] for one in pair)
        grouped = laid.view(extent, keys.shape[1], -1, q.shape[2])
        out = _sdpa(grouped, keys, values, scaling, attn_mask=self._mask(window)).reshape(laid.shape)
        return out if self.own is None else out[self.own]

    def _mask(self, window: int | None) -> Tensor:
        if window not in self.masks:
            seen = self.every <= self.seen_to[:, None]
            if window is not None:
                seen &= self.every > self.seen_to[:, None] - window
            # as numbers, which attention would else make of it in every layer
            self.masks[window] = self.cos.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None, None]
        return self.masks[window]


def _later(q: Tensor, pair: tuple[Tensor, Tensor], chunk: Chunk, scaling: float, window: int | None) -> Tensor:
    """A later chunk of a prompt, (tokens, H, d)."""
    keys, values = (one[chunk.row : chunk.row + 1, :, : chunk.end] for one in pair)
    every = torch.arange(chunk.end, device=q.device)
    own = every[chunk.start :, None]
    mask = every <= own
    if window is not None:
        mask &= every > own - window
    query = q.transpose(0, 1).unsqueeze(0)
    out = _sdpa(query, keys, values, scaling, attn_mask=mask, enable_gqa=keys.shape[1] != q.shape[1])
    return out[0].transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float, **options: Any) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling, **options)
