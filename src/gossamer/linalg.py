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


def factor_svd(inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of `B A`, through the small core of two QR decompositions.

        B = Q R    A^T = P S    R S^T = X diag(s) Y^T    B A = (Q X) diag(s) (P Y)^T

    Args:
        inner: A, (..., r, in), float32 or wider. outer: B, (..., out, r), of the same dtype.

    Returns:
        U (..., out, k), s (..., k), V^T (..., k, in), largest first. Without leading dimensions k is at most
        min(r, in, out). Cost: O(r^2 (in + out)); the (out, in) matrix is never formed.
    """
    left, core_left = torch.linalg.qr(outer)
    right, core_right = torch.linalg.qr(inner.mT)
    turn, values, turned = torch.linalg.svd(core_left @ core_right.mT, full_matrices=False)
    return left @ turn, values, turned @ right.mT


def product_norm(inner: Tensor, outer: Tensor) -> float:
    """The Frobenius norm of `B A`, (..., r, in) and (..., out, r); formed only where the factors are no smaller."""
    if inner.shape[-2] >= min(inner.shape[-1], outer.shape[-2]):
        return (outer @ inner).norm().item()
    cores = torch.linalg.qr(outer, mode="r").R @ torch.linalg.qr(inner.mT, mode="r").R.mT
    return cores.norm().item()


def truncated(inner: Tensor, outer: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The factors of rank at most `rank` that are nearest to `B A` in the Frobenius norm, evenly balanced.

    Args:
        inner: A, (r, in), float32 or wider. outer: B, (out, r).
        seed: see `nearest_factors`, which serves where the factors are so wide that the matrix itself is smaller.

    Returns: `diag(s)^(1/2) V^T` (rank, in) and `U diag(s)^(1/2)` (out, rank).

    Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    if 2 * inner.shape[0] > min(inner.shape[1], outer.shape[0]):
        return nearest_factors(outer @ inner, rank, seed)
    left, values, right = factor_svd(inner, outer)
    return balanced(left[:, :rank], values[:rank], right[:rank])


def nearest_factors(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same of a matrix (out, in): by a random subspace of that seed where the rank is small, else exactly.

    Returns: A (rank, in) and B (out, rank), in float32 or the matrix's wider dtype; fewer where it has fewer.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if 4 * rank <= min(matrix.shape):
        return balanced(*randomised_svd(matrix, rank, torch.Generator().manual_seed(seed)))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return balanced(left[:, :rank], values[:rank], right[:rank])


def balanced(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with the root of the singular values in each."""
    root = values.sqrt()
    return root[:, None] * right, left * root


def all_zero(tensor: Tensor) -> bool:
    """Whether every number is zero; nearly always the first one tells."""
    return not tensor.numel() or (tensor[(0,) * tensor.ndim].item() == 0 and not tensor.any().item())
