"""Adapter layers with their backward written out, so that less is computed and less is kept than autograd would."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch gives no types for what autograd functions and its linear algebra return)

from typing import Any

import torch
from torch import Tensor


def dora(out: Tensor, down: Tensor, lora_B: Tensor, ratio: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """`plain_dora` of `term = scaling * B down`: the low-rank product is accumulated onto `out`, in one pass.

    Args:
        out: (..., out), W x + b. down: (..., r), A x. lora_B: (out, r). ratio: (out,).
        bias: (out,) or None.

    Returns:
        (..., out). Keeps one tensor of its size for the backward, which costs two passes over it.
    """
    factor, ratio = lora_B.to(out.dtype), ratio.to(out.dtype)
    flat = _DoRA.apply(out.flatten(0, -2), down.flatten(0, -2), factor, ratio, bias, scaling)
    return flat.view_as(out)


class _DoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, down: Tensor, factor: Tensor, ratio: Tensor, bias: Any, scaling: float
    ) -> Tensor:
        whole = torch.addmm(out, down, factor.T, alpha=scaling)
        ctx.save_for_backward(whole, down, factor, ratio, bias)
        ctx.scaling = scaling
        if bias is None:
            return whole * ratio
        return torch.addcmul(bias * (1 - ratio), whole, ratio)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        whole, down, factor, ratio, bias = ctx.saved_tensors
        (grad,) = grads
        for_ratio = torch.linalg.vecdot(grad, whole, dim=0)
        if bias is not None:
            for_ratio = for_ratio - bias * grad.sum(0)
        scaled = grad * ratio
        for_down = ctx.scaling * (scaled @ factor)
        for_factor = ctx.scaling * (scaled.T @ down)
        return scaled, for_down, for_factor, for_ratio, None, None


def plain_dora(out: Tensor, term: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    """The plain twin: `ratio * (W x + scaling * B A x) + b`, from the frozen output and the low-rank term.

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
