"""Adapters made of factors, matrix by matrix: what sums and truncations are computed on.

Linear maps, embeddings, convolutions and stacks of experts differ in how a file lays their factors out and in nothing
else. Here each is one low-rank pair of a stack, and each way goes both ways.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.adapter import Tensors
from gossamer.errors import NonFiniteError, UnsupportedError
from gossamer.linalg import LowRankPair
from gossamer.methods.factored import Factored

_FACTOR = re.compile(r"(?P<prefix>(.+\.)?)(lora|lora_embedding|start)_[AB]")


@dataclass(frozen=True)
class StoredPair:
    """A low-rank pair, and how an adapter's file lays it out.

    Attributes:
        pair: A (count, r, in * kernel) and B (count, out, r), at least float32.
        stem: its slots without "A" and "B", "lora_" or "experts.gate_up_proj.lora_".
        kernel: of a convolution.
    """

    pair: LowRankPair
    stem: str = "lora_"
    kernel: tuple[int, ...] = ()

    @property
    def parameter(self) -> bool:
        """Whether `target_parameters` names its matrix, which its module uses without calling anything."""
        return "." in self.stem

    @property
    def form(self) -> tuple[object, ...]:
        """What two pairs must share to be added."""
        return self.stem, self.kernel, *self.pair.shape

    def slots(self) -> dict[str, Tensor]:
        """A and B as a layer holds them, the scaling in B, under their names."""
        pair = self.pair.folded()
        inner, outer = pair.lora_A.flatten(0, 1), pair.lora_B.permute(1, 2, 0).flatten(1)
        inner = inner.unflatten(1, (-1, *self.kernel)) if self.kernel else inner
        outer = outer.reshape(*outer.shape, *(1 for _ in self.kernel))
        return {f"{self.stem}A": inner.contiguous(), f"{self.stem}B": outer.contiguous()}

    def checked(self, place: str) -> StoredPair:
        """Itself. Raises `NonFiniteError` where it holds NaN or infinity."""
        if not self.pair.is_finite():
            raise NonFiniteError("an adapter's change is NaN or infinite", where=place)
        return self


def only_factors(tensors: Tensors) -> None:
    """Raise `UnsupportedError` where something else than factors was trained."""
    others = [f"{path}.{slot}" for path, slots in tensors.items() for slot in slots if not _FACTOR.fullmatch(slot)]
    if others:
        raise UnsupportedError(
            "parameters trained whole (modules_to_save, biases, tokens) cannot be scaled, added or resized without "
            "the base",
            got=", ".join(others[:3]) + (" ..." if len(others) > 3 else ""),
        )


def pairs_of(spec: Factored, tensors: Tensors) -> dict[str, StoredPair]:
    """Every pair of an adapter by the path of its matrix. Raises `UnsupportedError` for what is no pair of factors."""
    only_factors(tensors)
    return {place: pair for path, slots in tensors.items() for place, pair in pairs_at(spec, path, slots).items()}


def pairs_at(spec: Factored, path: str, slots: Mapping[str, Tensor]) -> dict[str, StoredPair]:
    """The pairs at one module by the path of their matrix; none where parameters are trained whole."""
    found: dict[str, StoredPair] = {}
    for first in (name for name in slots if name.endswith("_A") and not name.endswith("start_A")):
        stem = first[:-1]
        place = f"{path}.{stem.rpartition('lora_')[0]}".strip(".")
        found[place] = _pair(spec, place, slots, stem)
    return found


def _pair(spec: Factored, place: str, slots: Mapping[str, Tensor], stem: str) -> StoredPair:
    whole = LowRankPair(slots[f"{stem}A"], slots[f"{stem}B"], spec.scaling_at(place)).wide()
    first, second = whole.lora_A, whole.lora_B
    count = first.shape[0] // spec.rank_at(place) if "." in stem else 1
    if second.shape[1] != first.shape[0]:
        raise UnsupportedError("the factors of a convolution with groups are no one matrix", where=place)
    inner = first.flatten(1).unflatten(0, (count, -1))
    outer = second.flatten(1).unflatten(1, (-1, count)).permute(2, 0, 1)
    if "start_A" in slots:
        inner = torch.cat([inner, slots["start_A"].to(inner).flatten(1)[None]], 1)
        outer = torch.cat([outer, -slots["start_B"].to(inner).flatten(1)[None]], 2)
    return StoredPair(LowRankPair(inner, outer, whole.scaling), stem, tuple(first.shape[2:]))


def added(pairs: list[StoredPair]) -> StoredPair:
    """The sum of pairs of one form: factors side by side."""
    return replace(pairs[0], pair=LowRankPair.concatenated([one.pair for one in pairs]))


def slots_of(pairs: Mapping[str, StoredPair]) -> dict[str, dict[str, Tensor]]:
    """The tensors of an adapter that holds these pairs."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for place, pair in pairs.items():
        tensors.setdefault(module_of(place, pair), {}).update(pair.slots())
    return tensors


