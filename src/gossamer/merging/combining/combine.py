"""Several adapters as one: the verb behind `gs.combine`."""

import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from gossamer.adapter import Adapter, about_the_base
from gossamer.errors import StateError, TargetError, UsageError
from gossamer.linalg import LowRankPair
from gossamer.merging.combining.module import Matrix, Result, Way, chosen_way
from gossamer.merging.combining.pairs import AdapterPairs, BaseWeights
from gossamer.methods.lora import unit_scaled
from gossamer.methods.pairs import StoredPair, slots_of
from gossamer.methods.targeted import matches_end

Weight = float | Mapping[str, float]
"""Of one adapter: a number, or pattern for the end of a path -> number; the first pattern that matches wins."""


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight] | None = None,
    *,
    method: str = "exact",
    r: int | Literal["full"] | None = None,
    base: BaseWeights | None = None,
    seed: int = 0,
    **options: Any,
) -> Adapter:
    """One adapter made of several, and how far it is from their exact sum.

        D = way(w_1, D_1, ..., w_n, D_n)        distance = |D - sum_k w_k D_k| / |sum_k w_k D_k|

    with D_k the change of adapter k, of each matrix by itself. One matrix is worked on at a time; "exact", "svd",
    "linear", "knots", "iso_c" and "iso_cts" never form it, the others form it in float32.

    Args:
        adapters: LoRA of any ranks, targets and scalings; with `base`, of any method that merges (DoRA, IA3).
        weights: a number for each adapter, or patterns; every pattern must match, and every module have a weight.
            None: 1 / n each.
        method: exact, svd, linear, ties, dare, dare_ties, magnitude_prune, knots, iso_c or iso_cts.
        r: keep the nearest of this rank; "full": keep all that the method gives. None: the sum of the adapters' ranks.
        base: the model, or its weights: "<module path>.weight" -> (out, in), and "<module path>.bias".
        seed: of what is drawn at random (dare, dare_ties).
        options: the method's own: `density` of ties, dare, dare_ties, magnitude_prune and knots, `inside` and
            `scaled` of knots, `common` of iso_cts.

    Returns:
        A LoRA adapter, float32 or wider. Its `provenance` holds "distance", over all modules (Frobenius norms), and
        "distances", of each matrix. One adapter with weight 1 combined exactly is itself, whatever its method.

    Raises:
        UsageError: unknown method or option, or weights that do not fit. TargetError: a pattern that matches nothing.
        StateError: adapters of different bases, or of matrices of different shapes.
        UnsupportedError: what is no change of a weight, or needs the base; parameters trained whole.
        NonFiniteError: a change that is NaN or infinite.
    """
    way = chosen_way(method, options)
    adapters, weights = [*adapters], _checked(adapters, weights)
    _check_rank(r, method)
    if len(adapters) == 1 and weights == [1] and r is None and method in ("exact", "svd"):
        return adapters[0]
    sources = [AdapterPairs(adapter, base) for adapter in adapters]
    if r is None and any(source.full for source in sources):
        raise UsageError("a method that needs the base changes it in all directions", expected='a rank, or r="full"')
    places = sorted({place for source in sources for place in source.places})
    by_place = [_resolved(weight, source.places) for weight, source in zip(weights, sources, strict=True)]
    found: dict[str, StoredPair] = {}
    lengths: dict[str, tuple[float, float]] = {}
    for place in places:
        given = [(known[place], source) for known, source in zip(by_place, sources, strict=True) if place in known]
        parts = [(weight, source.at(place).checked(place)) for weight, source in given]
        found[place], lengths[place] = _combined(place, parts, way, options, r, seed)
    plain = [dict(weight) if isinstance(weight, Mapping) else weight for weight in weights]
    origin = {"operation": "combine", "method": method, "options": options, "weights": plain, "r": r, "seed": seed}
    origin |= {"of": [adapter.digest for adapter in adapters]} | _distances(lengths)
    its_base = next((adapter.base for adapter in adapters if adapter.base), None)
    return Adapter(unit_scaled(found), slots_of(found), its_base, origin, about_the_base(adapters[0].foreign))


