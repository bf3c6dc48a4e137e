"""Next-token losses whose logits never exist as a whole.

    nll = logsumexp(z) - z[target]        d nll / d h = softmax(z) W - W[target]        z = W h of shape (V,), h (D,)

Source: Wijmans et al. 2024, arXiv:2411.09009, section 3 (the idea: never write the logits).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch gives no types for what autograd functions and its linear algebra return)

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.kernels.chunks import CHUNK, columns_at_once


def head_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """`logsumexp(z) - z[target]`, z = W h + b, of each row of `hidden`, without ever holding all z.

    Args:
        hidden: (M, D). weight: (V, D), frozen. bias: (V,) or None. targets: (M,) int64.

    Returns:
        (M,) in float32 or the hidden states' wider dtype. Within 1e-6 of float64 (relative) for a vocabulary of 49,152.

    Keeps (M, D). Cost: 4 M V D FLOPs with a gradient, all of it forwards, half of it without.
    """
    return _HeadNLL.apply(hidden, weight, bias, targets)


class _HeadNLL(torch.autograd.Function):
    """The gradient of row i is the outer one times a vector that depends on row i alone, which is formed at once.

    Some columns of z exist at a time: what was summed before is scaled down when a larger z comes. The target's z is
    a product of its own.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wide, learns = torch.promote_types(hidden.dtype, torch.float32), ctx.needs_input_grad[0]
        largest = torch.full((len(hidden), 1), -torch.inf, dtype=wide, device=hidden.device)
        total = torch.zeros_like(largest)
        slope = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if learns else None
        for columns in _slices(len(weight), columns_at_once(len(hidden), len(weight))):
            part = weight[columns]
            z = nn.functional.linear(hidden, part, None if bias is None else bias[columns]).to(wide)
            before, largest = largest, torch.maximum(largest, z.amax(1, keepdim=True))
            shrink = (before - largest).exp_()
            z.sub_(largest).exp_()
            total.mul_(shrink).add_(z.sum(1, keepdim=True))
            if slope is not None:
                slope.mul_(shrink).add_(z.to(part.dtype) @ part)
            del z  # before the next one is made
        target = weight[targets]
        if slope is not None:
            ctx.save_for_backward(slope.div_(total).sub_(target).to(hidden.dtype))
        there = torch.linalg.vecdot(hidden.to(wide), target.to(wide)) + (0.0 if bias is None else bias[targets])
        return (total.log_() + largest).squeeze(1) - there

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * outer[0].unsqueeze(1).to(slope.dtype), None, None, None


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """`logsumexp(logits) - logits[target]` of each row of (M, V), shape (M,), in float32 or the logits' wider dtype.

    Saves the logits as they are and one number a row; float32 copies exist for a chunk of rows at a time. Within 1e-6
    of float64 (relative) for a vocabulary of 49,152.
    """
    return _TokenNLL.apply(logits, targets)


class _TokenNLL(torch.autograd.Function):
    """d nll / d logits = softmax(logits) - onehot(target), from the saved logsumexp."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.empty(len(logits), dtype=wide, device=logits.device)
        for rows in _chunks(*logits.shape):
            lse[rows] = logits[rows].to(wide).logsumexp(dim=-1)
        ctx.save_for_backward(logits, targets, lse)
        return lse - logits.gather(1, targets.unsqueeze(1)).squeeze(1).to(wide)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        logits, targets, lse = ctx.saved_tensors
        inner = torch.empty_like(logits)
        for rows in _chunks(*logits.shape):
            slope = (logits[rows].to(lse.dtype) - lse[rows].unsqueeze(1)).exp_()
            slope.scatter_add_(1, targets[rows].unsqueeze(1), torch.full_like(slope[:, :1], -1.0))
            inner[rows] = slope.mul_(outer[0][rows].unsqueeze(1)).to(logits.dtype)
        return inner, None


def _chunks(count: int, width: int) -> list[slice]:
    """Slices of `count` rows that hold `CHUNK` numbers, of `width` each."""
    return _slices(count, max(1, CHUNK // width))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
