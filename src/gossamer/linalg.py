"""Arithmetic on the product B A that never forms it."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """Singular values of `scaling * B A`, largest first.

    With B = Q R and A^T = P S they are those of the (r, r) matrix `scaling * R S^T`.

    Args:
        lora_A: (r, in). lora_B: (out, r).

    Returns:
        (r,) in float32 or the factors' wider dtype. Cost: O(r^2 (in + out)).
    """
    wide = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    outer = torch.linalg.qr(lora_B.to(wide), mode="r").R
    inner = torch.linalg.qr(lora_A.T.to(wide), mode="r").R
    return torch.linalg.svdvals(outer @ inner.T) * abs(scaling)
