"""What the layers of a model keep of many sequences, one a row: keys and values, in most models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PAGE, _ROWS = 128, 8
"""Room is made for a multiple of so many tokens, and of so many rows."""


class RowCache:
    """Tensors of every layer with a place for each token of each row; rows in use come first.

    There is a spare row behind the last: padding of a batch may be written there.

    Args:
        samples: for each layer what one token leaves in it, tensors (heads, d); layers may differ.
        axis: 1 for (rows, tokens, heads, d), 2 for (rows, heads, tokens, d).
        room: rows and tokens that there is room for at the least, as long as no sequence needs more of either.

    Attributes:
        layers: for each layer its tensors.
        rows, tokens: what there is room for.
        laid: how often the tensors were made anew.
    """

    def __init__(self, samples: Sequence[Sequence[Tensor]], axis: int, room: tuple[int, int] = (0, 0)) -> None:
        self.samples, self.axis, self.room, self.laid = samples, axis, room, 0
        self.rows, self.tokens = room
        self.layers = [self._empty(sample) for sample in samples]

    def _empty(self, sample: Sequence[Tensor]) -> tuple[Tensor, ...]:
        shapes = [[*one.shape] for one in sample]
        for shape in shapes:
            shape.insert(self.axis - 1, self.tokens)
        # zeros: what is masked must not be NaN
        return tuple(one.new_zeros(self.rows + 1, *shape) for one, shape in zip(sample, shapes, strict=True))

    def _each(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(self.layers)

    def _first(self, one: Tensor, row: int, tokens: int) -> Tensor:
        return one[row].narrow(self.axis - 1, 0, tokens)

    def fit(self, rows: int, tokens: int) -> None:
        """Make room for so many rows and tokens, which is all that is in use: where one is short, the other shrinks."""
        if rows <= self.rows and tokens <= self.tokens:
            return
        if rows <= self.room[0] and tokens <= self.room[1]:
            self._lay(*self.room)
        else:
            grown = max(tokens, self.tokens * 3 // 2) if tokens > self.tokens else tokens
            self._lay(-(-rows // _ROWS) * _ROWS, -(-grown // _PAGE) * _PAGE)

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows and tokens, and keep what there is."""
        if rows > self.rows or tokens > self.tokens:
            self.fit(max(rows, self.rows), max(tokens, self.tokens))

    def _lay(self, rows: int, tokens: int) -> None:
        self.rows, self.tokens, self.laid = rows, tokens, self.laid + 1
        for index, sample in enumerate(self.samples):
            new = self._empty(sample)
            for old, one in zip(self.layers[index], new, strict=True):
                both, there = min(len(old), len(one)) - 1, min(old.shape[self.axis], self.tokens)
                one[:both].narrow(self.axis, 0, there).copy_(old[:both].narrow(self.axis, 0, there))
            self.layers[index] = new

    @torch.inference_mode()
    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a row the first tokens of another."""
        for one in self._each():
            self._first(one, target, tokens).copy_(self._first(one, source, tokens))

    @torch.inference_mode()
    def keep(self, row: int, tokens: int) -> KeptRow:
        """A copy of a row's first tokens, no larger than they are."""
        parts = [self._first(one, row, tokens) for one in self._each()]
        flat = torch.cat([part.reshape(-1) for part in parts])  # one piece of memory, that leaves no holes when it goes
        pieces = flat.split([part.numel() for part in parts])
        return KeptRow(tuple(one.view(part.shape) for one, part in zip(pieces, parts, strict=True)), self.axis - 1)

    @torch.inference_mode()
    def give(self, row: int, kept: KeptRow, tokens: int) -> None:
        """Give a row the first tokens of what was kept."""
        self.reserve(row + 1, tokens)
        for one, values in zip(self._each(), kept.values, strict=True):
            self._first(one, row, tokens).copy_(values.narrow(kept.axis, 0, tokens))

    def trim(self) -> None:
        """Forget everything, and go back to `room`."""
        if (self.rows, self.tokens) != self.room:
            (self.rows, self.tokens), self.laid, self.layers = self.room, self.laid + 1, []  # first let go
            self.layers = [self._empty(sample) for sample in self.samples]


@dataclass(frozen=True)
class KeptRow:
    """What was kept of a sequence's first tokens, apart from any row; tokens are along `axis` of each tensor."""

    values: tuple[Tensor, ...]
    axis: int

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(one.nbytes for one in self.values)
