"""A and B at a module: beside its call where it has one, in its weight where others use that without calling it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import UnsupportedError
from gossamer.kernels.linears import Term, linears
from gossamer.kernels.routing import LinearChange
from gossamer.linalg import LowRankPair
from gossamer.methods.base import LINEAR_KINDS, Base, Layer, Shape, wide
from gossamer.methods.factored import change_of, factor_names
from gossamer.methods.replacement import ParameterLayer, bias_shift
from gossamer.methods.slots import hold


class FactorLayer(Layer):
    """The factors at one module that is called, with the trained bias where the spec asks for it."""

    first: str
    second: str
    groups: int
    scaling: float
    dropout: float
    bias: Tensor
    start_A: Tensor
    start_B: Tensor

    def __init__(self, shape: Shape, slots: Mapping[str, Tensor], scaling: float, dropout: float) -> None:
        super().__init__()
        first, second = factor_names(shape)
        dropout = 0.0 if shape.kind == "embedding" else dropout  # there is no half of a token
        # past torch's __setattr__, which asks what kind of tensor each may be: hundreds of layers are made at once
        vars(self).update(first=first, second=second, groups=shape.groups, scaling=scaling, dropout=dropout)
        for name, slot in slots.items():
            if name.startswith("start_"):
                self.register_buffer(name, slot.detach().clone(memory_format=torch.contiguous_format))
        hold(self, {name: slot for name, slot in slots.items() if not name.startswith("start_")})

    @property
    def pair(self) -> LowRankPair:
        """A and B as they are held, with a convolution's kernel behind them."""
        own: Any = self._parameters
        return LowRankPair(own[self.first], own[self.second], self.scaling)

    @property
    def pairs(self) -> list[LowRankPair]:
        """The pair, and the one that subtracts a start made of the weight."""
        start = [LowRankPair(self.start_A, self.start_B, -self.scaling)] if "start_A" in self._buffers else []
        return [self.pair, *start]

    def term(self, base: Base, x: Tensor) -> Tensor:
        """`scaling * (B A - B0 A0) x` in the output's layout and the input's dtype."""
        x = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
        first, *start = (self._product(base, x, pair) for pair in self.pairs)
        return first + start[0] if start else first

    def _product(self, base: Base, x: Tensor, pair: LowRankPair) -> Tensor:
        if base.shape.kind in LINEAR_KINDS:
            return pair.apply(x)
        dtype = x.dtype if x.is_floating_point() else base.affine()[0].dtype
        down, outer = base.mapped(x, pair.lora_A.to(dtype)), pair.lora_B.to(dtype)
        if outer.ndim == 2:
            return nn.functional.linear(down, outer) * pair.scaling
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[outer.ndim - 3]
        return convolve(down, outer, groups=self.groups) * pair.scaling

    @torch.no_grad()
    def factor_change(self, base: Base) -> LinearChange | None:
        """What the pair and the bias make of a linear map."""
        if base.shape.kind not in LINEAR_KINDS:
            return None
        pairs = [pair.wide() for pair in self.pairs]
        shift = bias_shift(self.bias.detach(), base) if "bias" in self._parameters else None
        return LinearChange(LowRankPair.concatenated(pairs).folded(), shift=shift)

    def factor_neutral(self, base: Base) -> Mapping[str, Tensor | None]:
        """The factors of a start that is subtracted again; a bias is pulled to the module's own."""
        found: dict[str, Tensor | None] = {}
        if "start_A" in self._buffers:
            found |= {self.first: self.start_A, self.second: self.start_B}
        return found | ({"bias": base.bias()} if "bias" in self._parameters else {})

    def change(self) -> Tensor:
        """`scaling * (B A - B0 A0)`, (out, in, *kernel), at least float32; refused where groups make it no weight."""
        if self.groups > 1:
            raise UnsupportedError(
                "A sees the inputs of all groups and the weight only those of its own, so this cannot be merged",
                got=f"a convolution of {self.groups} groups",
            )
        return change_of([(pair.lora_A.detach(), pair.lora_B.detach()) for pair in self.pairs], self.scaling)

    def added_to(self, weight: Tensor) -> Tensor:
        """`W + scaling * (B A - B0 A0)`; for a plain matrix in one pass over it, because memory is what that costs."""
        if weight.ndim != 2 or "start_A" in self._buffers:
            return weight + self.change()
        pair = self.pair.to(weight.dtype)
        return torch.addmm(weight, pair.lora_B.detach(), pair.lora_A.detach(), alpha=pair.scaling)


