"""What must hold before anything is trained, and after the first backward: nothing trains in silence without learning.

LoRA's B starts at zero, so on step one the gradient of A is exactly zero and that of B is not. The rule that fits every
method: each parameter has a finite gradient, and at each module at least one of them is not zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from gossamer.attachment import active, attached, trainable_parameters, use
from gossamer.attachment.host import require_host
from gossamer.data.masks import Example
from gossamer.errors import DataError, GradientError, StateError
from gossamer.methods.tokens import SLOT
from gossamer.methods.virtual_tokens import VirtualTokensLayer
from gossamer.models.language import positions, text_config


def adapter_to_train(model: nn.Module) -> str:
    """The name of the one trainable adapter. Raises `StateError` when none or several are, or it does not run."""
    running = active(model)
    names = [name for name in attached(model) if trainable_parameters(model, name)]
    if len(names) != 1:
        raise StateError(
            "exactly one adapter must be trainable",
            got=", ".join(names) or "none is",
            hint="attach(model, gs.LoRA(...)) makes one that is",
        )
    if isinstance(running, list) or names[0] not in running:
        raise StateError(
            f"adapter {names[0]!r} is trainable but not active, so nothing would reach it",
            got=f"active: {running}",
            hint=f"use(model, {names[0]!r})",
        )
    use(model, *running)  # refuses while merged
    trainable = trainable_parameters(model, names[0])
    ours = {*map(id, trainable.values())}
    if strangers := [name for name, one in model.named_parameters() if one.requires_grad and id(one) not in ours]:
        raise StateError(
            "parameters of the base ask for gradients, but only the adapter's are trained",
            got=", ".join(strangers[:3]),
            hint="name their modules in modules_to_save",
        )
    if narrow := [name for name, parameter in trainable.items() if parameter.dtype != torch.float32]:
        raise StateError(
            "adapters are trained in float32",
            where=narrow[0],
            got=str(trainable[narrow[0]].dtype),
            hint="give the base its dtype before attaching; it does not have to be float32",
        )
    return names[0]


def refuse_misfits(model: nn.Module, examples: Iterable[Example]) -> None:
    """Raise `DataError` for tokens the model has no embedding for, and rows longer than its position embeddings.

    Virtual tokens stand in front of a row and take positions as well.
    """
    words = getattr(text_config(getattr(model, "config", None)), "vocab_size", None)
    running = {name for one in active(model) for name in ([one] if isinstance(one, str) else one)}
    layers = [layer for name in running for layer in require_host(model).layers_of(name).values()]
    virtual = sum(len(layer.prompt_embeddings) for layer in layers if isinstance(layer, VirtualTokensLayer))
    room = positions(model)
    room = None if room is None else room - virtual
    for example in examples:
        if words and max(example.ids) >= words:
            raise DataError(
                "the tokenizer is not this model's",
                where=example.where,
                got=f"token {max(example.ids):,}",
                expected=f"tokens below {words:,}",
            )
        if room is not None and len(example) > room:
            raise DataError(
                "longer than the model can read",
                where=example.where,
                got=f"{len(example):,} tokens",
                expected=f"at most {room:,}" + (f", as {virtual} virtual tokens stand before them" if virtual else ""),
                hint=f"set max_length to {room} or less, and overlong to drop or truncate",
            )


def audit_gradients(trainable: Mapping[str, nn.Parameter], sites: Mapping[str, str]) -> None:
    """Raise `GradientError` unless the first backward reached every module.

    Args:
        trainable: `"<path>.<slot>"` -> parameter, with the gradients of the first step. Non-finite gradients are not
            its business: the loop stops on them with `NonFiniteError`.
        sites: the same names -> the module each parameter stands at.
    """
    missing = [name for name, parameter in trainable.items() if parameter.grad is None]
    reached = {sites[name] for name, p in trainable.items() if p.grad is not None and bool(p.grad.any())}
    rows = {sites[name] for name in trainable if name.endswith(f".{SLOT}")}  # not in every batch
    dead = sorted({sites[name] for name in trainable} - reached - rows)
    if missing or dead:
        raise GradientError(
            "the first step does not reach every trainable parameter, so some of them would never learn",
            where=", ".join([*dict.fromkeys([*dead, *missing])][:5]),
            got=f"{len(missing)} parameters without a gradient, {len(dead)} modules with only zeros",
            expected=f"a gradient for all {len(trainable)} parameters",
            hint="leave modules that the forward pass does not use out of target_modules, and use no no_grad inside it",
        )