def _combined(
    place: str,
    parts: list[tuple[float, StoredPair]],
    way: Way,
    options: dict[str, Any],
    r: int | Literal["full"] | None,
    seed: int,
) -> tuple[StoredPair, tuple[float, float]]:
    """The combined pair of one matrix, or of each of a stack; the norms of its difference from the sum and of that."""
    first = parts[0][1]
    device = first.pair.lora_A.device
    if len({pair.form for _, pair in parts}) > 1:
        raise StateError(
            "matrices of different shapes cannot be combined",
            where=place,
            got=" and ".join(str(pair.form) for _, pair in parts),
        )
    wide = functools.reduce(torch.promote_types, (one.pair.lora_A.dtype for _, one in parts))
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}|{place}".encode()).digest()[:7]))
    results: list[LowRankPair] = []
    apart = whole = 0.0
    for index in range(first.pair.shape[0]):
        pairs = [stored.pair[index].to(device, wide) for _, stored in parts]
        matrix = Matrix(place, pairs, [weight for weight, _ in parts], generator)
        combined = _factors(way(matrix, **options), matrix, r, seed)
        exact = matrix.sum()
        difference = LowRankPair.concatenated([combined, exact.scaled(-1.0)]).norm()
        apart, whole = math.hypot(apart, difference), math.hypot(whole, exact.norm())
        results.append(combined)
    return replace(first, pair=LowRankPair.stacked(results)), (apart, whole)


def _factors(result: Result, matrix: Matrix, r: int | Literal["full"] | None, seed: int) -> LowRankPair:
    """The combined change at the wanted rank."""
    if isinstance(result, LowRankPair):
        return result.resized(r, seed) if isinstance(r, int) and r < result.rank else result
    return LowRankPair.nearest(result, min(result.shape) if r == "full" else r or matrix.rank, seed)


def _checked(adapters: Sequence[Adapter], weights: Sequence[Weight] | None) -> list[Weight]:
    if not adapters:
        raise UsageError("nothing to combine", expected="at least one adapter")
    bases = [adapter.base for adapter in adapters if adapter.base]
    if any(base != bases[0] for base in bases):
        raise StateError("adapters of different bases have no sum", got=" and ".join(map(str, bases)))
    chosen: list[Weight] = [1 / len(adapters)] * len(adapters) if weights is None else [*weights]
    if len(chosen) != len(adapters):
        raise UsageError("one weight for each adapter", got=str(len(chosen)), expected=str(len(adapters)))
    for weight in chosen:
        for number in weight.values() if isinstance(weight, Mapping) else [weight]:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise UsageError("an adapter's weight is a finite number", got=repr(number))
    return chosen


def _check_rank(r: int | str | None, method: str) -> None:
    if isinstance(r, int) and not isinstance(r, bool) and r >= 1:
        if method == "exact":
            raise UsageError("the exact sum has the rank it has", got=f"r={r}", hint='method="svd" keeps the nearest')
    elif r not in (None, "full"):
        raise UsageError("a rank is a whole number of at least 1", got=repr(r), expected='a number, "full" or None')


def _resolved(weight: Weight, places: Sequence[str]) -> dict[str, float]:
    """The weight of each matrix. Raises `TargetError` for a pattern, or a matrix, that is left over."""
    if not isinstance(weight, Mapping):
        return dict.fromkeys(places, float(weight))
    for pattern in weight:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError("not a regular expression", where=repr(pattern), got=str(error)) from None
        if not any(matches_end(pattern, place) for place in places):
            raise TargetError("a pattern of weights matches no module", got=pattern, expected=", ".join(places[:4]))
    found = {}
    for place in places:
        matching = [float(number) for pattern, number in weight.items() if matches_end(pattern, place)]
        if not matching:
            raise TargetError("no weight for a module", where=place, hint="a last pattern '.*' takes all that are left")
        found[place] = matching[0]
    return found


def _distances(lengths: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """How far all is from the exact sum, and each matrix by itself."""
    apart, whole = (math.hypot(*(pair[index] for pair in lengths.values())) for index in (0, 1))
    each = {place: _over(*pair) for place, pair in lengths.items()}
    return {"distance": _over(apart, whole), "distances": each}


def _over(apart: float, whole: float) -> float | None:
    """A distance relative to the sum; None where the sum is zero and the result is not."""
    return apart / whole if whole else None if apart else 0.0
