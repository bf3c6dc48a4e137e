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


def dora(out: Tensor, term: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    """`ratio * (W x + scaling * B A x) + b`, from the frozen output and the low-rank term.

    Args:
        out: W x + b, channels last.
        term: scaling * B A x, likewise.
        ratio: (channels,), the magnitude over the norm of W + scaling * B A, row by row; 1 leaves `out` bit for bit.
        bias: b, (channels,), which is not scaled.

    Source: Liu et al. 2024, arXiv:2402.09353, equation 5.
    """
    ratio = ratio.to(out.dtype)
    frozen = out if bias is None else out - bias
    return out + (ratio - 1) * frozen + ratio * term


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`scaling * B A`, (out, in), computed in the factors' dtype but never below float32."""
    wide = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    return scaling * (lora_B.to(wide) @ lora_A.to(wide))
