"""Low-rank pairs, `scaling * B A`, and the decompositions they come from; the product is formed where it is smaller.

B = Q R    A^T = P S    R S^T = X diag(s) Y^T    B A = (Q X) diag(s) (P Y)^T
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch's linear algebra has no types)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRankPair:
    """The change `scaling * B A` of a matrix, or of each matrix of a stack.

    Attributes:
        lora_A: (..., r, in). lora_B: (..., out, r), with the same leading dimensions. scaling: alpha / r, or the like.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Inner dimension r of each matrix."""
        return self.lora_A.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of what it changes, (..., out, in)."""
        return (*self.lora_B.shape[:-1], self.lora_A.shape[-1])

    def __getitem__(self, index: int) -> LowRankPair:
        """One matrix's pair of a stack."""
        return replace(self, lora_A=self.lora_A[index], lora_B=self.lora_B[index])

    def to(self, *like: Any) -> LowRankPair:
        """Both factors as `Tensor.to` makes them."""
        return replace(self, lora_A=self.lora_A.to(*like), lora_B=self.lora_B.to(*like))

    def wide(self) -> LowRankPair:
        """Both factors without gradient in one dtype, their wider one, at least float32."""
        dtype = torch.promote_types(torch.promote_types(self.lora_A.dtype, self.lora_B.dtype), torch.float32)
        return LowRankPair(self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype), self.scaling)

    def scaled(self, weight: float) -> LowRankPair:
        """`weight` times the change: the scaling alone differs."""
        return replace(self, scaling=weight * self.scaling)

    def folded(self) -> LowRankPair:
        """The same change with the scaling multiplied into B."""
        return self if self.scaling == 1.0 else LowRankPair(self.lora_A, self.scaling * self.lora_B)

    @classmethod
    def concatenated(cls, pairs: Sequence[LowRankPair]) -> LowRankPair:
        """The exact sum of changes of one shape: A below each other, scaled B side by side; ranks add."""
        if len(pairs) == 1:
            return pairs[0]
        folded = [pair.folded() for pair in pairs]
        return cls(torch.cat([one.lora_A for one in folded], -2), torch.cat([one.lora_B for one in folded], -1))

    @classmethod
    def stacked(cls, pairs: Sequence[LowRankPair]) -> LowRankPair:
        """Pairs of single matrices as one of a stack, (count, ...), with zeros up to the largest rank."""
        most = max([1, *(pair.rank for pair in pairs)])
        folded = [pair.folded() for pair in pairs]
        inner = [torch.nn.functional.pad(one.lora_A, (0, 0, 0, most - one.rank)) for one in folded]
        outer = [torch.nn.functional.pad(one.lora_B, (0, most - one.rank)) for one in folded]
        return cls(torch.stack(inner), torch.stack(outer))

    def apply(self, x: Tensor) -> Tensor:
        """The low-rank term `scaling * B A x` of a single matrix: the plain twin of every faster kernel.

        Args:
            x: (..., in), any floating dtype; the product runs in it, so float32 factors beside a bfloat16 base cost
                bfloat16 matrix products while their gradients arrive in float32.

        Returns:
            (..., out) in x's dtype. Cost: 2 r (in + out) FLOPs a row.

        Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
        """
        down = torch.nn.functional.linear(x, self.lora_A.to(x.dtype))
        return torch.nn.functional.linear(down, self.lora_B.to(x.dtype)) * self.scaling

    def delta(self) -> Tensor:
        """`scaling * B A`, (..., out, in), in the factors' wider dtype and at least float32."""
        dtype = torch.promote_types(torch.promote_types(self.lora_A.dtype, self.lora_B.dtype), torch.float32)
        return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    def is_finite(self) -> bool:
        """Whether no factor holds NaN or infinity."""
        return bool(self.lora_A.isfinite().all() and self.lora_B.isfinite().all())

    def norm(self) -> float:
        """The Frobenius norm of the change, of all matrices together."""
        pair = self.folded()
        if pair.rank >= min(pair.shape[-2:]):
            return (pair.lora_B @ pair.lora_A).norm().item()
        cores = torch.linalg.qr(pair.lora_B, mode="r").R @ torch.linalg.qr(pair.lora_A.mT, mode="r").R.mT
        return cores.norm().item()

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition, through the small core of two QR decompositions; float32 or wider.

        Returns:
            U (..., out, k), s (..., k), V^T (..., k, in), largest first. Without leading dimensions k is at most
            min(r, in, out). Cost: O(r^2 (in + out)); the (out, in) matrix is never formed.
        """
        pair = self.folded()
        left, core_left = torch.linalg.qr(pair.lora_B)
        right, core_right = torch.linalg.qr(pair.lora_A.mT)
        turn, values, turned = torch.linalg.svd(core_left @ core_right.mT, full_matrices=False)
        return left @ turn, values, turned @ right.mT

    def resized(self, rank: int, seed: int = 0) -> LowRankPair:
        """The pair of rank at most `rank` that is nearest in the Frobenius norm, evenly balanced; of a single matrix.

        Args:
            seed: see `nearest`, which serves where the factors are so wide that the matrix itself is smaller.

        Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
        """
        if 2 * self.rank > min(self.shape):
            pair = self.folded()
            return self.nearest(pair.lora_B @ pair.lora_A, rank, seed)
        return self.balanced(*self.svd(), rank)

    @classmethod
    def nearest(cls, matrix: Tensor, rank: int, seed: int = 0) -> LowRankPair:
        """The nearest pair to a matrix (out, in), in float32 or the matrix's wider dtype.

        By a random subspace of that seed where the rank is small, else exactly; a smaller rank where it has no more.
        """
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        if 4 * rank <= min(matrix.shape):
            left, values, right = randomised_svd(matrix, rank, torch.Generator().manual_seed(seed))
        else:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return cls.balanced(left, values, right, rank)

    @classmethod
    def balanced(cls, left: Tensor, values: Tensor, right: Tensor, rank: int) -> LowRankPair:
        """The first `rank` singular triplets, with the root of the singular values in each factor."""
        root = values[..., :rank].sqrt()
        return cls(root[..., None] * right[..., :rank, :], left[..., :rank] * root[..., None, :])


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


def all_zero(tensor: Tensor) -> bool:
    """Whether every number is zero; nearly always the first one tells."""
    return not tensor.numel() or (tensor[(0,) * tensor.ndim].item() == 0 and not tensor.any().item())
