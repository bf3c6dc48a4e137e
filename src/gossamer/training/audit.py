"""What must hold before anything is trained, and after the first backward: nothing trains in silence without learning.

LoRA's B starts at zero, so on step one the gradient of A is exactly zero and that of B is not. The rule that fits every
method: each parameter has a finite gradient, and at each module at least one of them is not zero.

Whether a model sees the tokens that it is to predict is tried, not read off names and flags. T rows of T tokens go
through the model, without adapters and without gradients: row 0 as it is, and row j with another token at place j.
Where the logits at a place i < j differ from those of row 0, place i read a later token:

    leak(i, j) = max |z_j[i] - z_0[i]|  over  max |z_j[j] - z_0[j]|

Next-token training of such a model ends at a loss of nearly nothing and a model that can write nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gossamer.attachment import active, attached, trainable_parameters, use
from gossamer.attachment.host import find_host, require_host
from gossamer.attachment.site import BASE_ALONE
from gossamer.data.masks import Example
from gossamer.errors import DataError, GradientError, StateError, UnsupportedError
from gossamer.methods.tokens import SLOT
from gossamer.methods.virtual_tokens import VirtualTokensLayer
from gossamer.models.device import ran_out
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


_TOKENS = 5
_TRIED: WeakSet[nn.Module] = WeakSet()
"""Models that were seen to read left to right."""


def refuse_if_it_sees_ahead(model: nn.Module) -> None:
    """Raise `UnsupportedError` for a model whose logits at a token depend on the tokens after it.

    Cost: one forward of 25 tokens, once a model. A router of experts may turn on a rounding error, so what looks like
    a leak is tried again with other tokens before it is called one.
    """
    if model in _TRIED:
        return
    try:
        found = _leak(model, first=3) and _leak(model, first=11)
    except Exception as error:
        if ran_out(error):  # the first step will, too, and says what to turn
            return
        raise
    if found:
        early, late, share = found
        raise UnsupportedError(
            "this model sees the tokens that it would be trained to predict",
            where=type(model).__name__,
            got=f"token {late + 1} of {_TOKENS} moves the logits at token {early + 1}, by {share:.2g} of its own",
            expected="logits that depend on the tokens so far alone",
            hint="a causal model; of an encoder the one that its config makes a decoder (is_decoder: true)",
        )
    _TRIED.add(model)


@torch.no_grad()
def _leak(model: nn.Module, first: int) -> tuple[int, int, float] | None:
    """The earlier place, the later one and the size of the largest leak, if there is one."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    words = getattr(table, "num_embeddings", 0)
    if words < 2:
        return None
    device = next(model.parameters()).device
    line = (torch.arange(_TOKENS, device=device) * 7 + first) % words
    ids = line.repeat(_TOKENS, 1)
    later = torch.arange(1, _TOKENS, device=device)
    ids[later, later] = (ids[later, later] + 1) % words
    logits = _logits(model, ids)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        return None  # `supervised_logits` raises for it, with the shapes
    moved = (logits[1:] - logits[:1]).float().abs().amax(-1)  # (later place - 1, place)
    own = moved[later - 1, later].clamp(min=torch.finfo(torch.float32).tiny)
    ahead = moved[:, :-1].tril() / own[:, None]  # row j - 1 keeps the places before j
    share, at = ahead.nan_to_num(0.0, 0.0, 0.0).flatten().max(0)
    eps = torch.finfo(logits.dtype).eps
    if share <= (2 * eps if eps > 1e-4 else 256 * eps):  # rows of one forward differ by little more than nothing
        return None
    row, early = divmod(int(at), _TOKENS - 1)
    return early, row + 1, float(share)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The base's own logits, in evaluation mode; adapters and modes are as they were afterwards."""
    host = find_host(model)
    with keeping_modes(model), host.running(BASE_ALONE) if host is not None else nullcontext():
        model.eval()
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Give each module its mode, training or not, back after a block."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
