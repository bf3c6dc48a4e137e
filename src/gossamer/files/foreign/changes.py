"""What every format of another tool says: a pair of factors at each module, and the number that scales them.

delta(path) = alpha / rank * up @ down        down (rank, in, *kernel), up (out, rank, 1...)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gossamer.adapter import Adapter
from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.methods import LoRA
from gossamer.methods.doubled import plain_fields, plain_slots
from gossamer.methods.targeted import exactly

RANDOM_STARTS = ("gaussian", "kaiming")


@dataclass(frozen=True)
class Change:
    """The change of one weight: `alpha / rank * up @ down`."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Of the pair."""
        return self.down.shape[0]


Changes = dict[str, Change]


def changes_of(adapter: Adapter, format_name: str) -> tuple[Changes, list[str]]:
    """The adapter's changes, and in words what of its spec no such list says.

    Raises `UnsupportedError` by name for what is no pair of factors: DoRA, whole parameters, experts, embeddings.
    """
    spec = adapter.spec
    if not isinstance(spec, LoRA):
        raise UnsupportedError(
            f"{format_name} holds plain LoRA factors alone", got=spec.name, hint="merge it into the base instead"
        )
    lost = [f"dropout={spec.dropout} (training only)"] if spec.dropout else []
    tensors = adapter.tensors
    if spec.start not in RANDOM_STARTS:
        lost.append(f"start={spec.start!r} (written as the plain adapter of twice the rank that computes the same)")
        spec, tensors = LoRA(**plain_fields(spec)), {path: plain_slots(slots) for path, slots in tensors.items()}
    if spec.scaling == "rslora":
        lost.append("scaling='rslora' (written as the alpha that scales alike)")
    found: Changes = {}
    for path, slots in tensors.items():
        if set(slots) != {"lora_A", "lora_B"}:
            raise UnsupportedError(f"{format_name} has no place for these tensors", where=path, got=", ".join(slots))
        rank = slots["lora_A"].shape[0]
        found[path] = Change(slots["lora_A"], slots["lora_B"], round_alpha(spec.scaling_at(path) * rank))
    return found, lost


def round_alpha(alpha: float) -> float:
    """Without the last bit that dividing by the rank and multiplying again may have moved."""
    near = round(alpha, 9)
    return near if abs(near - alpha) <= 4e-16 * abs(alpha) else alpha


def adapter_from(changes: Mapping[str, Change], source: Path, format_name: str) -> Adapter:
    """The LoRA adapter that says these changes, each checked. Raises `AdapterFileError`."""
    if not changes:
        raise AdapterFileError(f"no factors of {format_name} are in it", where=str(source))
    for path, change in changes.items():
        _check(path, change, source)
    rank, alpha = (_commonest([getattr(one, name) for one in changes.values()]) for name in ("rank", "alpha"))
    spec = LoRA(
        r=int(rank),
        alpha=float(alpha),
        target_modules=exactly(changes),
        rank_pattern={f"^{re.escape(path)}": one.rank for path, one in changes.items() if one.rank != rank},
        alpha_pattern={f"^{re.escape(path)}": one.alpha for path, one in changes.items() if one.alpha != alpha},
    )
    tensors = {path: {"lora_A": one.down, "lora_B": one.up} for path, one in changes.items()}
    return Adapter(spec, tensors, provenance={"operation": "convert", "from": format_name, "file": source.name})


def with_one_alpha(changes: Changes, per_rank: bool) -> tuple[Changes, float, list[str]]:
    """The same changes under one alpha (or, with `per_rank`, one alpha / rank), others scaled into `up`."""
    numbers = {path: one.alpha / (one.rank if per_rank else 1) for path, one in changes.items()}
    common = _commonest(list(numbers.values()))
    others = [path for path, number in numbers.items() if number != common]
    if not others:
        return changes, common, []
    folded = {
        path: Change(one.down, (one.up.float() * (numbers[path] / common)).to(one.up.dtype), one.alpha)
        if path in others
        else one
        for path, one in changes.items()
    }
    return folded, common, [f"{len(others)} modules' own scaling (multiplied into their up factors, rounded once)"]


def only_matrices(changes: Changes, format_name: str) -> None:
    """Refuse convolutions by name, where a format holds matrices alone."""
    for path, one in changes.items():
        if one.down.ndim != 2:
            raise UnsupportedError(
                f"{format_name} holds linear modules alone", where=path, got=f"a convolution, {tuple(one.down.shape)}"
            )


def _check(path: str, change: Change, source: Path) -> None:
    down, up, where = change.down, change.up, f"{source}: {path}"
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
    if not -1e30 < change.alpha < 1e30:  # NaN too
        raise AdapterFileError("an alpha that is no finite number", where=where, got=str(change.alpha))


def _commonest(numbers: list[float]) -> float:
    return max(dict.fromkeys(numbers), key=numbers.count)
