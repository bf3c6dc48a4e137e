"""The plain twins: what every faster kernel must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def lora(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The low-rank term `scaling * B A x`, without forming B A.

    Args:
        x: (..., in), any floating dtype; the product runs in it, so float32 factors beside a bfloat16 base cost
            bfloat16 matrix products while their gradients arrive in float32.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: alpha/r, or alpha/sqrt(r) with rsLoRA.

    Returns:
        (..., out) in x's dtype. Cost: 2 r (in + out) FLOPs a row.

    Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
    """
    down = torch.nn.functional.linear(x, lora_A.to(x.dtype))
    return torch.nn.functional.linear(down, lora_B.to(x.dtype)) * scaling


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`scaling * B A`, (out, in), computed in the factors' dtype but never below float32."""
    wide = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    return scaling * (lora_B.to(wide) @ lora_A.to(wide))
