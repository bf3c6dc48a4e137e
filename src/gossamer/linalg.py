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


def randomised_svd(
    matrix: Tensor, rank: int, generator: torch.Generator, iterations: int = 16, oversample: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, by power iteration on a random subspace.

    Args:
        matrix: (out, in). generator: of the subspace, on the CPU; equal seeds give equal bits.
        iterations: products with the matrix and its transpose; the error of component i falls with the power
            2 iterations + 1 of s_(r + oversample + 1) / s_i.
        oversample: extra dimensions of the subspace, dropped at the end.

    Returns:
        U (out, r), S (r,), V^T (r, in), largest first, in float32 or the matrix's wider dtype; no more triplets than
        the matrix has. Cost: O(out in (r + oversample)) an iteration.

    Source: Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    size = min(rank + oversample, *matrix.shape)
    drawn = torch.randn(matrix.shape[1], size, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ drawn).Q  # orthonormal after every product, or all columns become the first one
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]
