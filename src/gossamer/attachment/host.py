"""What a model remembers of the adapters attached to it; one per model, kept as a plain attribute of the root."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from gossamer.attachment import walk
from gossamer.attachment.selection import Selection
from gossamer.attachment.site import Active, ActiveAdapters, Site
from gossamer.errors import StateError, nearest
from gossamer.methods import Layer, Shape, TargetedMethod

_ATTRIBUTE = "_gossamer_host"
SAVING = ("save_pretrained", "push_to_hub")
"""Methods of a transformers model that ours stand in for, while adapters are attached."""


@dataclass
class Attached:
    """One adapter on a model: its spec, where it stands, and what it carries from the file it came from."""

    spec: TargetedMethod
    selection: Selection
    trainable: bool
    provenance: Mapping[str, Any] = field(default_factory=dict)
    foreign: Mapping[str, Any] = field(default_factory=dict)


class Host(ActiveAdapters):
    """The adapters of one model, which of them are active, and what unmerging and detaching must give back."""

    def __init__(self, model: nn.Module, fingerprint: dict[str, str]) -> None:
        self.model, self.fingerprint = model, fingerprint
        self.adapters: dict[str, Attached] = {}
        self.sites: dict[str, Site] = {}
        self.stash: list[tuple[str, str, Tensor | None]] | None = None
        """While merged: path, parameter, and what it was before, in the order they were written."""
        self.merged: Active = ()
        self.size = walk.base_size(model)
        self.requires_grad = {name: parameter.requires_grad for name, parameter in walk.base_parameters(model)}
        for _, parameter in walk.base_parameters(model):
            parameter.requires_grad_(False)

    def known(self, name: str) -> Attached:
        """The adapter of that name. Raises `StateError` with the nearest names."""
        if name not in self.adapters:
            raise StateError(
                f"no adapter named {name!r} is attached",
                expected=", ".join(self.adapters) or "none is",
                hint=nearest(name, self.adapters),
            )
        return self.adapters[name]

    def check_together(self, names: Active) -> None:
        """Raise `StateError` for unknown names, one named twice, and two that would replace the same parameters."""
        for name in names:
            self.known(name)
        if len(set(names)) < len(names):
            raise StateError("an adapter is named twice", got=", ".join(names), hint="2 * adapter doubles one")
        for path, site in self.sites.items() if len(names) > 1 else ():
            taken = [parameter for layer in site.standing(names) for parameter in layer.replaces()]
            if len(set(taken)) < len(taken):
                raise StateError("two adapters replace the same parameters", where=path, got=", ".join(names))

    def layers_of(self, name: str) -> dict[str, Layer]:
        """Canonical path -> layer of one adapter."""
        return {path: site.layers[name] for path, site in self.sites.items() if name in site.layers}  # pyright: ignore[reportReturnType]

    def refuse_while_merged(self, doing: str) -> None:
        """Raise `StateError` while adapters are folded into the weights."""
        if self.stash is not None:
            raise StateError(
                f"cannot {doing} while {', '.join(self.merged)} is merged into the weights", hint="unmerge(model) first"
            )

    def add(self, name: str, attached: Attached, layers: Mapping[str, tuple[Shape, Layer]]) -> None:
        """Stand the layers at their modules; all of them were made before, so this cannot fail half-way."""
        modules = walk.modules(self.model)
        bypassing = [path for path, module in modules.items() if isinstance(module, nn.TransformerEncoderLayer)]
        for path, (shape, layer) in layers.items():
            if not attached.trainable:
                layer.requires_grad_(False)
            layer.train(modules[path].training)
            if path not in self.sites:
                read = attached.selection.bypass.get(path)
                bypassed = not read and any(path.startswith(f"{around}." if around else "") for around in bypassing)
                readers = [*read.readers.values()] if read else []
                self.sites[path] = Site(shape, modules[path], self, bypassed, readers)
            self.sites[path].add(name, layer)
        self.adapters[name] = attached

    def remove(self, *names: str) -> None:
        """Take adapters away. A module that carries none any more is left as it was found, and so is the model."""
        for path, site in [*self.sites.items()]:
            for name in names:
                site.layers._modules.pop(name, None)
            if not len(site.layers):
                site.remove()
                del self.sites[path]
        for name in names:
            del self.adapters[name]

        left = (tuple(name for name in mix if name not in names) for mix in self.active.mixes)
        self.active = replace(self.active, mixes=tuple(left))
        if not self.adapters:
            for name, parameter in walk.base_parameters(self.model):
                parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
            del self.model.__dict__[_ATTRIBUTE]
            for name in SAVING:
                self.model.__dict__.pop(name, None)


def find_host(model: nn.Module) -> Host | None:
    """The model's host, if any adapter is attached."""
    return model.__dict__.get(_ATTRIBUTE)


def require_host(model: nn.Module) -> Host:
    """The model's host. Raises `StateError` when nothing is attached."""
    host = find_host(model)
    if host is None:
        raise StateError("no adapter is attached to this model", hint="attach(model, gs.LoRA(...)) first")
    return host


def make_host(model: nn.Module, fingerprint: dict[str, str] | None = None) -> Host:
    """The model's host, made if there is none. Raises `StateError` when a part of the model has a host of its own.

    Args:
        fingerprint: the base's, where it is known already: to look takes as long as to stand a layer everywhere.
    """
    host = find_host(model)
    if host is None:
        for path, module in model.named_modules():
            if _ATTRIBUTE in module.__dict__ or walk.CONTAINER in module._modules:
                raise StateError(
                    "a part of this model already carries adapters of its own",
                    where=path,
                    hint="attach to the whole model, or detach there first",
                )
        host = Host(model, fingerprint or walk.base_fingerprint(model))
        model.__dict__[_ATTRIBUTE] = host
    return host
