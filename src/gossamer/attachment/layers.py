"""From a spec and a selection to layers: of new tensors or of stored ones, both through one door."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter, Tensors
from gossamer.attachment import walk
from gossamer.attachment.frozen import Frozen
from gossamer.attachment.kinds import shape_of
from gossamer.attachment.match import select
from gossamer.attachment.selection import Selection
from gossamer.errors import AdapterFileError, TargetError, UnsupportedError, nearest
from gossamer.methods import Layer, Replacement, Shape, TargetedMethod
from gossamer.methods.base import wide
from gossamer.methods.slots import check_slots
from gossamer.methods.tokens import SLOT, TokenRows

MadeLayers = dict[str, tuple[Shape, Layer]]
"""Canonical path -> the module's shape and the layer made for it."""


def new_layers(model: nn.Module, spec: TargetedMethod, selection: Selection, seed: int) -> MadeLayers:
    """Fresh layers for a spec. Each starts from (seed, path), so neither order nor other modules change it."""
    modules, shapes = selection.modules, selection.shapes
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for path in selection.targets:
        words = hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(words) >> 1)
        tensors[path] = spec.initial(Frozen(shapes[path], modules[path]), generator)
    for path in (*selection.saved, *selection.biased):
        names = _whole(path, selection)
        frozen = Frozen(shapes[path], modules[path])
        tensors[path] = {name: wide(frozen.value(name).detach()) for name in names}
    for path, rows in selection.tokens.items():
        tensors[path] = {SLOT: wide(shapes[path].parameters["weight"].detach()[list(rows)])}
    return _built(model, spec, selection, tensors)


def stored_layers(model: nn.Module, adapter: Adapter) -> tuple[Selection, MadeLayers]:
    """Layers that hold an adapter's tensors. Raises `AdapterFileError` unless tensors and spec name the same."""
    spec = adapter.spec
    assert isinstance(spec, TargetedMethod)
    selection = select(model, spec, adapter)
    expected = {path: _expected(spec, selection, path) for path in selection.paths}
    _same_paths(adapter, [path for path in selection.paths if expected[path]], model)
    for path in selection.paths:
        check_slots(path, adapter.tensors.get(path, {}), expected[path])
    layers = _built(model, spec, selection, adapter.tensors)
    for path, why in selection.idle.items():
        _refuse_change(layers[path], selection.modules[path], why)
    return selection, layers


@torch.no_grad()
def _refuse_change(made: tuple[Shape, Layer], module: nn.Module, why: str) -> None:
    """Raise `UnsupportedError` unless a layer changes nothing, where it would have no effect until it is merged."""
    (shape, layer), frozen = made, Frozen(made[0], module)
    weight, bias = frozen.affine()
    stored = {"weight": weight, "bias": bias} if bias is not None else {"weight": weight}
    if shape.groups == 1 or any(slot.any() for name, slot in layer.slots().items() if name.endswith("_B")):
        same = [torch.equal(value, wide(stored[name])) for name, value in layer.merged(stored, stored).items()]
        if not all(same):
            raise UnsupportedError(
                f"the adapter's change here would take effect when it is merged and not before: {why}",
                where=shape.path,
                got=f"a change of this {shape.class_name}",
                expected="none: a second factor of zeros",
                hint="drop these tensors from the adapter if the change is not meant",
            )


def _expected(spec: TargetedMethod, selection: Selection, path: str) -> dict[str, tuple[int, ...]]:
    shape = selection.shapes[path]
    if path in selection.tokens:
        return {SLOT: (len(selection.tokens[path]), shape.out_features)}
    if path in selection.target_set:
        return spec.expected(shape)
    return {name: tuple(shape.parameters[name].shape) for name in _whole(path, selection)}


def _whole(path: str, selection: Selection) -> list[str]:
    """Which of a module's own parameters are trained whole."""
    return ["bias"] if path in selection.biased else sorted(selection.shapes[path].parameters)


def _built(model: nn.Module, spec: TargetedMethod, selection: Selection, tensors: Tensors) -> MadeLayers:
    layers: MadeLayers = {}
    shapes = [selection.shapes[path] for path in selection.targets]
    spec.check(shapes)
    common = spec.common(shapes, tensors.get("", {}))
    if common is None and "" in tensors and "" not in selection.paths:
        raise AdapterFileError("tensors without a module, which this method has no use for", got=str([*tensors[""]]))
    for path in selection.paths:
        shape = selection.shapes[path]
        device = shape.device
        slots = {name: slot.to(device) for name, slot in tensors.get(path, {}).items()}
        if path in selection.tokens:
            layer: Layer = TokenRows(selection.tokens[path], shape.in_features, slots[SLOT]).to(device)
        elif path in selection.target_set:
            layer = spec.build(shape, slots, common)  # on the device its slots are on
        else:
            layer = Replacement(slots)
        layers[path] = (shape, layer)
    for shape, layer in layers.values():
        for name, (owner, there) in shape.tied.items():
            lender = layers[owner][1]
            if isinstance(layer, Replacement) and isinstance(lender, Replacement) and there in lender.replaces():
                layer.borrowed[name] = (lender, there)
    return layers | _tied_rows(model, selection, layers)


def _tied_rows(model: nn.Module, selection: Selection, layers: MadeLayers) -> MadeLayers:
    """Layers at the heads that store their weight in an embedding of which rows are trained."""
    found: MadeLayers = {}
    modules = walk.modules(model) if selection.tokens else {}
    for path, rows in selection.tokens.items():
        weight = modules[path]._parameters["weight"]
        for other, module in modules.items():
            if other != path and module._parameters.get("weight") is weight:
                if other in layers:
                    raise TargetError("its rows are trained with the embedding it is tied to", where=other)
                shape, owner = shape_of(other, module), layers[path][1]
                assert isinstance(owner, TokenRows)
                found[other] = (shape, TokenRows(rows, shape.parameters["weight"].shape[0], owner).to(shape.device))
    return found


def _same_paths(adapter: Adapter, wanted: list[str], model: nn.Module) -> None:
    given = [path for path in adapter.paths if path or "" in wanted]
    unknown = [path for path in given if path not in wanted]
    unfilled = [path for path in wanted if path not in adapter.tensors]
    if unknown:
        raise AdapterFileError(
            f"{len(unknown)} of the adapter's {len(given)} modules are not targets of this model",
            where=unknown[0],
            got=f"{len(unfilled)} modules of the model left without tensors",
            hint=nearest(unknown[0], walk.modules(model)),
        )
    if unfilled:
        raise AdapterFileError(
            f"{len(unfilled)} modules that the adapter's spec names have no tensors in it",
            where=unfilled[0],
            got=f"{len(given)} modules with tensors",
            expected=f"{len(wanted)}",
        )
