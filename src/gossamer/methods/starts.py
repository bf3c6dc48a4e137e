"""How LoRA's factors may start, as pure functions of a weight or of a module's inputs."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gossamer.errors import NonFiniteError, UsageError
from gossamer.linalg import randomised_svd
from gossamer.methods.base import wide

Quantise = Callable[[Tensor], Tensor]
"""A weight -> the weight as it would be stored, turned back to numbers."""


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The principal part of a weight: `scaling * B A = U_r S_r V_r^T`, the root of S in each factor.

    Args:
        weight: (out, in), at least float32. scaling: alpha / r or alpha / sqrt(r).

    Returns:
        A (r, in), B (out, r); of a smaller rank where the weight has no r components. What B A leaves of the weight
        has the singular values r + 1 and on. Cost: a full SVD, O(out in min(out, in)).

    Raises: UsageError when the scaling is 0.
    Source: Meng et al. 2024, arXiv:2404.02948, equations 2 and 3.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return _split(left[:, :rank], values[:rank], right[:rank], scaling)


def pissa_fast(
    weight: Tensor, rank: int, scaling: float, generator: torch.Generator, iterations: int = 16
) -> tuple[Tensor, Tensor]:
    """`pissa` by a randomised SVD: O(out in r) for each iteration instead of a full SVD.

    Raises: UsageError when the scaling is 0.
    Source: Meng et al. 2024, arXiv:2404.02948, section 3; Halko et al. 2011, arXiv:0909.4061.
    """
    left, values, right = randomised_svd(weight, rank, generator, iterations)
    return _split(left, values, right, scaling)


def olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """An orthonormal start: B the first columns of Q and A the first rows of R, where W = Q R.

    Returns:
        A (r, in), B (out, r), whatever the scaling; PEFT takes them so too.

    Source: Buyukakyuz 2024, arXiv:2406.01775, algorithm 1.
    """
    outer, inner = torch.linalg.qr(weight)
    return inner[:rank].clone(), outer[:, :rank].clone()


def loftq(
    weight: Tensor, rank: int, scaling: float, quantise: Quantise, iterations: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors that make up for what quantisation loses: `W ~ Q + scaling * B A`.

    Alternates `Q = quantise(W - scaling * B A)` and `scaling * B A = svd_r(W - Q)`, from B A = 0. The first round
    leaves at most the error of quantising alone; later ones most often less, which nothing guarantees.

    Args:
        weight: (out, in), at least float32. quantise: gets a matrix of its own, which it may overwrite.

    Returns:
        A (r, in), B (out, r), and the Q they belong to, (out, in).

    Raises: UsageError for no iteration, a scaling of 0, or a `quantise` that changes the shape; NonFiniteError when it
        gives NaN or infinity.
    Source: Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """
    if iterations < 1:
        raise UsageError("LoftQ takes at least one iteration", got=str(iterations))
    inner, outer = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    stored = weight
    for _ in range(iterations):
        stored = quantise(weight - scaling * outer @ inner).to(weight.dtype)
        if stored.shape != weight.shape:
            raise UsageError(
                "quantise gives a weight of the shape it got", got=str([*stored.shape]), expected=str([*weight.shape])
            )
        if not stored.isfinite().all():
            raise NonFiniteError("quantising gave NaN or infinity")
        inner, outer = pissa(weight - stored, rank, scaling)
    return inner, outer, stored


def _split(left: Tensor, values: Tensor, right: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    if scaling == 0:
        raise UsageError("a start with `scaling * B A` not zero needs a scaling other than 0", hint="set alpha")
    root = (values / abs(scaling)).sqrt()
    return root[:, None] * right, left * root * math.copysign(1.0, scaling)


class RunningSVD:
    """The principal directions of rows that arrive in batches: right-singular vectors of the rows less their mean.

    Keeps `S` and `V^T` of the `size` largest components and merges each batch into them: with n rows of mean m so far,
    k new ones X of mean p,

        [diag(S) V^T; X - p; sqrt(n k / (n + k)) (m - p)] = U' diag(S') V'^T

    Memory is O(size in), where a Gram matrix would take O(in^2) and square the condition of the data, so that in
    float32 directions below 3e-4 of the largest would be noise. Exact as long as no more than `size` components were
    ever there; otherwise what is lost is what was not among the `size` largest when it came.

    Source: Paischer et al. 2024, arXiv:2410.07170, section 3.2; Ross et al. 2008, "Incremental learning for robust
    visual tracking", figure 1. Equal to PEFT's, which centres too.
    """

    def __init__(self, size: int) -> None:
        self.size, self.rows, self.total = size, 0, 0.0
        self.mean = self.values = self.vectors = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Take in a batch of rows, (n, in). Raises `NonFiniteError`."""
        if not len(rows):
            return
        rows = wide(rows)
        mean = rows.mean(dim=0)
        new = [rows - mean]
        if self.rows:
            new.append((self.rows * len(rows) / (self.rows + len(rows))) ** 0.5 * (self.mean - mean)[None])
        fresh = torch.cat(new)
        self.total += fresh.square().sum().item()
        if not math.isfinite(self.total):
            raise NonFiniteError("inputs that are NaN or infinite have no principal directions")
        known = [self.values[:, None] * self.vectors] if self.rows else []
        stacked = torch.cat([*known, fresh])
        if len(stacked) > stacked.shape[1]:
            stacked = torch.linalg.qr(stacked, mode="r").R
        _, values, vectors = torch.linalg.svd(stacked, full_matrices=False)
        self.values, self.vectors = values[: self.size], vectors[: self.size]
        self.rows += len(rows)
        self.mean = mean if self.rows == len(rows) else self.mean + (mean - self.mean) * (len(rows) / self.rows)

    def components(self) -> tuple[Tensor, Tensor]:
        """Orthonormal directions (k, in), and the share of all variance that each explains, (k,), largest first."""
        return self.vectors, self.values.square() / (self.total or 1.0)


def redistribute(ratios: Mapping[str, Tensor], rank: int | Mapping[str, int], rho: float) -> dict[str, int]:
    """Ranks for modules that together spend `rank` for each, where their inputs' variance is.

    The budget `rank * modules` goes to the components that explain most of their module's variance, at most
    `rho * rank` for one module. A module may end with none; equal shares go to the paths that sort first.

    Args:
        ratios: module -> the shares of variance of its leading components, largest first.
        rank: the same for all, or of each module.

    Raises: UsageError for a rho below 1, which cannot spend the budget, or an infinite one.
    Source: Paischer et al. 2024, arXiv:2410.07170, section 3.3.
    """
    own = rank if isinstance(rank, Mapping) else dict.fromkeys(ratios, rank)
    ranked = sorted(
        (-share, path) for path, shares in ratios.items() for share in shares[: most(own[path], rho)].tolist()
    )
    ranks = dict.fromkeys(ratios, 0)
    for _, path in ranked[: sum(own[path] for path in ratios)]:
        ranks[path] += 1
    return ranks


def most(rank: int, rho: float) -> int:
    """The largest whole rank within `rho * rank`. Raises `UsageError` for a rho that is no number from 1 on."""
    if not (math.isfinite(rho) and rho >= 1):
        raise UsageError(
            "rho is how much of its average rank one module may have at most", got=str(rho), expected=">= 1"
        )
    return int(rho * rank + 1e-9)  # 1.15 * 100 is a little less than 115
