"""Batches: which examples go together, in which order, and as which tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from gossamer.errors import DataError
from gossamer.training.masks import Example

IGNORED = -100
"""The label of a token that is not learned; PyTorch's cross entropy passes over it."""

_WINDOW = 50  # batches: wide enough to find rows of equal length, narrow enough to mix an epoch well

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Examples of one step, padded on the right to the longest: B rows of T tokens."""

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) int64: 1 for tokens, 0 for padding."""
    labels: Tensor
    """(B, T) int64: the token where it is learned, else `IGNORED`. Not shifted: label t goes with tokens before t."""
    tokens: int
    """Real tokens, padding excluded."""
    supervised: int
    """Labels that are learned: the number of terms in the batch's loss."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "attention_mask", "labels")}
        return replace(self, **moved)


def plan_batches(
    examples: Sequence[Example] | Sequence[int], batch_size: int, *, seed: int, epoch: int, shuffle: bool = True
) -> list[list[int]]:
    """The batches of one epoch as indices into `examples`; every index comes exactly once.

    Rows are shuffled, sorted by length inside windows of 50 batches so that a batch needs little padding, and then the
    batches are shuffled. One batch may be short. The plan depends on nothing but the arguments, so a resumed run
    can make it again.

    Args:
        examples: examples, or just their lengths in tokens.
        batch_size: rows of a batch.
        seed, epoch: together they choose the order.
        shuffle: off keeps windows and batches in the order of the file.
    """
    lengths = [one if isinstance(one, int) else len(one) for one in examples]
    draw = random.Random(f"{seed}/{epoch}")
    order = _shuffled(range(len(lengths)), draw) if shuffle else list(range(len(lengths)))
    windows = _chunks(order, _WINDOW * batch_size)
    batches = [batch for window in windows for batch in _chunks(sorted(window, key=lengths.__getitem__), batch_size)]
    return _shuffled(batches, draw) if shuffle else batches


def split_batch(batch: list[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Parts of a batch that hold at most `tokens` tokens each, padding included; a longer row stands alone.

    The gradients of the parts add up to that of the batch, so this bounds memory and changes nothing else.
    """
    longest = max(lengths[index] for index in batch)
    return _chunks(batch, max(1, tokens // longest))


def largest_part(lengths: Sequence[int], batch_size: int, tokens: int) -> tuple[int, int]:
    """Rows and tokens a row of the largest part that `plan_batches` and `split_batch` can make, whatever the seed."""
    parts = ((min(batch_size, len(lengths), max(1, tokens // length)), length) for length in {*lengths})
    return max(parts, key=lambda part: (part[0] * part[1], part[1]))


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pad examples to one batch of tensors.

    Labels are set by position, so a pad token that is also the EOS loses nothing. The first token of a row gets no
    label, as nothing stands before it. Raises `DataError` for a batch that teaches nothing: its loss would be 0 / 0.
    """
    width = max(map(len, examples), default=0)
    ids = [[*one.ids, *[pad_id] * (width - len(one))] for one in examples]
    real = [[*[1] * len(one), *[0] * (width - len(one))] for one in examples]
    labels = [_labels(one, width) for one in examples]
    supervised = sum(label != IGNORED for row in labels for label in row)
    if not supervised:
        raise DataError("nothing in this batch is supervised", where=", ".join(one.where for one in examples))
    input_ids, attention_mask, targets = (torch.tensor(rows, dtype=torch.int64) for rows in (ids, real, labels))
    return Batch(input_ids, attention_mask, targets, sum(map(len, examples)), supervised).to(device)


def _labels(example: Example, width: int) -> list[int]:
    learned = [False, *example.supervised[1:], *[False] * (width - len(example))]
    ids = [*example.ids, *[IGNORED] * (width - len(example))]
    return [token if flag else IGNORED for token, flag in zip(ids, learned, strict=True)]


def _shuffled(items: Sequence[Item], draw: random.Random) -> list[Item]:
    """A random order by sorting on `random()`, the one draw whose sequence Python keeps from version to version."""
    keys = [draw.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


def _chunks(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
