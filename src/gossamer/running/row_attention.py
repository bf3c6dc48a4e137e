"""Where the tokens of a step stand in a cache of rows, and attention of each over what its own row holds."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.kernels.packed import Packing, Segment, attention
from gossamer.running.steps import Chunk, StepInput


class AttentionMetadata:
    """Where the tokens of a step stand, and what each may look at: the same for all layers.

    Sequences that are continued by one token look at the cache together, as many rows of it as there are up to the
    last of theirs; a row between them that is not continued now takes part for nothing. Prompts that are begun stand
    side by side where they are of about one length; each later chunk of one looks by itself.
    """

    def __init__(self, step: StepInput, device: torch.device) -> None:
        ends = [*itertools.accumulate(chunk.length for chunk in step.chunks)]
        starts = [end - chunk.length for chunk, end in zip(step.chunks, ends, strict=True)]
        places = [(chunk.row, chunk.start + place) for chunk in step.chunks for place in range(chunk.length)]
        self.rows, self.positions = torch.tensor(places, device=device).T
        self.last = torch.tensor([ends[number] - 1 for number in step.wanted], dtype=torch.int64, device=device)
        alone = [chunk for chunk in step.chunks if chunk.continues]
        self.count = len(alone)
        read = [(chunk, slice(start, end)) for chunk, start, end in zip(step.chunks, starts, ends, strict=True)]
        self.chunks = [(chunk, tokens) for chunk, tokens in read[self.count :] if chunk.start]
        self._lay_fresh([tokens for chunk, tokens in read[self.count :] if not chunk.start], device)
        if not alone:
            return
        self.own = torch.tensor([chunk.row for chunk in alone], device=device)
        self.extent, self.longest = int(self.own.max()) + 1, max(chunk.start for chunk in alone) + 1
        self.whole = self.count == self.extent and all(chunk.row == row for row, chunk in enumerate(alone))
        self.here = torch.zeros(self.extent, dtype=torch.int64, device=device)  # a row that is not continued sees one
        self.here[self.own] = torch.tensor([chunk.start for chunk in alone], device=device)
        self.every = torch.arange(self.longest, device=device)
        self.masks: dict[int | None, Tensor] = {}

    def turn(self, rotary: Any, like: Tensor) -> None:
        """Rotary angles of every token, (N, 1, d), in the dtype of `like`."""
        cos, sin = rotary(like, self.positions.unsqueeze(0))
        self.cos, self.sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)

    def _lay_fresh(self, slices: list[slice], device: torch.device) -> None:
        """Prompts that are read from their first token on, which have nothing in the cache to look at."""
        self.packing = None
        if slices:
            lengths = [one.stop - one.start for one in slices]
            segments = [
                Segment(end - length, end) for length, end in zip(lengths, itertools.accumulate(lengths), strict=True)
            ]
            self.packing = Packing.of(segments).to(device)
            self.fresh: slice | Tensor = slice(slices[0].start, slices[-1].stop)
            if self.chunks:
                self.fresh = torch.cat([torch.arange(one.start, one.stop, device=device) for one in slices])

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
        for chunk, tokens in self.chunks:
            out[tokens] = self._read(q[tokens], pair, chunk, scaling, window)
        return out

    def _continued(self, q: Tensor, pair: tuple[Tensor, Tensor], scaling: float, window: int | None) -> Tensor:
        """One query a row, (rows, H, d); heads that share keys are as so many queries of one head."""
        laid = q
        if not self.whole:
            laid = q.new_zeros(self.extent, *q.shape[1:])
            laid[self.own] = q
        keys, values = (one[: self.extent, :, : self.longest] for one in pair)
        grouped = laid.view(self.extent, keys.shape[1], -1, q.shape[2])
        out = _sdpa(grouped, keys, values, scaling, attn_mask=self._mask(window)).reshape(laid.shape)
        return out if self.whole else out[self.own]

    def _mask(self, window: int | None) -> Tensor:
        if window not in self.masks:
            seen = self.every <= self.here[:, None]
            if window is not None:
                seen &= self.every > self.here[:, None] - window
            # as numbers, which attention would else make of it in every layer
            self.masks[window] = self.cos.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None, None]
        return self.masks[window]

    def _read(self, q: Tensor, pair: tuple[Tensor, Tensor], chunk: Chunk, scaling: float, window: int | None) -> Tensor:
        """A later chunk of a prompt, (tokens, H, d)."""
        end = chunk.start + chunk.length
        keys, values = (one[chunk.row : chunk.row + 1, :, :end] for one in pair)
        every = torch.arange(end, device=q.device)
        own = every[chunk.start :, None]
        mask = every <= own
        if window is not None:
            mask &= every > own - window
        query = q.transpose(0, 1).unsqueeze(0)
        out = _sdpa(query, keys, values, scaling, attn_mask=mask, enable_gqa=keys.shape[1] != q.shape[1])
        return out[0].transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float, **options: Any) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling, **options)


class StaticMetadata(AttentionMetadata):
    """Of a step that continues a fixed number of rows, each by one token, in tensors that stay where they are.

    Args:
        size: rows, those that only fill up the batch among them. longest: tokens that are looked at of each.
    """

    def __init__(self, size: int, longest: int, device: torch.device) -> None:
        self.size = self.count = self.extent = size
        self.longest, self.whole, self.chunks, self.packing = longest, True, [], None
        self.tokens, self.rows, self.positions = torch.zeros(3, size, dtype=torch.int64, device=device)
        self.here, self.every = self.positions, torch.arange(longest, device=device)
        self.last = torch.arange(size, device=device)
        self.masks = {}
        self.angles: list[Tensor] = []

    def place(self, step: StepInput, nobodys: int) -> None:
        """Let it be this step; what only fills up writes to the cache's row that is nobody's."""
        spare = self.size - len(step.chunks)
        rows = [*(chunk.row for chunk in step.chunks), *[nobodys] * spare]
        starts = [*(chunk.start for chunk in step.chunks), *[0] * spare]
        self.tokens[: len(step.tokens)] = step.tokens
        for there, now in ((self.rows, rows), (self.positions, starts)):
            there.copy_(torch.tensor(now))

    def turn(self, rotary: Any, like: Tensor) -> None:
        """As ever, and where it was before."""
        super().turn(rotary, like)
        if not self.angles:
            self.angles = [self.cos.clone(), self.sin.clone()]
        for there, now in zip(self.angles, (self.cos, self.sin), strict=True):
            there.copy_(now)
        self.cos, self.sin = self.angles
