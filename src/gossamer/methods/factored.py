"""What LoRA and its close relatives share: a pair of factors beside each weight, their ranks, scalings and starts."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.errors import TargetError, UnsupportedError
from gossamer.linalg import LowRankPair
from gossamer.methods import starts
from gossamer.methods.base import AFFINE_KINDS, Base, Shape, wide
from gossamer.methods.targeted import Names, Regex, TargetedMethod, matches_end
from gossamer.spec import StrictFloat, StrictInt

RANDOM_STARTS = ("gaussian", "kaiming")
PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
"""How the factors of a module are called, and those of an embedding, here and in PEFT's files."""
Rank = Annotated[StrictInt, Field(ge=1, le=65536)]


class Factored(TargetedMethod):
    """A method whose layers hold `A` (r, in) and `B` (out, r), used as `scaling * B A`."""

    outer_slots = tuple(second for _, second in PAIRS)

    target_modules: Names | Regex = "all-linear"
    """List of path suffixes, one regular expression, or "all-linear": every linear module but the head."""
    target_parameters: Names = ()
    """Stacked expert matrices (experts, out, in) to adapt, by suffix of their own path: "experts.gate_up_proj"."""
    r: Rank = 8
    """Rank of the update; of each expert's, where experts are stacked."""
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
    start: Literal["gaussian", "kaiming", "pissa", "pissa_fast", "olora"] = "gaussian"
    """How A and B start. "gaussian" (the paper's) and "kaiming" (PEFT's): A random with variance 1 / (3 in), B zero.
    "pissa", "pissa_fast", "olora": from the weight itself, subtracted again by constant factors beside it."""

    def rank_at(self, path: str) -> int:
        """The rank at `path`, patterns applied."""
        return _first_match(self.rank_pattern, path, self.r)

    def scaling_at(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r), at `path`, patterns applied."""
        alpha, rank = _first_match(self.alpha_pattern, path, self.alpha), self.rank_at(path)
        return alpha / (rank**0.5 if self.scaling == "rslora" else rank)

    def factor_slots(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Slot name -> shape of the factors at such a module, with a start's constants and a trained bias."""
        found: dict[str, tuple[int, ...]] = {}
        for name, (count, outer, inner) in shape.matrices.items():
            rank = self.rank_at(f"{shape.path}.{name}") * count
            found |= {f"{name}.lora_A": (rank, inner), f"{name}.lora_B": (outer, rank)}
        if shape.kind in AFFINE_KINDS:
            rank = self._grouped_rank(shape)
            first, second = factor_names(shape)
            found |= {first: (rank, shape.in_features, *shape.kernel)}
            found |= {second: (shape.out_features, rank // shape.groups, *(1 for _ in shape.kernel))}
            if self.start not in RANDOM_STARTS:
                found |= {"start_A": found[first], "start_B": found[second]}
            if self.bias != "none" and "bias" in shape.parameters:
                found["bias"] = (shape.out_features,)
        return dict(sorted(found.items()))

    def _grouped_rank(self, shape: Shape) -> int:
        rank = self.rank_at(shape.path)
        if rank % shape.groups:
            raise TargetError(
                "the rank at a grouped convolution is a multiple of its groups",
                where=shape.path,
                got=f"rank {rank}",
                expected=f"a multiple of {shape.groups}",
            )
        return rank

    def factor_values(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        """First values of `factor_slots`."""
        shape, expected = base.shape, self.factor_slots(base.shape)
        slots = {name: torch.zeros(size) for name, size in expected.items() if name != "bias"}
        if self.start not in RANDOM_STARTS:
            slots |= self._decomposed(base, generator)
        else:
            for name, slot in slots.items():  # one factor random, the other zero, so that B A starts at zero
                if name.endswith(("embedding_B", "lora_A")):
                    self._draw(slot, generator)
        if "bias" in expected:
            slots["bias"] = wide(shape.parameters["bias"])
        return slots

    def _draw(self, slot: Tensor, generator: torch.Generator) -> None:
        """Random values of variance 1 / (3 fan_in), normal or uniform."""
        bound = math.prod(slot.shape[1:]) ** -0.5
        if self.start == "gaussian":
            slot.normal_(std=bound / 3**0.5, generator=generator)
        else:
            slot.uniform_(-bound, bound, generator=generator)

    def _decomposed(self, base: Base, generator: torch.Generator) -> dict[str, Tensor]:
        """Factors made of the weight, and the constants that subtract them again."""
        shape = base.shape
        if shape.groups > 1 or shape.matrices:
            raise UnsupportedError("this start needs one whole matrix", where=shape.path, got=f"start={self.start!r}")
        weight, scaling = wide(base.affine()[0].detach()).flatten(1), self.scaling_at(shape.path)
        rank, most = self.rank_at(shape.path), min(weight.shape)
        if rank > most:
            raise TargetError(
                "a start made of the weight has at most its rank",
                where=shape.path,
                got=str(rank),
                expected=f"<= {most}",
            )
        if self.start == "pissa_fast":
            inner, outer = starts.pissa_fast(weight, rank, scaling, generator)
        else:
            inner, outer = (starts.pissa if self.start == "pissa" else starts.olora)(weight, rank, scaling)
        first, second = factor_names(shape)
        inner, outer = inner.reshape(rank, -1, *shape.kernel), outer.reshape(*outer.shape, *(1 for _ in shape.kernel))
        return {first: inner, second: outer, "start_A": inner.clone(), "start_B": outer.clone()}

    def bias_modules(self, targets: list[str], biased: list[str]) -> list[str]:
        return biased if self.bias == "all" else []


def factor_names(shape: Shape) -> tuple[str, str]:
    """How the factors of such a module are called."""
    return PAIRS[shape.kind == "embedding"]


def factors_in(slots: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The two factors among a layer's slots, if it has one pair of them."""
    return next(((slots[first], slots[second]) for first, second in PAIRS if first in slots), None)


def change_of(pairs: Sequence[tuple[Tensor, Tensor]], scaling: float) -> Tensor:
    """`scaling * (B A - B0 A0)` of A and B, and perhaps A0 and B0: (out, in, *kernel), at least float32."""
    first, *start = (LowRankPair(inner.flatten(1), outer.flatten(1)).delta() for inner, outer in pairs)
    change = scaling * (first - start[0] if start else first)
    return change.reshape(len(change), *pairs[0][0].shape[1:])


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if matches_end(pattern, path)), default)
