"""LoRA: `h = W x + scaling * B A x`, W frozen. Source: Hu et al. 2021, arXiv:2106.09685, equation 3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.adapter import Method, Tensors
from gossamer.errors import AdapterFileError, StateError, UnsupportedError
from gossamer.kernels import reference
from gossamer.methods.base import Base, Layer, Regex, Shape, TargetedMethod, bias_shift, exactly, wide
from gossamer.spec import StrictFloat, StrictInt

Rank = Annotated[StrictInt, Field(ge=1, le=65536)]


class LoRA(TargetedMethod):
    """Low-rank adaptation: `h = W x + scaling * B A x` with `scaling = alpha / r` (rsLoRA: `alpha / sqrt(r)`).

    A (r, in) starts random, B (out, r) starts at zero, so the output is unchanged at the start. Trainable parameters:
    r (in + out) a module. Merges exactly into `W' = W + scaling * B A`, at zero added latency.

    Source: Hu et al. 2021, arXiv:2106.09685, equation 3; scaling "rslora": Kalajdzievski 2023, arXiv:2312.03732.
    """

    name: ClassVar[str] = "lora"

    r: Rank = 8
    """Rank of the update."""
    alpha: StrictFloat = 16.0
    """Numerator of the scaling."""
    rank_pattern: dict[Regex, Rank] = {}
    """Other ranks for some modules: regular expression for the end of a path -> rank; the first match wins."""
    alpha_pattern: dict[Regex, StrictFloat] = {}
    """Other alphas for some modules, likewise."""
    dropout: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.0
    """Probability with which an input of A is zeroed in training."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which of the model's biases are trained too: none, all, or those of the adapted modules."""
    scaling: Literal["standard", "rslora"] = "standard"
    """"standard": alpha / r; "rslora": alpha / sqrt(r)."""
    start: Literal["gaussian", "kaiming"] = "gaussian"
    """How A starts: normal (the paper's) or uniform (PEFT's); both with variance 1 / (3 in)."""

    def rank_at(self, path: str) -> int:
        """The rank at `path`, patterns applied."""
        return _first_match(self.rank_pattern, path, self.r)

    def scaling_at(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r), at `path`, patterns applied."""
        alpha, rank = _first_match(self.alpha_pattern, path, self.alpha), self.rank_at(path)
        return alpha / (rank**0.5 if self.scaling == "rslora" else rank)

    def layer(self, shape: Shape, generator: torch.Generator) -> LoRALayer:
        rank = self.rank_at(shape.path)
        bound = shape.in_features**-0.5
        factor = torch.empty(rank, shape.in_features)
        if self.start == "gaussian":
            factor.normal_(std=bound / 3**0.5, generator=generator)
        else:
            factor.uniform_(-bound, bound, generator=generator)
        slots = {"lora_A": factor, "lora_B": torch.zeros(shape.out_features, rank)}
        if self.bias != "none" and "bias" in shape.parameters:
            slots["bias"] = wide(shape.parameters["bias"])
        return self._layer(shape, slots)

    def restored(self, shape: Shape, slots: Mapping[str, Tensor]) -> LoRALayer:
        rank = self.rank_at(shape.path)
        expected: dict[str, tuple[int, ...]] = {
            "lora_A": (rank, shape.in_features),
            "lora_B": (shape.out_features, rank),
        }
        if self.bias != "none" and "bias" in shape.parameters:
            expected["bias"] = (shape.out_features,)
        got = {name: tuple(tensor.shape) for name, tensor in slots.items()}
        if got != expected:
            raise AdapterFileError(
                "tensors that do not fit the module", where=shape.path, got=str(got), expected=str(expected)
            )
        return self._layer(shape, slots)

    def _layer(self, shape: Shape, slots: Mapping[str, Tensor]) -> LoRALayer:
        return LoRALayer(slots, self.scaling_at(shape.path), self.dropout).to(
            next(iter(shape.parameters.values())).device
        )

    def bias_modules(self, targets: list[str], biased: list[str]) -> list[str]:
        return biased if self.bias == "all" else []

    def delta(self, path: str, slots: Mapping[str, Tensor]) -> Tensor:
        if "lora_A" not in slots:
            raise UnsupportedError(
                "trained whole, so its change needs the base's own value", where=path, got=str([*slots])
            )
        return reference.lora_delta(slots["lora_A"], slots["lora_B"], self.scaling_at(path))

    def scaled(self, tensors: Tensors, weight: float) -> tuple[Method, Tensors]:
        _only_factors(tensors)
        return self, {
            path: {"lora_A": slots["lora_A"], "lora_B": wide(slots["lora_B"]) * weight}
            for path, slots in tensors.items()
        }

    def summed(self, tensors: Tensors, other: Method, other_tensors: Tensors) -> tuple[Method, Tensors]:
        if not isinstance(other, LoRA):
            raise UnsupportedError("only LoRA adapters can be added to a LoRA adapter", got=other.name)
        _only_factors(tensors)
        _only_factors(other_tensors)
        total: dict[str, dict[str, Tensor]] = {}
        for path in sorted({*tensors, *other_tensors}):
            parts = [(spec, part[path]) for spec, part in ((self, tensors), (other, other_tensors)) if path in part]
            shapes = {(slots["lora_B"].shape[0], slots["lora_A"].shape[1]) for _, slots in parts}
            if len(shapes) > 1:
                raise StateError("weights of different shapes have no sum", where=path, got=str(sorted(shapes)))
            total[path] = {
                "lora_A": torch.cat([wide(slots["lora_A"]) for _, slots in parts]),
                "lora_B": torch.cat([wide(slots["lora_B"]) * spec.scaling_at(path) for spec, slots in parts], dim=1),
            }
        return _unit_scaled(total), total


class LoRALayer(Layer):
    """A and B at one module, with the trained bias where the spec asks for it."""

    def __init__(self, slots: Mapping[str, Tensor], scaling: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(slots["lora_A"].detach().clone())
        self.lora_B = nn.Parameter(slots["lora_B"].detach().clone())
        self.bias = nn.Parameter(slots["bias"].detach().clone()) if "bias" in slots else None
        self.scaling, self.dropout = scaling, dropout

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = base(x, *args, **kwargs)
        dropped = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
        out = out + reference.lora(dropped, self.lora_A, self.lora_B, self.scaling)
        if self.bias is not None:
            out = out + bias_shift(self.bias, base).to(out.dtype)
        return out

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        delta = reference.lora_delta(self.lora_A.detach(), self.lora_B.detach(), self.scaling)
        folded = {"weight": wide(current["weight"]) + delta}
        if self.bias is not None:
            folded["bias"] = current["bias"] + (self.bias.detach() - frozen["bias"])
        return folded


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if matches_end(pattern, path)), default)


def matches_end(pattern: str, path: str) -> bool:
    """Whether a rank or alpha pattern names `path`: it must cover the path, or its end after a dot (PEFT's rule)."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _only_factors(tensors: Tensors) -> None:
    whole = [f"{path}.{slot}" for path, slots in tensors.items() for slot in slots if slot not in ("lora_A", "lora_B")]
    if whole:
        raise UnsupportedError(
            "parameters trained whole (modules_to_save, biases) cannot be scaled or added without the base",
            got=", ".join(whole[:3]) + (" ..." if len(whole) > 3 else ""),
        )


def _unit_scaled(tensors: Tensors) -> LoRA:
    """The spec of concatenated factors: each module at its own rank, every scaling exactly 1."""
    ranks = {path: slots["lora_A"].shape[0] for path, slots in tensors.items()}
    common = max(ranks.values(), key=list(ranks.values()).count, default=1)
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != common}
    alphas = {pattern: float(rank) for pattern, rank in others.items()}
    return LoRA(r=common, alpha=float(common), target_modules=exactly(ranks), rank_pattern=others, alpha_pattern=alphas)
