"""A linear module that keeps its weight in 4 or 8 bits and rebuilds it whenever it runs."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
# (autograd functions have no types; a weight is stored where torch keeps parameters)

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import BaseFileError, NonFiniteError, UsageError, nearest
from gossamer.quant.backend import dequantize, quantize
from gossamer.quant.formats import FORMATS, Packed, QuantFormat
from gossamer.quant.layout import deserialized, serialized

_SAMPLES = 32
_PARTS = ("codes", "absmax", "nested_absmax", "offset")


class QuantizedLinear(nn.Module):
    """`y = x W^T + b` with W (out, in) stored as codes and scales, and frozen.

    The forward rebuilds W and lets it go; so does the backward, `dx = dy W`, so autograd keeps neither W nor x. Where
    a dense weight stands in `_parameters["weight"]` (a merged one, or one that is trained), the module runs with that
    instead. Reading `.weight` rebuilds it. `.to(dtype)` changes the dtype that W is rebuilt in, never the scales.
    `turned` says that it stands for GPT-2's Conv1D, whose own weight is (in, out).

    Source: Dettmers et al. 2023, arXiv:2305.14314, equations 5 and 6.
    """

    codes: Tensor | None
    absmax: Tensor | None
    nested_absmax: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, packed: Packed, dtype: torch.dtype, bias: nn.Parameter | None = None, turned: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.table, self.dtype, self.turned = packed.table, dtype, turned
        self._parameters["weight"] = None
        self.register_parameter("bias", bias)
        for name in _PARTS:
            self.register_buffer(name, getattr(packed, name))
        self._outline: Tensor | None = None
        self.sampled: tuple[tuple[int, ...], bytes] | None = None
        """Shape and samples of the weight it was made of, which tell the base whatever it is stored as."""

    @property
    def packed(self) -> Packed:
        """The stored weight."""
        assert self.codes is not None, "a weight that was folded for good is dense"
        assert self.absmax is not None
        shape = (self.out_features, self.in_features)
        return Packed(self.table, shape, self.codes, self.absmax, self.nested_absmax, self.offset)

    @property
    def is_packed(self) -> bool:
        """Whether codes stand for the weight; not so once a merge has been folded in for good."""
        return self.codes is not None

    @property
    def runs_packed(self) -> bool:
        """Whether the codes are what it runs with: nothing dense stands in for them."""
        return self._parameters["weight"] is None

    @property
    def format(self) -> QuantFormat:
        """What the weight is stored as."""
        return QuantFormat(self.table, self.nested_absmax is not None)

    @property
    def weight(self) -> Tensor:
        """W (out, in): the dense one that stands in for the codes, else rebuilt."""
        dense = self._parameters["weight"]
        return self.dequantized() if dense is None else dense

    @property
    def outline(self) -> Tensor:
        """The dense weight, or a tensor like W that takes no memory and holds NaN: it has W's shape and dtype."""
        dense = self._parameters["weight"]
        if dense is not None:
            return dense
        here = self.packed.codes.device
        if self._outline is None or self._outline.dtype != self.dtype or self._outline.device != here:
            nothing = torch.full((), torch.nan, dtype=self.dtype, device=here)
            self._outline = nothing.expand(self.out_features, self.in_features)
        return self._outline

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out, in) rebuilt from its codes, in `dtype` or the module's own."""
        return dequantize(self.packed, dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b`, x (..., in) in the module's dtype."""
        dense = self._parameters["weight"]
        if dense is not None:
            return nn.functional.linear(x, dense, self.bias)
        return _Product.apply(x, self, self.bias)

    def pack(self, form: QuantFormat) -> None:
        """Store the dense weight that stands here as codes."""
        packed = quantize(self.weight.detach(), form)
        self.table, self.sampled = packed.table, None
        self._hold(packed)
        self._parameters["weight"] = None

    def forget_codes(self) -> None:
        """Let the dense weight that stands in for the codes be there for good."""
        self._hold(None)

    def _hold(self, packed: Packed | None) -> None:
        for name in _PARTS:
            setattr(self, name, getattr(packed, name, None))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={self.table}"

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Moves devices as any module does; a change of dtype is one of the rebuilt weight's, not of the scales'."""
        kept = {name: self._buffers[name] for name in _PARTS}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    # As a file has it: bitsandbytes' names, so that transformers reads it too --------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not None:
                destination[f"{prefix}{name}"] = parameter if keep_vars else parameter.detach()
        if self.runs_packed:
            stored = serialized(self.packed, self.dtype)
            destination.update((f"{prefix}{name}", value) for name, value in stored.items())

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        bias = mine.pop("bias", None)
        if self.bias is not None and bias is None:
            missing_keys.append(f"{prefix}bias")
        elif bias is not None and (self.bias is None or bias.shape != self.bias.shape):
            own = None if self.bias is None else tuple(self.bias.shape)
            error_msgs.append(f"size mismatch for {prefix}bias: {tuple(bias.shape)} in the file, {own} in the model.")
        elif bias is not None and self.bias is not None:
            self.bias.data.copy_(bias)
        try:
            packed = deserialized(mine, prefix.removesuffix("."), (self.out_features, self.in_features))
        except BaseFileError as error:
            error_msgs.append(str(error))
            return
        for name in _PARTS:
            value = getattr(packed, name)
            setattr(self, name, value if value is None or self.absmax is None else value.to(self.absmax.device))
        self.table = packed.table


class _Product(torch.autograd.Function):
    """`x W^T + b` that saves neither x nor W: W is frozen and can be rebuilt, and has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear, bias: Tensor | None) -> Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.dequantized(), bias)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (slope,) = outer
        inner = slope @ ctx.module.dequantized(slope.dtype) if ctx.needs_input_grad[0] else None
        bias = slope.reshape(-1, slope.shape[-1]).sum(dim=0) if ctx.needs_input_grad[2] else None
        return inner, None, bias


def format_of(quant: str) -> QuantFormat:
    """The format of that name. Raises `UsageError` with the nearest names."""
    if quant not in FORMATS:
        bits = [name for name in FORMATS if set(name) & set(quant) & {"4", "8"}]  # "4bit" is never sent to 8
        hint = nearest(quant, bits or FORMATS) or (f"did you mean {bits[0]!r}?" if bits else "")
        raise UsageError("unknown quantisation", got=repr(quant), expected=", ".join(FORMATS), hint=hint)
    return FORMATS[quant]


def quantizable(module: nn.Module) -> bool:
    """Whether a module is a plain linear map with its own weight: torch's Linear or GPT-2's Conv1D, no subclass."""
    plain = type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))
    weight = module._parameters.get("weight")
    return plain and weight is not None and not nn.parameter.is_lazy(weight)


@torch.no_grad()
def quantized(module: nn.Module, quant: str, where: str = "", weight: Tensor | None = None) -> QuantizedLinear:
    """What stands in for a linear module, with its bias.

    Args:
        weight: used in place of the module's own, in the same layout.

    Raises `NonFiniteError`: a NaN would spoil its whole block without a word.
    """
    own = module._parameters["weight"]
    assert own is not None, "quantizable says so"
    value = own.detach() if weight is None else weight
    turned = not isinstance(module, nn.Linear)
    matrix = value.T if turned else value
    if not torch.isfinite(matrix).all():
        raise NonFiniteError("a weight that is not finite cannot be quantised", where=where)
    bias = module._parameters.get("bias")
    found = QuantizedLinear(quantize(matrix.contiguous(), format_of(quant)), value.dtype, bias, turned)
    found.sampled = tuple(value.shape), sampled(value)
    return found.train(module.training)


def quantize_model(model: nn.Module, quant: str, skip: Collection[str] = ()) -> nn.Module:
    """Quantise every plain linear module of a model in place, but those at the paths in `skip`.

    A module that has several names is quantised once; a weight that is stored once for several modules is left alone.

    Raises: UsageError for an unknown `quant`, or a model without linear modules inside; NonFiniteError for a weight.
    """
    format_of(quant)
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if quantizable(module) and name not in skip and counts[id(module._parameters["weight"])] == 1:
            names.setdefault(module, []).append(name)
    if not names or any("" in paths for paths in names.values()):
        raise UsageError(
            "nothing in this model can be quantised", got=type(model).__name__, expected="linear modules inside"
        )
    for module, paths in [*names.items()]:
        replacement = quantized(module, quant, paths[0])
        for path in paths:
            model.set_submodule(path, replacement)
    return model


def sampled_places(weight: Tensor) -> range:
    """Where the values lie that `sampled` looks at."""
    return range(0, weight.numel(), max(1, weight.numel() // _SAMPLES))[:_SAMPLES]


def sampled(weight: Tensor) -> bytes:
    """32 values spread over a tensor, as bfloat16: what tells one weight from another whatever it is stored as."""
    places = sampled_places(weight)
    picked = weight.detach().reshape(-1)[:: places.step][: len(places)].to(torch.bfloat16)
    return picked.view(torch.int16).cpu().numpy().tobytes()