class LoRALayer(FactorLayer):
    """`h = W x + scaling * B A x`."""

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pair = self.plain_pair()
        if pair is not None and x.ndim > 1 and base.is_plain():  # the fused way is for rows
            return linears(x, [base], [[Term(pair)]])[0]
        out = base(x, *args, **kwargs)
        out = out + self.term(base, x)
        if "bias" in self._parameters:
            out = out + _along_channels(bias_shift(self.bias, base), base.shape).to(out.dtype)
        return out

    def linear_change(self, base: Base) -> LinearChange | None:
        return self.factor_change(base)

    def neutral(self, base: Base) -> Mapping[str, Tensor | None]:
        return self.factor_neutral(base)

    def plain_pair(self) -> LowRankPair | None:
        if self._buffers or "bias" in self._parameters or (self.dropout and self.training):
            return None
        return self.pair

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        folded = {"weight": self.added_to(wide(current["weight"]))}
        if "bias" in self._parameters:
            folded["bias"] = current["bias"] + (self.bias.detach() - frozen["bias"])
        return folded

    def merged_rows(self, weight: Tensor, rows: slice) -> Tensor | None:
        if weight.ndim != 2 or self._buffers or "bias" in self._parameters:
            return None
        pair = self.pair.to(weight.dtype)
        return weight.addmm_(pair.lora_B.detach()[rows], pair.lora_A.detach(), alpha=pair.scaling)


class MatrixLoRA(ParameterLayer):
    """Factors for matrices that a module uses itself: stacked experts, torch's own attention.

    `W'[e] = W[e] + scaling * B[e] A[e]` is formed for each call, in float32. A is stored as (experts * r, in), expert
    by expert; B as (out, r * experts), rank by rank: PEFT's layout.
    """

    def __init__(self, slots: Mapping[str, Tensor], scalings: Mapping[str, float], transposed: bool) -> None:
        super().__init__()
        self.scalings, self.transposed = dict(scalings), transposed
        hold(self, slots)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return self.run_presented(base, *args, **kwargs)

    def presented(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = dict(parameters)
        for name, scaling in self.scalings.items():
            factors = self.get_submodule(name)
            weight = parameters[name]
            inner, outer = factors.get_parameter("lora_A"), factors.get_parameter("lora_B")
            change = stacked_product(inner, outer, weight.shape[0] if weight.ndim == 3 else 1)
            change = change.transpose(1, 2) if self.transposed else change
            changed[name] = (wide(weight) + scaling * change.reshape(weight.shape)).to(weight.dtype)
        return changed

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = self.presented({name: wide(current[name]) for name in self.scalings})
        return {name: value.detach() for name, value in changed.items()}


def stacked_product(inner: Tensor, outer: Tensor, count: int) -> Tensor:
    """`B[e] A[e]` of `count` experts, (experts, out, in), at least float32."""
    dtype = torch.promote_types(torch.promote_types(inner.dtype, outer.dtype), torch.float32)
    inner = inner.to(dtype).reshape(count, -1, inner.shape[-1])
    outer = outer.to(dtype).reshape(outer.shape[0], -1, count)
    return torch.einsum("ore,eri->eoi", outer, inner)


def _along_channels(bias: Tensor, shape: Shape) -> Tensor:
    """A bias as the output has it: channels come last, except after a convolution."""
    return bias.reshape(-1, *(1 for _ in shape.kernel))
