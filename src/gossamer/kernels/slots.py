"""Factors of several adapters stacked in slots that last from batch to batch, and products with them."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gossamer.kernels.routing import Mix, Routing, Stack

_ROWS = 64
"""Room is made for a multiple of so many rows where they look up their slots."""


class Slots:
    """Factors stacked slot by slot, padded with zeros to the largest rank. A slot that stays what it was is left alone.

    Args:
        count: slots wanted; there is room for up to seven more.
        made: all that is to be laid there; for the sizes.
    """

    def __init__(self, count: int, made: Mapping[Mix, Stack]) -> None:
        first = next(iter(made.values()))
        ranks = [
            max(pair.rank for pair in pairs) for pairs in zip(*(stack.pairs for stack in made.values()), strict=True)
        ]
        ends = [*itertools.accumulate(ranks)]
        self.columns = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
        room = -(-count // 8) * 8
        self.inner = first.lora_A.new_zeros(room, ends[-1], first.lora_A.shape[1])
        self.outer = [
            pair.lora_B.new_zeros(room, rank, len(pair.lora_B)) for pair, rank in zip(first.pairs, ranks, strict=True)
        ]
        self.mixes: list[Mix] = [()] * room

    def has_room(self, count: int, made: Mapping[Mix, Stack]) -> bool:
        """Whether there is room for so many, and for their ranks."""
        wide = all(
            pair.rank <= there.shape[1]
            for stack in made.values()
            for pair, there in zip(stack.pairs, self.outer, strict=True)
        )
        return wide and count <= len(self.mixes)

    def lay(self, slot: int, mix: Mix, stack: Stack) -> None:
        """Let a slot hold a mix."""
        if self.mixes[slot] == mix:
            return
        self.mixes[slot] = mix
        for there, columns, pair in zip(self.outer, self.columns, stack.pairs, strict=True):
            there[slot, : pair.rank] = pair.lora_B.T
            there[slot, pair.rank :] = 0.0
            self.inner[slot, columns.start : columns.start + pair.rank] = pair.lora_A
            self.inner[slot, columns.start + pair.rank : columns.stop] = 0.0


class Gathered(Slots):
    """A slot for each row."""

    def __init__(self, routing: Routing[Mix], made: Mapping[Mix, Stack]) -> None:
        super().__init__(routing.rows, made)

    def takes(self, routing: Routing[Mix], made: Mapping[Mix, Stack]) -> bool:
        """Whether there is room for these rows, and for the ranks of their mixes."""
        return self.has_room(routing.rows, made)

    def look(self, routing: Routing[Mix], made: Mapping[Mix, Stack]) -> None:
        """Give every row its mix."""
        each = [mix for mix, length in zip(routing.mixes, routing.lengths, strict=True) for _ in range(length)]
        for row, mix in enumerate(each):
            if mix:
                self.lay(row, mix, made[mix])
        without = [row for row, mix in enumerate(each) if not mix]
        self.rows = len(each)
        self.without = torch.tensor(without, device=self.inner.device) if without else None

    def add(self, x: Tensor, outs: Sequence[Tensor]) -> None:
        """Add the terms, in place."""
        # a row vector times a matrix: four times as fast on a CPU as the matrix times a column
        down = torch.bmm(x.to(self.inner.dtype).unsqueeze(1), self.inner[: self.rows].transpose(1, 2))
        for out, outer, columns in zip(outs, self.outer, self.columns, strict=True):
            if outer.shape[1]:
                kept = None if self.without is None else out[self.without]
                if out.dtype == down.dtype:
                    out.unsqueeze(1).baddbmm_(down[:, :, columns], outer[: self.rows])
                else:
                    out.add_(torch.bmm(down[:, :, columns], outer[: self.rows]).squeeze(1))
                if kept is not None:
                    out[self.without] = kept


class Slotted(Slots):
    """A slot for each mix; rows know the number of theirs, in a tensor that stays where it is."""

    def __init__(self, routing: Routing[Mix], made: Mapping[Mix, Stack]) -> None:
        super().__init__(len(made), made)
        rows = -(-max(routing.rows, 1) // _ROWS) * _ROWS
        self.of_row = torch.full((rows,), -1, dtype=torch.int32, device=self.inner.device)

    def takes(self, routing: Routing[Mix], made: Mapping[Mix, Stack]) -> bool:
        """Whether there is room for these rows and mixes, and for their ranks."""
        return routing.rows <= len(self.of_row) and self.has_room(len(made), made)

    def look(self, routing: Routing[Mix], made: Mapping[Mix, Stack]) -> None:
        """Give every mix a slot, its old one if it has one, and every row its mix's; rows beyond them have none."""
        free = (slot for slot, mix in enumerate(self.mixes) if mix not in made)
        place = {mix: self.mixes.index(mix) if mix in self.mixes else next(free) for mix in made}
        for mix, slot in place.items():
            self.lay(slot, mix, made[mix])
        self.of_row.fill_(-1)
        self.of_row[: routing.rows] = routing.numbered(place, -1).to(self.of_row)

    def add(self, x: Tensor, outs: Sequence[Tensor]) -> None:
        """Add the terms, in place."""
        from gossamer.kernels import triton_routed

        of_row = self.of_row[: len(x)]
        down = triton_routed.shrink(x, self.inner, of_row)
        for out, outer, columns in zip(outs, self.outer, self.columns, strict=True):
            triton_routed.expand_(out, down, outer, of_row, columns.start)
