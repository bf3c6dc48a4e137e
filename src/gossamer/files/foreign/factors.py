"""What every format of another tool says: a pair of factors at each module, and the number that scales them.

delta(path) = alpha / rank * up @ down        down (rank, in, *kernel), up (out, rank, 1...)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gossamer.adapter import Adapter
from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.linalg import LowRankPair
from gossamer.methods import LoRA
from gossamer.methods.doubled import as_plain
from gossamer.methods.factored import RANDOM_STARTS
from gossamer.methods.targeted import exactly


@dataclass(frozen=True)
class Factors:
    """The change of one weight as a file holds it: `alpha / rank * up @ down`, of matrices or of convolutions."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Of the pair."""
        return self.down.shape[0]

    @property
    def pair(self) -> LowRankPair:
        """The same for computing with, kernels flat, in float64."""
        return LowRankPair(self.down.double().flatten(1), self.up.double().flatten(1), self.alpha / self.rank)


def factors_of(adapter: Adapter, format_name: str) -> tuple[dict[str, Factors], list[str]]:
    """The adapter's factors by module path, and in words what of its spec no such list says.

    Raises `UnsupportedError` by name for what is no pair of factors: DoRA, whole parameters, experts, embeddings.
    """
    spec = adapter.spec
    if not isinstance(spec, LoRA):
        raise UnsupportedError(
            f"{format_name} holds plain LoRA factors alone", got=spec.name, hint="merge it into the base instead"
        )
    lost = [f"dropout={spec.dropout} (training only)"] if spec.dropout else []
    if spec.start not in RANDOM_STARTS:
        lost.append(f"start={spec.start!r} (written as the plain adapter of twice the rank that computes the same)")
    spec, tensors = as_plain(spec, adapter.tensors)
    if spec.scaling == "rslora":
        lost.append("scaling='rslora' (written as the alpha that scales alike)")
    found: dict[str, Factors] = {}
    for path, slots in tensors.items():
        if set(slots) != {"lora_A", "lora_B"}:
            raise UnsupportedError(f"{format_name} has no place for these tensors", where=path, got=", ".join(slots))
        rank = slots["lora_A"].shape[0]
        found[path] = Factors(slots["lora_A"], slots["lora_B"], _round_alpha(spec.scaling_at(path) * rank))
    return found, lost


def _round_alpha(alpha: float) -> float:
    """Without the last bit that dividing by the rank and multiplying again may have moved."""
    near = round(alpha, 9)
    return near if abs(near - alpha) <= 4e-16 * abs(alpha) else alpha


def adapter_from(factors: Mapping[str, Factors], source: Path, format_name: str) -> Adapter:
    """The LoRA adapter that these factors are, each checked. Raises `AdapterFileError`."""
    if not factors:
        raise AdapterFileError(f"no factors of {format_name} are in it", where=str(source))
    for path, one in factors.items():
        _check(path, one, source)
    rank, alpha = (_commonest([getattr(one, name) for one in factors.values()]) for name in ("rank", "alpha"))
    spec = LoRA(
        r=int(rank),
        alpha=float(alpha),
        target_modules=exactly(factors),
        rank_pattern={f"^{re.escape(path)}": one.rank for path, one in factors.items() if one.rank != rank},
        alpha_pattern={f"^{re.escape(path)}": one.alpha for path, one in factors.items() if one.alpha != alpha},
    )
    tensors = {path: {"lora_A": one.down, "lora_B": one.up} for path, one in factors.items()}
    return Adapter(spec, tensors, provenance={"operation": "convert", "from": format_name, "file": source.name})


def with_one_alpha(factors: Mapping[str, Factors], per_rank: bool) -> tuple[Mapping[str, Factors], float, list[str]]:
    """The same factors under one alpha (or, with `per_rank`, one alpha / rank), others scaled into `up`."""
    numbers = {path: one.alpha / (one.rank if per_rank else 1) for path, one in factors.items()}
    common = _commonest(list(numbers.values()))
    others = [path for path, number in numbers.items() if number != common]
    if not others:
        return factors, common, []
    folded = {
        path: Factors(one.down, (one.up.float() * (numbers[path] / common)).to(one.up.dtype), one.alpha)
        if path in others
        else one
        for path, one in factors.items()
    }
    return folded, common, [f"{len(others)} modules' own scaling (multiplied into their up factors, rounded once)"]


def _check(path: str, one: Factors, source: Path) -> None:
    down, up, where = one.down, one.up, f"{source}: {path}"
    fits = down.ndim == up.ndim >= 2 and down.shape[0] == up.shape[1] > 0 and all(size == 1 for size in up.shape[2:])
    if not fits or 0 in (*down.shape, *up.shape):
        raise AdapterFileError(
            "factors that make no matrix",
            where=where,
            got=f"{tuple(down.shape)} and {tuple(up.shape)}",
            expected="(rank, in) and (out, rank)",
        )
    for factor in (down, up):
        if not factor.is_floating_point() or not torch.isfinite(factor).all():
            raise AdapterFileError("a tensor that is not made of finite numbers", where=where, got=str(factor.dtype))
    if not -1e30 < one.alpha < 1e30:  # NaN too
        raise AdapterFileError("an alpha that is no finite number", where=where, got=str(one.alpha))


def _commonest(numbers: list[float]) -> float:
    return max(dict.fromkeys(numbers), key=numbers.count)
