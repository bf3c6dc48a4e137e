"""Whether a model sees the tokens that it is to predict: tried, not read off names and flags.

T rows of T tokens go through the model, without adapters and without gradients. Row 0 is as it is, and row j has
another token at place j. Where the logits at a place i < j differ from those of row 0, place i read a later token:

    leak(i, j) = max |z_j[i] - z_0[i]|  over  max |z_j[j] - z_0[j]|

Next-token training of such a model ends at a loss of nearly nothing and a model that can write nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gossamer.attachment.host import find_host
from gossamer.attachment.site import BASE_ALONE
from gossamer.errors import UnsupportedError
from gossamer.training.memory import ran_out

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
