"""A fine-tuned model as an adapter of its base, and any method's adapter as LoRA: the difference, a matrix at a time.

W_tuned - W_base = U diag(s) V^T,  kept: the r largest    A = diag(s)^(1/2) V^T,  B = U diag(s)^(1/2)
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.attachment import attach, attached, base_fingerprint, detach, merge_groups
from gossamer.attachment.kinds import shape_of
from gossamer.attachment.walk import modules
from gossamer.errors import BaseMismatchError, NonFiniteError, StateError, UnsupportedError, UsageError
from gossamer.linalg import LowRankPair
from gossamer.methods import Shape
from gossamer.methods.lora import unit_scaled
from gossamer.methods.pairs import StoredPair, slots_of
from gossamer.models import load_base
from gossamer.models.locate import locate
from gossamer.models.mapped import mapped_model
from gossamer.models.scrutiny import read_config
from gossamer.progress import Progress, Silent

MATRICES = ("linear", "conv1d", "conv")
"""Kinds of module whose weight a pair of factors can change."""
_TEMPORARY = "as-lora"

ModelSource = nn.Module | str | Path


class Difference(NamedTuple):
    """What changed of one parameter: where it is, its module, and by how much, as (out, in, *kernel) where a matrix."""

    path: str
    name: str
    shape: Shape
    change: Tensor


def extract(
    base: ModelSource,
    tuned: ModelSource,
    *,
    r: int | None = None,
    energy: float | None = None,
    whole: bool = False,
    seed: int = 0,
    watched: Progress | None = None,
) -> Adapter:
    """The adapter of rank r that is nearest to what fine-tuning changed.

    Args:
        base, tuned: models, or names and folders of such. Folders of safetensors are not loaded: memory is that of
            one matrix.
        r: the rank of every module, or its own where that is lower.
        energy: instead of r, the share of the squared singular values to keep at each module, in (0, 1]; this takes
            the full decomposition of each matrix.
        whole: keep modules whose parameters are no such matrices (norms, embeddings) as they were tuned
            (`modules_to_save`). Without it they are left out, and named in `provenance["left"]`.
        seed: of the random subspaces that small ranks of large matrices are found in.
        watched: who is told of each module; see `gossamer.progress`.

    Returns:
        A LoRA adapter of the base. Its `provenance` holds "error", relative to the whole change of its modules
        (Frobenius norm), "errors" of each, and "left", the parameters that changed and are not in it.

    Raises:
        UsageError: not exactly one of r and energy. BaseMismatchError: modules that differ in names or shapes.
        StateError: nothing that can be extracted has changed. NonFiniteError: weights that are NaN or infinite.

    Source: Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4; Eckart and Young 1936.
    """
    _check(r, energy)
    (before, forget_before), (after, forget_after) = _opened(base), _opened(tuned)
    first, second = modules(before), modules(after)
    _same_modules(first, second)

    watcher = watched or Silent()
    watcher.start(len(first), "extracting")

    def differences() -> Iterator[Difference]:
        for path, module in first.items():
            yield from _differences(path, module, second[path])
            names = [f"{path}.{name}" if path else name for name in module._parameters]
            forget_before(*names)
            forget_after(*names)
            watcher.step()
        watcher.finish()

    origin = {"operation": "extract", "of": base_fingerprint(after)}
    return _adapter(differences(), second if whole else {}, base_fingerprint(before), origin, r, energy, seed)


def as_lora(
    model: nn.Module, adapter: Adapter, *, r: int | None = None, energy: float | None = None, seed: int = 0
) -> Adapter:
    """The LoRA adapter nearest to what an adapter of another method does to the weights of its base.

    Args:
        model: the base, with nothing attached; it is left as it was.
        adapter: of any method that merges.
        r, energy, seed: see `extract`.

    Returns: see `extract`.

    Raises: UnsupportedError: a method that is no change of weights, or changes what no factors can.
    """
    _check(r, energy)
    if attached(model):
        raise StateError("adapters are attached to this model", got=", ".join(attached(model)), hint="detach(model)")
    attach(model, adapter, _TEMPORARY)
    try:
        groups = merge_groups(model, _TEMPORARY, dtype=torch.float32)
        found = modules(model)

        def differences() -> Iterator[Difference]:
            for path, name, value in (change for group in groups for change in group.changes()):
                stored = found[path].get_parameter(name).detach().float()
                yield from _changed(path, name, found[path], value.float() - stored)

        origin = {"operation": "as-lora", "of": adapter.digest}
        fresh = _adapter(differences(), {}, base_fingerprint(model), origin, r, energy, seed)
    finally:
        detach(model)
    if fresh.provenance["left"]:
        raise UnsupportedError("factors cannot change these parameters", got=", ".join(fresh.provenance["left"][:5]))
    return fresh


def _check(r: int | None, energy: float | None) -> None:
    if (r is None) == (energy is None) or (r is not None and r < 1) or (energy is not None and not 0 < energy <= 1):
        raise UsageError("a rank of at least 1, or an energy in (0, 1]", got=f"r={r}, energy={energy}")


def _opened(model: ModelSource) -> tuple[nn.Module, Callable[..., None]]:
    """A model, and what gives memory of its parameters back."""
    if isinstance(model, nn.Module):
        return model, lambda *names: None
    folder = locate(model)
    if folder.suffix == ".gguf" or read_config(folder).get("quantization_config") is not None:
        return load_base(model, dtype="float32")[0], lambda *names: None
    mapped = mapped_model(folder)
    return mapped.model, mapped.forget


def _same_modules(first: dict[str, nn.Module], second: dict[str, nn.Module]) -> None:
    """Raise `BaseMismatchError` unless both have the same parameters in the same places."""
    shapes = [
        {
            f"{path}.{name}": tuple(value.shape)
            for path, module in found.items()
            for name, value in module._parameters.items()
            if value is not None
        }
        for found in (first, second)
    ]
    different = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
    if different:
        where = different[0]
        raise BaseMismatchError(
            f"the two models differ in {len(different)} parameters, so one is not a fine-tuned other",
            where=where,
            got=str(shapes[1].get(where, "not there")),
            expected=str(shapes[0].get(where, "not there")),
        )


def _differences(path: str, before: nn.Module, after: nn.Module) -> Iterator[Difference]:
    for name, old in before._parameters.items():
        new = after._parameters[name]
        if old is not None and new is not None and not torch.equal(old, new):
            yield from _changed(path, name, before, new.detach().float() - old.detach().float())


def _changed(path: str, name: str, module: nn.Module, change: Tensor) -> Iterator[Difference]:
    if not torch.isfinite(change).all():
        raise NonFiniteError("the weights' difference is NaN or infinite", where=f"{path}.{name}")
    if change.any():
        shape = shape_of(path, module)
        yield Difference(path, name, shape, change.T if shape.kind == "conv1d" and name == "weight" else change)


def _adapter(
    differences: Iterable[Difference],
    kept: dict[str, nn.Module],
    base: dict[str, str],
    origin: dict[str, Any],
    r: int | None,
    energy: float | None,
    seed: int,
) -> Adapter:
    """Factors of every matrix that changed; of `kept`, whole modules where something else did."""
    pairs: dict[str, StoredPair] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    left: list[str] = []
    lost = total = 0.0
    for path, name, shape, change in differences:
        if shape.kind in MATRICES and name == "weight" and shape.groups == 1:
            pairs[path], gone = _pair(change, r, energy, seed)
            whole = change.double().square().sum().item()
            errors[path] = (gone / whole) ** 0.5
            lost, total = lost + gone, total + whole
        elif path in kept and shape.kind not in MATRICES:
            saved[path] = {slot: value.detach().clone() for slot, value in kept[path].named_parameters(recurse=False)}
        else:
            left.append(f"{path}.{name}")
    if not pairs:
        raise StateError("no matrix has changed, so there is nothing to extract", got=", ".join(left[:5]))
    spec = unit_scaled(pairs)
    spec = spec.replace(modules_to_save=tuple(saved)) if saved else spec
    origin |= {"r": r, "energy": energy, "error": (lost / total) ** 0.5, "errors": errors, "left": left}
    return Adapter(spec, slots_of(pairs) | saved, base, origin)


def _pair(change: Tensor, r: int | None, energy: float | None, seed: int) -> tuple[StoredPair, float]:
    """The nearest factors, and the square of what they miss."""
    matrix = change.flatten(1)
    if r is not None:
        pair = LowRankPair.nearest(matrix, r, seed)
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        grown = values.double().square().cumsum(0)
        rank = min(int((grown < energy * grown[-1]).sum()) + 1, len(values))
        pair = LowRankPair.balanced(left, values, right, rank)
    missed = (matrix - pair.delta()).double().square().sum().item()
    return StoredPair(LowRankPair.stacked([pair]), kernel=tuple(change.shape[2:])), missed
