"""Sums of changes, and what PEFT calls one."""

from __future__ import annotations

import torch

from gossamer.errors import UnsupportedError
from gossamer.merging.combining.module import Matrix, Result, way


@way("exact")
@way("svd")
def exact(matrix: Matrix) -> Result:
    """The weighted sum of changes, `sum_k w_k D_k`, with nothing lost: factors side by side, ranks add.

    Also called "svd", as PEFT does, when it is asked for with a lower rank, which is then the nearest one.

    Source: task arithmetic, Ilharco et al. 2022, arXiv:2212.04089, section 2.
    """
    return matrix.stacked()


@way("linear")
def linear(matrix: Matrix) -> Result:
    """PEFT's "linear": A and B are summed apart, so that every B also meets the other adapters' A.

        A = sum_k sign(w_k) |w_k|^(1/2) A_k        B = sum_k |w_k|^(1/2) B_k        scalings among the weights

    Not the sum of changes: `B A` holds all the cross terms `B_j A_k`. Here for results that were tuned with it. All
    adapters must have one rank; whether a scaling is in B or shared between both, as in PEFT, changes the cross terms,
    so it is shared here as there.
    """
    ranks = {change.inner.shape[0] for change in matrix.changes}
    if len(ranks) > 1:
        raise UnsupportedError(
            "A and B can be summed apart at one rank only", where=matrix.path, got=f"ranks {sorted(ranks)}"
        )
    roots = [abs(change.weight * change.scaling) ** 0.5 for change in matrix.changes]
    signs = [1.0 if change.weight * change.scaling >= 0 else -1.0 for change in matrix.changes]
    inner = [sign * root * change.inner for sign, root, change in zip(signs, roots, matrix.changes, strict=True)]
    outer = [root / (change.scaling or 1.0) * change.outer for root, change in zip(roots, matrix.changes, strict=True)]
    return torch.stack(inner).sum(0), torch.stack(outer).sum(0)
