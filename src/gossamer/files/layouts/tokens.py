"""`trainable_token_indices`: which rows of which embedding a file holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gossamer.adapter import Tensors
from gossamer.methods import TargetedMethod
from gossamer.methods.tokens import SLOT


def counted(path: str, rows: Tensor, spec: TargetedMethod) -> bool:
    """Whether the spec names the embedding, and as many rows of it."""
    wanted = spec.trainable_tokens
    return rows.ndim == 2 and len(rows) == len(_of(path, wanted) if isinstance(wanted, dict) else wanted)


def indices(spec: TargetedMethod, tensors: Tensors) -> Any:
    """What PEFT's config says: a list for the input embedding, or whole paths, which its looser rule cannot mistake."""
    wanted = spec.trainable_tokens
    if not isinstance(wanted, dict):
        return list(wanted) or None
    return {path: list(_of(path, wanted)) for path, slots in tensors.items() if SLOT in slots} or None


def _of(path: str, wanted: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    if path in wanted:
        return wanted[path]
    return next((rows for entry, rows in wanted.items() if path.endswith(f".{entry}")), ())
