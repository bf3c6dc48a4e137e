"""Adapters of mixtures of experts from before transformers 5, which had a linear module for each expert's matrix.

    block_sparse_moe.experts.<e>.w1, w3, w2                 ->  mlp.experts.gate_up_proj, down_proj
    mlp.experts.<e>.gate_proj, up_proj, down_proj           ->  mlp.experts.gate_up_proj, down_proj

Gate and up are one matrix now, so their factors become one pair of twice the rank, with the same product and scaling:

    [W_gate; W_up] + s [[B_gate, 0], [0, B_up]] [A_gate; A_up]
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.adapter import Tensors
from gossamer.errors import AdapterFileError
from gossamer.methods.factored import Factored
from gossamer.methods.targeted import exactly, matches_end

_OLD = re.compile(
    r"(?P<block>.+)\.(block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\.(?P<matrix>w[123]|(gate|up|down)_proj)"
)
_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_STACKS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}

Experts = dict[int, tuple[str, Tensor, Tensor]]
"""Expert -> old path, A, B."""


def is_old(tensors: Tensors) -> bool:
    """Whether some tensors are a single expert's."""
    return any(".experts." in path and _OLD.fullmatch(path) for path in tensors)


def stacked_anew(
    config: Mapping[str, Any], tensors: Tensors, spec: Factored, where: str
) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors as transformers 5 lays the experts out; says so in a warning.

    Args:
        spec: what the config means for the old layout.

    Raises `AdapterFileError` where experts differ in what they have, or gate and up in their scaling.
    """
    blocks: dict[str, dict[str, Experts]] = {}
    anew: dict[str, dict[str, Tensor]] = {}
    for path, slots in tensors.items():
        old = _OLD.fullmatch(path)
        if old is None:
            anew[path.replace(".block_sparse_moe.", ".mlp.")] = dict(slots)
            continue
        if set(slots) != {"lora_A", "lora_B"} or any(slot.ndim != 2 for slot in slots.values()):
            raise AdapterFileError("an expert with other tensors than two factors", where=f"{where}: {path}")
        experts = blocks.setdefault(f"{old['block']}.mlp.experts", {}).setdefault(_PARTS[old["matrix"]], {})
        experts[int(old["expert"])] = (path, slots["lora_A"], slots["lora_B"])
    plain = [path for path, slots in anew.items() if "lora_A" in slots]
    ranks, alphas = {}, {}
    for path, parts in blocks.items():
        for name, matrices in _fused(parts, path, where).items():
            inner, outer, rank, alpha = _one_pair(matrices, spec, f"{where}: {path}.{name}")
            anew.setdefault(path, {}).update({f"{name}.lora_A": inner, f"{name}.lora_B": outer})
            ranks[f"{path}.{name}"], alphas[f"{path}.{name}"] = rank, alpha
    warnings.warn(
        f"{where}: factors of single experts are read as those of the stacked experts of transformers 5", stacklevel=2
    )
    changed = {
        "target_modules": list(exactly(plain)) if plain else [],
        "target_parameters": sorted(ranks),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _patterns(ranks) | _kept(spec.rank_pattern, plain),
        "alpha_pattern": _patterns(alphas) | _kept(spec.alpha_pattern, plain),
    }
    return dict(config) | changed, anew


def _fused(parts: Mapping[str, Experts], path: str, where: str) -> dict[str, list[Experts]]:
    """New name -> the old matrices that it is made of, gate before up; every expert has all of them."""
    everyone = {*range(1 + max(expert for experts in parts.values() for expert in experts))}
    for part, experts in parts.items():
        if set(experts) != everyone:
            missing = sorted(everyone - set(experts))
            raise AdapterFileError(f"experts without factors for {part}", where=f"{where}: {path}", got=str(missing))
    if ("gate" in parts) != ("up" in parts):
        raise AdapterFileError(
            "gate and up are one matrix in transformers 5, so both need factors",
            where=f"{where}: {path}",
            got=", ".join(parts),
        )
    return {name: [parts[part] for part in stack] for name, stack in _STACKS.items() if stack[0] in parts}


def _one_pair(matrices: list[Experts], spec: Factored, where: str) -> tuple[Tensor, Tensor, int, float]:
    """A (experts * rank, in), expert by expert; B (out, rank * experts), rank by rank; rank and alpha of the pair."""
    inners, outers = [], []
    used = {(spec.rank_at(path), spec.scaling_at(path)) for experts in matrices for path, _, _ in experts.values()}
    if len(used) > 1:
        raise AdapterFileError("experts that differ in rank or scaling", where=where, got=str(sorted(used)))
    rank, scaling = used.pop()
    for expert in sorted(matrices[0]):
        pairs = [experts[expert] for experts in matrices]
        for path, inner, outer in pairs:
            if not inner.shape[0] == outer.shape[1] == rank:
                got = str((tuple(inner.shape), tuple(outer.shape)))
                raise AdapterFileError(
                    "factors that do not have the rank the config gives", where=path, got=got, expected=str(rank)
                )
        inners.append(torch.cat([inner for _, inner, _ in pairs]))
        outers.append(torch.block_diag(*(outer for _, _, outer in pairs)))
    if len({tensor.shape for tensor in inners}) > 1 or len({tensor.shape for tensor in outers}) > 1:
        raise AdapterFileError("experts of different shapes", where=where)
    rank *= len(matrices)
    alpha = scaling * (rank**0.5 if spec.scaling == "rslora" else rank)
    return torch.cat(inners), torch.stack(outers, dim=2).flatten(1).contiguous(), rank, alpha


def _patterns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns that give each parameter its value: one for all of a name where they agree."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        name = path.rpartition(".")[2]
        same = {other for known, other in values.items() if known.endswith(f".{name}")} == {value}
        found[rf"experts\.{name}" if same else f"^{re.escape(path)}"] = value
    return found


def _kept(patterns: Mapping[str, Any], plain: list[str]) -> dict[str, Any]:
    """Patterns that still name something."""
    return {pattern: value for pattern, value in patterns.items() if any(matches_end(pattern, path) for path in plain)}
