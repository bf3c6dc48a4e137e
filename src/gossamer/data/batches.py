"""Batches: which examples go together, in which order, and as which tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from gossamer.data.masks import Example
from gossamer.errors import DataError
from gossamer.kernels.packed import NO_MASK, Packing, Segment

SHARED = 16
"""Tokens that rows must have in common at their beginning for these to be computed once."""

_WINDOW = 50  # batches: wide enough to find rows of equal length, narrow enough to mix an epoch well

Item = TypeVar("Item")

_Rows = tuple[Tensor, Tensor, Tensor | None, Packing | None, Callable[[int, int], int]]
"""Token ids, mask, positions, packing, and `place(row, token)`: where a row's token is, counted through all."""


@dataclass(frozen=True)
class Batch:
    """Examples that go through the model at once: B rows padded on the right to T tokens, or all in one packed row."""

    input_ids: Tensor
    """(B, T) int64; (1, N) when packed."""
    attention_mask: Tensor
    """(B, T) int64: 1 for tokens, 0 for padding; `NO_MASK` when packed."""
    position_ids: Tensor | None
    """(1, N) int64: where each token is in its own sequence. None unless packed."""
    packing: Packing | None
    """Where the sequences are. None unless packed."""
    at: Tensor
    """(M,) int64: the flat place whose hidden state predicts each supervised token, example by example."""
    targets: Tensor
    """(M,) int64: the supervised tokens."""
    counts: tuple[int, ...]
    """Supervised tokens of each example."""
    tokens: int
    """Real tokens of all examples: padding is not counted, and what they share is counted for each."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What a task adds: tensors with a row for each example."""

    @property
    def supervised(self) -> int:
        """Terms of the loss."""
        return len(self.targets)

    def inputs(self) -> dict[str, Any]:
        """What a transformers model is called with."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False}
        return given if self.packing is None else given | {"position_ids": self.position_ids, "packing": self.packing}

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        held = {name: value for name, value in vars(self).items() if isinstance(value, Tensor | Packing)}
        extras = {name: value.to(device) for name, value in self.extras.items()}
        return replace(self, extras=extras, **{name: value.to(device) for name, value in held.items()})

    def by_example(self, terms: Tensor) -> Tensor:
        """The terms of the loss, (M,), summed up for each example, (examples,); the same bits every time."""
        counts = torch.tensor(self.counts)
        width = int(counts.max())
        places = (torch.arange(width) < counts[:, None]).flatten().nonzero().squeeze(1).to(terms.device)
        return terms.new_zeros(len(counts) * width).index_copy(0, places, terms).view(len(counts), width).sum(1)


@dataclass(frozen=True)
class BatchLayout:
    """How examples become a batch: where it is, what pads it, or whether rows stand one after another."""

    pad_id: int = 0
    device: torch.device | str = "cpu"
    packed: bool = False
    shared: bool = True
    """What packed rows begin with is computed once."""


def plan_batches(
    examples: Sequence[Example] | Sequence[int],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    tokens: int | None = None,
) -> list[list[int]]:
    """The batches of one epoch as indices into `examples`; every index comes exactly once.

    Rows are shuffled, sorted by length inside windows of 50 batches so that a batch needs little padding, and then the
    batches are shuffled. One batch may be short. The plan depends on nothing but the arguments, so a resumed run
    can make it again.

    Args:
        examples: examples, or just their lengths in tokens.
        batch_size: rows of a batch.
        tokens: fill each batch with rows up to so many tokens instead; a longer row stands alone.
        seed, epoch: together they choose the order.
        shuffle: off keeps windows and batches in the order of the file.
    """
    lengths = [one if isinstance(one, int) else len(one) for one in examples]
    draw = random.Random(f"{seed}/{epoch}")
    order = _shuffled(range(len(lengths)), draw) if shuffle else list(range(len(lengths)))
    rows = batch_size if tokens is None else max(1, tokens * len(lengths) // max(1, sum(lengths)))
    windows = [sorted(window, key=lengths.__getitem__) for window in _chunks(order, _WINDOW * rows)]
    cut = [_chunks(one, batch_size) if tokens is None else _filled(one, lengths, tokens) for one in windows]
    batches = [*chain(*cut)]
    return _shuffled(batches, draw) if shuffle else batches


def split_batch(batch: list[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Parts of a batch that hold at most `tokens` tokens each, as if padded; a longer row stands alone.

    The gradients of the parts add up to that of the batch, so this bounds memory and changes nothing else.
    """
    longest = max(lengths[index] for index in batch)
    return _chunks(batch, max(1, tokens // longest))


def largest_part(lengths: Sequence[int], batch_size: int, tokens: int) -> tuple[int, int]:
    """Rows and tokens a row of the largest part that `plan_batches` and `split_batch` can make, whatever the seed."""
    parts = ((min(batch_size, len(lengths), max(1, tokens // length)), length) for length in {*lengths})
    return max(parts, key=lambda part: (part[0] * part[1], part[1]))


def collate(
    examples: Sequence[Example],
    pad_id: int,
    device: torch.device | str = "cpu",
    *,
    packed: bool = False,
    shared: bool = True,
) -> Batch:
    """Put examples into tensors: padded side by side, or packed one after another.

    What is learned is found by position, so a pad token that is also the EOS loses nothing. The first token of a row is
    never learned, as nothing stands before it. Raises `DataError` for a batch that teaches nothing: its loss would be
    0 / 0.

    Args:
        packed: for a model that `gossamer.running.packed` knows.
        shared: compute tokens that all packed rows begin with once; the same maths unless something is dropped out.
    """
    learned = [[place for place in range(1, len(one)) if one.supervised[place]] for one in examples]
    if not any(learned):
        raise DataError("nothing in this batch is supervised", where=", ".join(one.where for one in examples))
    ids, mask, positions, packing, flat = _packed(examples, shared) if packed else _padded(examples, pad_id)
    at = [flat(row, place - 1) for row, places in enumerate(learned) for place in places]
    targets = [one.ids[place] for one, places in zip(examples, learned, strict=True) for place in places]
    return Batch(
        ids,
        mask,
        positions,
        packing,
        torch.tensor(at),
        torch.tensor(targets),
        tuple(map(len, learned)),
        sum(map(len, examples)),
    ).to(device)


def joined(batches: Sequence[Batch]) -> Batch:
    """Packed batches as one packed batch; what the rows of one of them share, the others do not."""
    if len(batches) == 1:
        return batches[0]
    packings = [batch.packing for batch in batches if batch.packing is not None]
    assert len(packings) == len(batches), "only packed rows can be put one after another"
    positions = [batch.position_ids for batch in batches if batch.position_ids is not None]
    starts = accumulate((batch.input_ids.shape[1] for batch in batches), initial=0)
    return Batch(
        torch.cat([batch.input_ids for batch in batches], 1),
        batches[0].attention_mask,
        torch.cat(positions, 1),
        Packing.joined(packings).to(batches[0].input_ids.device),
        torch.cat([batch.at + start for batch, start in zip(batches, starts, strict=False)]),
        torch.cat([batch.targets for batch in batches]),
        tuple(count for batch in batches for count in batch.counts),
        sum(batch.tokens for batch in batches),
        {name: torch.cat([batch.extras[name] for batch in batches]) for name in batches[0].extras},
    )


def _padded(examples: Sequence[Example], pad_id: int) -> _Rows:
    width = max(map(len, examples))
    ids = [[*one.ids, *[pad_id] * (width - len(one))] for one in examples]
    mask = [[*[1] * len(one), *[0] * (width - len(one))] for one in examples]
    return torch.tensor(ids), torch.tensor(mask), None, None, lambda row, token: row * width + token


def _packed(examples: Sequence[Example], shared: bool) -> _Rows:
    """One row: what all examples begin with, if that is long enough, then the rest of each."""
    prefix = _common([one.ids for one in examples]) if shared and len(examples) > 1 else 0
    prefix = prefix if prefix >= SHARED else 0
    ids = [*examples[0].ids[:prefix]]
    positions = [*range(prefix)]
    segments = [Segment(0, prefix)] if prefix else []
    for one in examples:
        segments.append(Segment(len(ids), len(ids) + len(one) - prefix, prefix))
        ids += one.ids[prefix:]
        positions += range(prefix, len(one))
    own = segments[1:] if prefix else segments

    def place(row: int, token: int) -> int:
        return token if token < prefix else own[row].start + token - prefix

    return torch.tensor([ids]), NO_MASK, torch.tensor([positions]), Packing.of(segments), place


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with; at least one of each row is left to itself."""
    shortest, first = min(map(len, rows)) - 1, rows[0]
    return next((place for place in range(shortest) if any(row[place] != first[place] for row in rows)), shortest)


def _shuffled(items: Sequence[Item], draw: random.Random) -> list[Item]:
    """A random order by sorting on `random()`, the one draw whose sequence Python keeps from version to version."""
    keys = [draw.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


def _filled(items: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Items in their order, as many together as hold at most `tokens` tokens."""
    batches: list[list[int]] = []
    room = 0
    for item in items:
        if lengths[item] > room:
            batches.append([])
            room = tokens
        batches[-1].append(item)
        room -= lengths[item]
    return batches


def _chunks(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
