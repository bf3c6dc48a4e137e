"""A decoder without weights: its next token is a known function of all tokens so far, so that answers can be foretold.

An engine, or whatever else takes steps, is tested with it for what it does itself: which tokens it puts into which row,
what it copies, keeps and gives back. A token that is lost, doubled or in the wrong row changes the answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.running.row_cache import RowCache
from gossamer.running.steps import AdapterTerms, ChunkRows, LinearGroup, StepInput


class FakeDecoder:
    """The protocol `Decoder`, without linear maps at which adapters could stand.

    Args:
        vocabulary: logits have this many numbers, and tokens are below it.

    Attributes:
        steps: every step that was taken.
    """

    sites: tuple[LinearGroup, ...] = ()
    copied = 0

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.like = vocabulary, torch.zeros(1)
        self.steps: list[StepInput] = []

    def cache(self, rows: int = 0, tokens: int = 0) -> RowCache:
        """An empty cache, which keeps the id of every token."""
        return RowCache([(torch.zeros(1, 1),)], axis=1)

    def parts(self, step: StepInput) -> list[ChunkRows]:
        """All chunks at once."""
        return [tuple((number, chunk.length) for number, chunk in enumerate(step.chunks))]

    @torch.inference_mode()
    def __call__(self, step: StepInput, cache: RowCache, terms: AdapterTerms | None = None) -> Tensor:
        """Write the ids of the step's tokens, and give logits (wanted, vocabulary): 1 at `next_token`, else 0."""
        self.steps.append(step)
        cache.reserve(*step.extent)
        (kept,) = cache.layers[0]
        for chunk, ids in zip(step.chunks, step.tokens.split([one.length for one in step.chunks]), strict=True):
            kept[chunk.row, chunk.start : chunk.end, 0, 0] = ids.to(kept)
        logits = torch.zeros(len(step.wanted), self.vocabulary)
        for place, number in enumerate(step.wanted):
            chunk = step.chunks[number]
            logits[place, self.next_token(kept[chunk.row, : chunk.end, 0, 0].int().tolist())] = 1.0
        return logits

    def next_token(self, ids: Sequence[int]) -> int:
        """The likeliest token after these: each id counts by its place."""
        return sum((place + 1) * (one + 1) for place, one in enumerate(ids)) % self.vocabulary

    def answer(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """The `count` tokens that greedily follow a prompt."""
        ids = [*prompt]
        for _ in range(count):
            ids.append(self.next_token(ids))
        return tuple(ids[len(prompt) :])
