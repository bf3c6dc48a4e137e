"""Who has which adapters: what one adapter makes of a map, and which rows of a batch have which."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch gives no types for what autograd functions and its linear algebra return)

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from gossamer.linalg import LowRankPair

LONG = 32
"""Rows that runs must have on average for a product of their own; measured by `bench.routed`, as are the others."""
SHARED = 8
"""Rows that a mix must have on average for concatenating to beat gathering."""
MOST = 64
"""Rows beyond which factors are not laid beside each of them: they take too much memory."""

Adapters = TypeVar("Adapters", bound=tuple[Any, ...])
"""What a run of rows has: names, or adapters each with its weight. Empty for the base alone."""
Mix = tuple[tuple[int, float], ...]
"""Numbers of adapters, each with its weight."""


class LinearChange(NamedTuple):
    """What one adapter makes of one frozen map `x -> W x + b`; None where it leaves that as it is.

    Attributes:
        pair: factors (r, in) and (out, r), beside the map.
        gain, shift: (out,), of the map's output, bias included; `given`: (in,), of its input.
        weight, bias: (out, in) and (out,) in place of the map's own.
    """

    pair: LowRankPair | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    given: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def is_sum(self) -> bool:
        """Whether it only adds a low-rank term, so that it can be scaled, and added to others."""
        return all(part is None for part in self[1:])

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        factors = (self.pair.lora_A, self.pair.lora_B) if self.pair else ()
        return [*factors, *(part for part in self[1:] if isinstance(part, Tensor))]


class Stack(NamedTuple):
    """One adapter's changes of maps that read the same input.

    Attributes:
        lora_A: (sum of r_i, in), the A of all maps one below the other.
        pairs: for each map, the scaling in B; its A is rows of `lora_A`, none where the adapter has nothing there.
        rest: for each map what else there is, without the factors; empty where all of them are sums.
    """

    lora_A: Tensor
    pairs: tuple[LowRankPair, ...]
    rest: tuple[LinearChange, ...] = ()

    @classmethod
    def of(cls, changes: Sequence[LinearChange | None], outs: Sequence[int], like: Tensor) -> Stack:
        """Of a change for each map of `outs` outputs, in the dtype and on the device of `like` (any, in).

        On a CPU the factors are held in float32 at least: a product as small as theirs takes two to four times as long
        in 16 bits, of which most is spent on finding the kernel.
        """
        factors = like.to(torch.promote_types(like.dtype, torch.float32)) if like.device.type == "cpu" else like
        there = [change or LinearChange() for change in changes]
        pairs = [
            change.pair.folded().to(factors)
            if change.pair
            else LowRankPair(factors.new_zeros(0, like.shape[-1]), factors.new_zeros(out, 0))
            for change, out in zip(there, outs, strict=True)
        ]
        others = [[None if one is None else one.to(like) for one in change[1:]] for change in there]
        rest = () if all(change.is_sum for change in there) else tuple(LinearChange(None, *one) for one in others)
        return cls.joined(pairs, rest)

    @classmethod
    def joined(cls, pairs: Sequence[LowRankPair], rest: tuple[LinearChange, ...] = ()) -> Stack:
        """Of a pair for each map, the scaling in B; their A are copied side by side."""
        inner = torch.cat([pair.lora_A for pair in pairs])
        split = inner.split([pair.rank for pair in pairs])
        return cls(inner, tuple(LowRankPair(own, pair.lora_B) for own, pair in zip(split, pairs, strict=True)), rest)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        outer = [pair.lora_B for pair in self.pairs]
        return sum(one.nbytes for one in (self.lora_A, *outer, *(part for one in self.rest for part in one.tensors())))

    @property
    def columns(self) -> list[slice]:
        """Which columns of `x lora_A^T` belong to each map."""
        found, end = [], 0
        for pair in self.pairs:
            found.append(slice(end, end := end + pair.rank))
        return found


@dataclass(frozen=True)
class Routing(Generic[Adapters]):
    """Who runs where: which adapters each run of rows has.

    Attributes:
        mixes: the adapters of each run, in the order of the rows; empty for the base alone.
        lengths: rows of each run; none where one mix is for whatever comes.
        unit: what a row is: a "row" of a batch, a "token" of sequences put one after another, or the whole "batch".
    """

    mixes: tuple[Adapters, ...]
    lengths: tuple[int, ...]
    unit: Literal["batch", "row", "token"] = "token"

    @classmethod
    def everywhere(cls, mix: Adapters) -> Routing[Adapters]:
        """One mix for whatever comes."""
        return cls((mix,), (), "batch")

    @property
    def rows(self) -> int:
        """Rows in all."""
        return sum(self.lengths)

    @cached_property
    def spans(self) -> tuple[tuple[int, int | None, Adapters], ...]:
        """Start, stop and mix of each run; one from 0 to the end (None) where one mix is for whatever comes."""
        if self.unit == "batch":
            return ((0, None, self.mixes[0]),)
        ends = [*itertools.accumulate(self.lengths, initial=0)]
        return tuple(zip(ends, ends[1:], self.mixes, strict=False))

    @cached_property
    def runs(self) -> tuple[tuple[slice, Adapters], ...]:
        """The runs that have an adapter, neighbours of one mix joined."""
        found: list[tuple[slice, Adapters]] = []
        for start, stop, mix in self.spans:
            if mix and found and found[-1][1] == mix and found[-1][0].stop == start:
                found[-1] = (slice(found[-1][0].start, stop), mix)
            elif mix:
                found.append((slice(start, stop), mix))
        return tuple(found)

    @cached_property
    def distinct(self) -> tuple[Adapters, ...]:
        """The mixes that there are, the empty one not among them."""
        return tuple(dict.fromkeys(mix for _, mix in self.runs))

    def numbered(self, number: Mapping[Adapters, int], base: int) -> Tensor:
        """The number of each row's mix, (rows,) int64; `base` for the base alone."""
        numbers = torch.tensor([number.get(mix, base) for mix in self.mixes], dtype=torch.int64)
        return numbers.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))

    @property
    def way(self) -> str:
        """How terms are best added: "none", "segmented", "concatenated" or "gathered"."""
        if not self.runs:
            return "none"
        there = sum(rows.stop - rows.start for rows, _ in self.runs)
        if len(self.runs) == 1 or there >= LONG * len(self.runs):
            return "segmented"
        return "concatenated" if there >= SHARED * len(self.distinct) or self.rows > MOST else "gathered"


def mixed(stacks: Mapping[int, Stack], mix: Mix) -> Stack:
    """A mix of adapters as one: ranks add, B times its weight; what is no sum cannot be one of a mix."""
    if len(mix) == 1 and mix[0][1] == 1.0:
        return stacks[mix[0][0]]
    each = zip(*([pair.scaled(weight) for pair in stacks[number].pairs] for number, weight in mix), strict=True)
    return Stack.joined([LowRankPair.concatenated(pairs).folded() for pairs in each])
