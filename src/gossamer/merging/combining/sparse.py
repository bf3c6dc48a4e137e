"""Ways that drop entries of each change before they are added. They need one whole matrix at a time."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from gossamer.errors import UsageError
from gossamer.merging.combining.module import Matrix, Result, share, way


@way("ties")
def ties(matrix: Matrix, *, density: float = 0.2) -> Result:
    """Trim, elect signs, average what agrees: entries in which adapters contradict each other do not cancel.

        T_k = the `density` largest entries of D_k        sign = sign(sum_k w_k T_k)
        D   = W * sum_k w_k T_k / sum_k |w_k|             both sums over the k whose w_k T_k has the elected sign

    with W = sum_k |w_k|, so that weights of 1 / n give the paper's mean of what agrees, and weights of lambda / n that
    times its lambda; where all agree and nothing is trimmed it is the exact sum. Trimmed matrix by matrix.

    Source: Yadav et al. 2023, arXiv:2306.01708, algorithm 1.
    """
    share(density, "density")
    return agreeing((weight, largest(delta, density)) for weight, delta in matrix.deltas())


@way("dare")
def dare(matrix: Matrix, *, density: float = 0.2) -> Result:
    """Drop entries at random and rescale the rest, then add: `D = sum_k w_k M_k D_k / density`, M_k Bernoulli(density).

    Source: Yu et al. 2023, arXiv:2311.03099, equations 3 to 5; `density` is its 1 - p.
    """
    share(density, "density")
    return _total((weight, _dropped(delta, density, matrix.generator)) for weight, delta in matrix.deltas())


@way("dare_ties")
def dare_ties(matrix: Matrix, *, density: float = 0.2) -> Result:
    """DARE's random drop in place of TIES' trimming, then TIES' election and mean.

    Source: Yu et al. 2023, arXiv:2311.03099, section 4.3, with Yadav et al. 2023, arXiv:2306.01708.
    """
    share(density, "density")
    return agreeing((weight, _dropped(delta, density, matrix.generator)) for weight, delta in matrix.deltas())


@way("magnitude_prune")
def magnitude_prune(matrix: Matrix, *, density: float = 0.2) -> Result:
    """The weighted sum of the `density` largest entries of each change: TIES' first step alone.

    Source: Yadav et al. 2023, arXiv:2306.01708, algorithm 1, step 1.
    """
    share(density, "density")
    return _total((weight, largest(delta, density)) for weight, delta in matrix.deltas())


def largest(change: Tensor, density: float) -> Tensor:
    """The change with all but the `density` entries of largest magnitude at zero; at least one stays."""
    kept = max(1, round(density * change.numel()))
    order = change.abs().flatten().topk(kept, sorted=False).indices
    trimmed = torch.zeros_like(change).flatten()
    trimmed[order] = change.flatten()[order]
    return trimmed.reshape(change.shape)


def agreeing(parts: Iterable[tuple[float, Tensor]]) -> Tensor:
    """TIES' last two steps on weighted, trimmed changes: the elected sign, and the weighted mean of what has it."""
    kept = [(abs(weight), part if weight >= 0 else -part) for weight, part in parts]
    elected = torch.stack([weight * part for weight, part in kept]).sum(0).sign()
    total, weights = torch.zeros_like(elected), torch.zeros_like(elected)
    for weight, part in kept:
        agrees = (part.sign() == elected) & (elected != 0)
        total += weight * part * agrees
        weights += weight * agrees
    whole = sum(weight for weight, _ in kept)
    return whole * total / torch.where(weights == 0, torch.ones_like(weights), weights)


def _dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(change.shape, generator=generator) < density
    return change * kept.to(change.device) / density


def merged_as(name: str, parts: Iterable[tuple[float, Tensor]], density: float) -> Tensor:
    """Combine tensors that are no changes of a weight (KnOTS' directions) by "ties" or by their plain "sum"."""
    if name == "ties":
        return agreeing((weight, largest(part, density)) for weight, part in parts)
    if name != "sum":
        raise UsageError("directions are merged by ties or sum", got=repr(name), expected="ties, sum")
    return _total(parts)


def _total(parts: Iterable[tuple[float, Tensor]]) -> Tensor:
    """The weighted sum, one part in memory at a time."""
    return functools.reduce(lambda total, part: total.add_(part), (weight * part for weight, part in parts))
