"""Adapters beside frozen maps: in every row another one, a mix of several, or none.

    y_n = gain_n * (W (given_n * x_n) + b) + shift_n + sum over k of  w_nk B_k A_k x_n    w_nk: how much of k row n has

Ways to the same sum of low-rank terms, of which `Routing` chooses by what the rows are like:

    segmented      a product for each run of rows with one mix: long runs, as when prompts are read
    concatenated   all A one below the other in one product; each row keeps its own columns: many rows of few adapters
    gathered       each row's factors beside it, batched products of one row each: nearly every row has another adapter
    slotted        on CUDA, unless runs are very long: kernels that look up the slot of each row's adapter

`reference` is the plain twin of all of them.

Source: Chen et al. 2023, arXiv:2310.18547, section 4; Sheng et al. 2023, arXiv:2311.03285, section 6 (batched LoRA).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch gives no types for what autograd functions and its linear algebra return)

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gossamer.kernels.elementwise import triton_takes
from gossamer.kernels.routing import LinearChange, Mix, Routing, Stack, mixed
from gossamer.kernels.slots import Gathered, Slotted
from gossamer.linalg import LowRankPair

LONG_ON_CUDA = 512
"""Rows that runs must have on average for products of their own, where each is so many launches."""
FEW = 64
"""Rows up to which a product in float32 beats one in 16 bits, which is why factors on a CPU are held so."""


class Routed:
    """The adapters of a batch beside maps that read the same input, laid out once and used at every call.

    Args:
        stacks: by number, those of all adapters in the routing.
        way: how to add low-rank terms; the routing's own choice by default.
        before: of the batch before, at the same maps, which is not used again: what it gathered is gathered already.
            A number must mean the same adapter in both.

    Attributes:
        slots: where factors lie in slots. On CUDA they stay there when a batch has no adapter, so that recorded steps
            find them where they were.
    """

    def __init__(
        self, stacks: Mapping[int, Stack], routing: Routing[Mix], way: str | None = None, before: Routed | None = None
    ) -> None:
        self.way, self.slots = way or routing.way, None
        made = {mix: mixed(stacks, mix) for mix in routing.distinct}
        self.rest = _Rest(routing, made) if any(stack.rest for stack in made.values()) else None
        if not any(len(stack.lora_A) for stack in made.values()):
            self.way = "none"
        self.parts = [(rows, made[mix]) for rows, mix in routing.runs]
        self.of_all = self._of_all(routing)
        there = before.slots if before else None
        if way is None and self._better_slotted(routing, there):
            self.way = "slotted"
        if self.way == "concatenated":
            self._concatenate(routing, made)
        elif self.way in ("slotted", "gathered"):
            kind = Slotted if self.way == "slotted" else Gathered
            self.slots = there if isinstance(there, kind) and there.takes(routing, made) else kind(routing, made)
            self.slots.look(routing, made)

    def _of_all(self, routing: Routing[Mix]) -> tuple[Stack, Tensor] | None:
        """The one mix of few rows, with all its B in one matrix: one product for all maps, where it is small."""
        if self.way != "segmented" or len(self.parts) != 1 or not 0 < routing.rows <= FEW:
            return None
        ((rows, stack),) = self.parts
        if rows != slice(0, routing.rows) or stack.lora_A.device.type != "cpu":
            return None
        return stack, torch.block_diag(*(pair.lora_B for pair in stack.pairs))

    def _better_slotted(self, routing: Routing[Mix], there: Gathered | Slotted | None) -> bool:
        """Whether kernels are to look slots up: on CUDA where runs are short, and where it was so before."""
        if self.way == "none":
            return isinstance(there, Slotted)
        there_are = sum(rows.stop - rows.start for rows, _ in self.parts)
        short = len(self.parts) > 1 and there_are < LONG_ON_CUDA * len(self.parts)
        one_by_one = all(length == 1 for length in routing.lengths)
        return (short or one_by_one) and triton_takes(self.parts[0][1].lora_A)

    def before(self, x: Tensor) -> Tensor:
        """The input (N, in) as the maps should read it."""
        return x if self.rest is None else self.rest.before(x)

    def after(self, x: Tensor, outs: Sequence[Tensor], whole: Tensor | None = None) -> None:
        """Change the maps' outputs, (N, out_i) each, for the input x (N, in), in place.

        Args:
            whole: (N, sum of out_i), of which the outputs are columns, one after the other, if they are.
        """
        if self.rest is not None:
            self.rest.after(x, outs)
        if self.of_all is not None and whole is not None:
            stack, outer = self.of_all
            add_product(whole, x.to(outer.dtype) @ stack.lora_A.T, outer)
        elif self.way == "segmented":
            for rows, stack in self.parts:
                given = x[rows] if rows.stop - rows.start > FEW else x[rows].to(stack.lora_A.dtype)
                down = given @ stack.lora_A.to(given.dtype).T
                for out, pair, columns in zip(outs, stack.pairs, stack.columns, strict=True):
                    if pair.rank:
                        add_product(out[rows], down[:, columns], pair.lora_B.to(down.dtype))
        elif self.way == "concatenated":
            down = x.to(self.inner.dtype) @ self.inner.T
            down.masked_fill_(self.others, 0.0)  # not times 0: another's overflow stays its own
            for out, outer, columns in zip(outs, self.outer, self.columns, strict=True):
                if outer.shape[1]:
                    add_product(out, down[:, columns], outer)
        elif self.slots is not None:
            self.slots.add(x, outs)

    def _concatenate(self, routing: Routing[Mix], made: Mapping[Mix, Stack]) -> None:
        """All A of the first map, then of the second; `others` are the columns that are not a row's own."""
        number = {mix: index for index, mix in enumerate(made)}
        stacks = [*made.values()]
        inner, outer, owners, self.columns = [], [], [], []
        end = 0
        for pairs in zip(*(stack.pairs for stack in stacks), strict=True):
            both = LowRankPair.concatenated(pairs)
            inner.append(both.lora_A)
            outer.append(both.lora_B)
            owners += [one for one, pair in enumerate(pairs) for _ in range(pair.rank)]
            self.columns.append(slice(end, end := end + outer[-1].shape[1]))
        self.inner, self.outer = torch.cat(inner), outer
        self.others = (routing.numbered(number, -1).unsqueeze(1) != torch.tensor(owners)).to(self.inner.device)