def module_of(place: str, pair: StoredPair) -> str:
    """The path of the module in which a pair's matrix lies."""
    prefix = pair.stem.rpartition("lora_")[0].rstrip(".")
    return place.removesuffix(prefix).rstrip(".")


def shrunk(
    pairs: Mapping[str, StoredPair], r: int | None, energy: float | None, pooled: bool
) -> tuple[dict[str, StoredPair], dict[str, float], float]:
    """Every pair at its best approximation of lower rank; see `Adapter.resize`.

    Returns: the pairs; the relative error of each; that of all together. Both are 0 where nothing was dropped.
    """
    parts = {place: stored.checked(place).pair.svd() for place, stored in pairs.items()}
    spectra = {place: values.double().square().sum(0) for place, (_, values, _) in parts.items()}
    ranks = _pooled(spectra, r, energy) if pooled else {key: _own(one, r, energy) for key, one in spectra.items()}
    found, errors, lost, total = {}, {}, 0.0, 0.0
    for place, triplets in parts.items():
        rank, stored, spectrum = ranks[place], pairs[place], spectra[place]
        shorter = rank < stored.pair.rank
        found[place] = replace(stored, pair=LowRankPair.balanced(*triplets, rank)) if shorter else stored
        gone, whole = spectrum[rank:].sum().item(), spectrum.sum().item()
        errors[place] = (gone / whole) ** 0.5 if whole else 0.0
        lost, total = lost + gone, total + whole
    return found, errors, (lost / total) ** 0.5 if total else 0.0


def _own(spectrum: Tensor, r: int | None, energy: float | None) -> int:
    """The rank that one matrix keeps for itself."""
    if r is not None:
        return min(r, len(spectrum))
    assert energy is not None
    return _enough(spectrum, energy * spectrum.sum().item())


def _enough(sizes: Tensor, wanted: float) -> int:
    """How many of the sizes, in their order and at least one, add up to what is wanted."""
    below = int((sizes.cumsum(0) < wanted).sum())
    return min(below + 1, len(sizes))


def _pooled(spectra: Mapping[str, Tensor], r: int | None, energy: float | None) -> dict[str, int]:
    """One budget for all matrices, spent on the largest singular values wherever they are; each keeps one."""
    if not spectra:
        return {}
    heads = torch.stack([spectrum[0] for spectrum in spectra.values()])
    owners = [place for place, spectrum in spectra.items() for _ in spectrum[1:]]
    sizes, order = torch.cat([spectrum[1:] for spectrum in spectra.values()]).sort(descending=True, stable=True)
    if r is not None:
        more = len(spectra) * (r - 1)
    else:
        assert energy is not None
        wanted = energy * (heads.sum() + sizes.sum()).item()
        more = _enough(torch.cat([heads.sum()[None], sizes]), wanted) - 1
    ranks = dict.fromkeys(spectra, 1)
    for index in order[:more].tolist():
        ranks[owners[index]] += 1
    return ranks
