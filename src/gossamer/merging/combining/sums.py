"""Sums of changes, and what PEFT calls one."""

import math

import torch

from gossamer.errors import UnsupportedError
from gossamer.linalg import LowRankPair
from gossamer.merging.combining.module import Matrix, Result, way


@way("exact")
@way("svd")
def exact(matrix: Matrix) -> Result:
    """The weighted sum of changes, `sum_k w_k D_k`, with nothing lost: factors side by side, ranks add.

    Also called "svd", as PEFT does, when it is asked for with a lower rank, which is then the nearest one.

    Source: task arithmetic, Ilharco et al. 2022, arXiv:2212.04089, section 2.
    """
    return matrix.sum()


@way("linear")
def linear(matrix: Matrix) -> Result:
    """PEFT's "linear": A and B are summed apart, so that every B also meets the other adapters' A.

        A = sum_k sign(w_k) |w_k|^(1/2) A_k        B = sum_k |w_k|^(1/2) B_k        scalings among the weights

    Not the sum of changes: `B A` holds all the cross terms `B_j A_k`. Here for results that were tuned with it. All
    adapters must have one rank; whether a scaling is in B or shared between both, as in PEFT, changes the cross terms,
    so it is shared here as there.
    """
    ranks = {pair.rank for pair in matrix.pairs}
    if len(ranks) > 1:
        raise UnsupportedError(
            "A and B can be summed apart at one rank only", where=matrix.path, got=f"ranks {sorted(ranks)}"
        )
    wanted = [(weight * pair.scaling, pair) for weight, pair in zip(matrix.weights, matrix.pairs, strict=True)]
    inner = [math.copysign(abs(weight) ** 0.5, weight) * pair.lora_A for weight, pair in wanted]
    outer = [abs(weight) ** 0.5 * pair.lora_B for weight, pair in wanted]
    return LowRankPair(torch.stack(inner).sum(0), torch.stack(outer).sum(0))