def add_product(out: Tensor, down: Tensor, outer: Tensor) -> None:
    """`out += down outer^T` in place, rounded once."""
    if out.dtype == down.dtype:
        out.addmm_(down, outer.T)
    else:
        out.add_(down @ outer.T)


class _Rest:
    """What is not a sum of low-rank terms: vectors looked up for each row, whole weights run by run."""

    def __init__(self, routing: Routing[Mix], made: Mapping[Mix, Stack]) -> None:
        first = next(iter(made.values()))
        number = {mix: index + 1 for index, mix in enumerate(made)}  # 0: rows that nothing is changed for
        self.index = routing.numbered(number, 0).to(first.lora_A.device)
        shares = [stack.rest or (LinearChange(),) * len(first.pairs) for stack in made.values()]
        each = [[one[place] for one in shares] for place in range(len(first.pairs))]  # for each map, of all mixes
        self.given = _table([one.given for one in each[0]], 1.0)
        self.gains = [_table([one.gain for one in shares], 1.0) for shares in each]
        self.shifts = [_table([one.shift for one in shares], 0.0) for shares in each]
        self.wholes = [
            [(rows, share) for rows, mix in routing.runs if (share := shares[number[mix] - 1]).weight is not None]
            for shares in each
        ]

    def before(self, x: Tensor) -> Tensor:
        return x if self.given is None else x * self.given[self.index]

    def after(self, x: Tensor, outs: Sequence[Tensor]) -> None:
        for out, gain, shift, wholes in zip(outs, self.gains, self.shifts, self.wholes, strict=True):
            for rows, share in wholes:
                assert share.weight is not None
                out[rows] = torch.nn.functional.linear(x[rows], share.weight, share.bias)
            if gain is not None:
                out.mul_(gain[self.index])
            if shift is not None:
                out.add_(shift[self.index])


def _table(vectors: Sequence[Tensor | None], neutral: float) -> Tensor | None:
    """A row for each vector, after one of nothing but the neutral number; None where there are no vectors."""
    first = next((one for one in vectors if one is not None), None)
    if first is None:
        return None
    none = torch.full_like(first, neutral)
    return torch.stack([none, *(none if one is None else one for one in vectors)])


def reference(
    x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]], stacks: Mapping[int, Stack], routing: Routing[Mix]
) -> list[Tensor]:
    """Outputs (N, out_i) of the maps W (out_i, in), b: row by row, adapter by adapter, as the equation says."""
    outs = [x.new_zeros(len(x), len(weight)) for weight, _ in maps]
    for start, stop, mix in routing.spans:
        for here in range(start, len(x) if stop is None else stop):
            for place, (weight, bias) in enumerate(maps):
                rest = [stacks[number].rest[place] for number, _ in mix if stacks[number].rest]
                share = rest[0] if rest else LinearChange()
                if share.weight is not None:
                    weight, bias = share.weight, share.bias
                given = x[here] if share.given is None else share.given * x[here]
                out = weight @ given + (0.0 if bias is None else bias)
                out = out if share.gain is None else share.gain * out
                out = out if share.shift is None else share.shift + out
                for number, much in mix:
                    pair = stacks[number].pairs[place]
                    out = out + much * (pair.lora_B @ (pair.lora_A @ x[here].to(pair.lora_A.dtype)))
                outs[place][here] = out
    return outs
