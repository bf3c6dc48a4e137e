"""Who has which adapters: what one adapter makes of a map, and which rows of a batch have which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

LONG = 32
"""Rows that runs must have on average for a product of their own; measured by `bench.routed`, as are the others."""
SHARED = 8
"""Rows that a mix must have on average for concatenating to beat gathering."""
MOST = 64
"""Rows beyond which factors are not laid beside each of them: they take too much memory."""

Mix = tuple[tuple[int, float], ...]
"""What a row has: numbers of adapters, each with its weight. Empty for the base alone."""


class Share(NamedTuple):
    """What one adapter makes of one frozen map `x -> W x + b`; None where it leaves that as it is.

    Attributes:
        lora_A, lora_B: (r, in) and (out, r), the scaling multiplied in.
        gain, shift: (out,), of the map's output, bias included; `given`: (in,), of its input.
        weight, bias: (out, in) and (out,) in place of the map's own.
    """

    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    given: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def is_sum(self) -> bool:
        """Whether it only adds low-rank terms, so that it can be scaled, and added to others."""
        return all(part is None for part in self[2:])


class Stack(NamedTuple):
    """One adapter's shares of maps that read the same input.

    Attributes:
        lora_A: (sum of r_i, in), the A of all maps one below the other.
        lora_B: for each map (out_i, r_i); r_i is 0 where the adapter has none.
        rest: for each map what else there is, without the factors; empty where all of them are sums.
    """

    lora_A: Tensor
    lora_B: tuple[Tensor, ...]
    rest: tuple[Share, ...] = ()

    @classmethod
    def of(cls, shares: Sequence[Share | None], outs: Sequence[int], like: Tensor) -> Stack:
        """Of a share for each map of `outs` outputs, in the dtype and on the device of `like` (any, in).

        On a CPU the factors are held in float32 at least: a product as small as theirs takes two to four times as long
        in 16 bits, of which most is spent on finding the kernel.
        """
        factors = like.to(torch.promote_types(like.dtype, torch.float32)) if like.device.type == "cpu" else like
        there = [share or Share() for share in shares]
        inner = [share.lora_A.to(factors) for share in there if share.lora_A is not None]
        outer = [
            factors.new_zeros(out, 0) if share.lora_B is None else share.lora_B.to(factors)
            for share, out in zip(there, outs, strict=True)
        ]
        others = [[None if one is None else one.to(like) for one in share[2:]] for share in there]
        rest = () if all(share.is_sum for share in there) else tuple(Share(None, None, *one) for one in others)
        return cls(torch.cat(inner) if inner else factors.new_zeros(0, like.shape[-1]), tuple(outer), rest)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        more = [one for share in self.rest for one in share if one is not None]
        return sum(one.nbytes for one in (self.lora_A, *self.lora_B, *more))

    @property
    def columns(self) -> list[slice]:
        """Which columns of `x lora_A^T` belong to each map."""
        found, end = [], 0
        for outer in self.lora_B:
            found.append(slice(end, end := end + outer.shape[1]))
        return found


@dataclass(frozen=True)
class Routing:
    """Which rows have which adapters.

    Attributes:
        mixes: what each run of rows has, in the order of the rows.
        lengths: rows of each run.
    """

    mixes: tuple[Mix, ...]
    lengths: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows in all."""
        return sum(self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[slice, Mix], ...]:
        """The runs that have an adapter, neighbours of one mix joined."""
        found: list[tuple[slice, Mix]] = []
        end = 0
        for mix, length in zip(self.mixes, self.lengths, strict=True):
            start, end = end, end + length
            if mix and found and found[-1][1] == mix and found[-1][0].stop == start:
                found[-1] = (slice(found[-1][0].start, end), mix)
            elif mix:
                found.append((slice(start, end), mix))
        return tuple(found)

    @cached_property
    def distinct(self) -> tuple[Mix, ...]:
        """The mixes that there are, the empty one not among them."""
        return tuple(dict.fromkeys(mix for _, mix in self.runs))

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
    if len(mix) == 1:
        ((number, weight),) = mix
        only = stacks[number]
        return only if weight == 1.0 else Stack(only.lora_A, tuple(weight * outer for outer in only.lora_B))
    parts = [(stacks[number], weight) for number, weight in mix]
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    for index in range(len(parts[0][0].lora_B)):
        inner += [stack.lora_A[stack.columns[index]] for stack, _ in parts]
        outer.append(torch.cat([weight * stack.lora_B[index] for stack, weight in parts], 1))
    return Stack(torch.cat(inner), tuple(outer))
