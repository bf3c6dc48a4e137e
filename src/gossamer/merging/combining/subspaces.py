"""Ways that align or equalise the directions of the changes. All of them work on factors; no matrix is formed."""

import torch
from torch import Tensor

from gossamer.linalg import LowRankPair
from gossamer.merging.combining.module import Matrix, Result, share, way
from gossamer.merging.combining.sparse import merged_as


@way("knots")
def knots(matrix: Matrix, *, density: float = 0.2, inside: str = "ties", scaled: bool = False) -> Result:
    """Bring all changes into one basis of outputs, and merge there how each reads its inputs.

        [D_1 ... D_n] = U diag(s) [V_1^T ... V_n^T]        D = U diag(s) merged(V_1^T, ..., V_n^T)

    `inside` is the way in which the V_k are merged: "ties" as in the paper (trimmed to `density`), or "sum", which
    gives the exact sum back. The rank is that of all B side by side. `scaled` merges the diag(s) V_k^T instead, as the
    authors' own program does: strong directions then keep more of their entries than weak ones.

    Source: Stoica et al. 2024, arXiv:2410.19735, section 4.
    """
    share(density, "density")
    pairs = [pair.folded() for pair in matrix.pairs]
    inners = [torch.linalg.qr(pair.lora_A.T) for pair in pairs]  # A_k^T = Q_k R_k
    outer = torch.cat([pair.lora_B for pair in pairs], 1)
    left, values, turned = LowRankPair(torch.block_diag(*(core.T for _, core in inners)), outer).svd()
    keep = _rank(values, matrix.shape)
    sizes = [basis.shape[1] for basis, _ in inners]
    left, values = left[:, :keep], values[:keep]
    turned = values[:, None] * turned[:keep] if scaled else turned[:keep]
    directions = [
        (weight, part @ basis.T)  # V_k^T, (rank, in)
        for weight, part, (basis, _) in zip(matrix.weights, turned.split(sizes, 1), inners, strict=True)
    ]
    return LowRankPair(merged_as(inside, directions, density), left if scaled else left * values)


@way("iso_c")
def iso_c(matrix: Matrix) -> Result:
    """The weighted sum with all its singular values made equal to their mean: no adapter's directions outweigh others'.

        sum_k w_k D_k = U diag(s) V^T        D = mean(s) U V^T

    The mean is over the singular values that the sum has, which are as many as its rank.

    Source: Marczak et al. 2025, arXiv:2502.04959, algorithm 1.
    """
    left, values, right = _decomposed(matrix.sum())
    return LowRankPair(right, left * values.mean() if len(values) else left)


@way("iso_cts")
def iso_cts(matrix: Matrix, *, common: float = 0.8) -> Result:
    """Iso-C with room for what is one adapter's own.

    Of the sum's r directions the first k = `common` * r are kept. From each change what lies in those is taken away,
    and the first (r - k) / n directions of the rest, rounded down, join them; k grows by what rounding leaves. U and V
    are made orthonormal (U <- P Q^T of its SVD P diag Q^T), and `D = mean(s) U V^T` over all singular values found.

    Source: Marczak et al. 2025, arXiv:2502.04959, algorithm 2.
    """
    share(common, "common")
    left, values, right = _decomposed(matrix.sum())
    own = int((len(values) - round(common * len(values))) / len(matrix.pairs))
    keep = len(values) - own * len(matrix.pairs)
    parts = [(left[:, :keep], values[:keep], right[:keep])]
    for weight, pair in zip(matrix.weights, matrix.pairs, strict=True) if own else ():
        outer = pair.scaled(weight).folded().lora_B
        rest = outer - left[:, :keep] @ (left[:, :keep].T @ outer)
        first, size, second = LowRankPair(pair.lora_A, rest).svd()
        parts.append((first[:, :own], size[:own], second[:own]))
    spectrum = torch.cat([values for _, values, _ in parts])
    outer = _orthonormal(torch.cat([one for one, _, _ in parts], 1))
    inner = _orthonormal(torch.cat([one.T for _, _, one in parts], 1)).T
    return LowRankPair(inner, outer * spectrum.mean() if len(spectrum) else outer)


def _orthonormal(columns: Tensor) -> Tensor:
    """The orthonormal matrix nearest to a tall one."""
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    return left @ right


def _decomposed(pair: LowRankPair) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of `B A` without the directions that rounding alone gave it."""
    left, values, right = pair.svd()
    keep = _rank(values, pair.shape)
    return left[:, :keep], values[:keep], right[:keep]


def _rank(values: Tensor, shape: tuple[int, ...]) -> int:
    """How many singular values are more than rounding; numpy's rule."""
    return int((values > values[:1] * max(shape) * torch.finfo(values.dtype).eps).sum())
