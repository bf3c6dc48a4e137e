"""How much of each adapter to take, learned from a few batches: LoRA Soups."""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.errors import DataError, NonFiniteError, StateError, UnsupportedError, UsageError, nearest
from gossamer.linalg import LowRankPair
from gossamer.merging.combining.pairs import AdapterPairs
from gossamer.progress import Progress, Silent


def learned_weights(
    model: nn.Module,
    adapters: Sequence[Adapter],
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    steps: int = 50,
    lr: float = 5e-3,
    per_module: bool = True,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Weights for `combine`, one pattern a module, that make the combined adapter's loss small.

        h = W x + sum_k w_k scaling_k B_k A_k x        only the w_k are trained, from 1 / n

    One number for each adapter and module (or for each adapter alone), so a few dozen rows are enough. Nothing else
    changes: adapters and base receive no gradient.

    Args:
        model: the base, as `load_base` gives it: no adapter active, every module called by its own name.
        adapters: LoRA at linear modules.
        batches: what `loss` takes, gone through again and again until `steps` are done.
        loss: `loss(model, batch)` -> a scalar. None: `model(**batch).loss`.
        steps, lr: of AdamW without weight decay.
        per_module: whether each module has weights of its own.
        progress: who watches; see `gossamer.progress`.

    Returns: one mapping an adapter, to be given to `combine(adapters, weights)` as they are.

    Raises:
        StateError: a module that the model lacks. UnsupportedError: adapters of other methods or at other modules.
        UsageError, DataError: no adapters, steps or batches. NonFiniteError: a loss that is NaN or infinite.

    Source: Prabhakar et al. 2024, arXiv:2410.13025, section 3.3 (CAT).
    """
    if not adapters or steps < 1:
        raise UsageError("nothing to learn", got=f"{len(adapters)} adapters, {steps} steps")
    known = [_known(model, adapter) for adapter in adapters]
    places = sorted({place for pairs in known for place in pairs})
    rows = {place: index if per_module else 0 for index, place in enumerate(places)}
    start = torch.full((len(places) if per_module else 1, len(adapters)), 1 / len(adapters))
    weights = start.to(next(model.parameters()).device).requires_grad_()
    optimiser = torch.optim.AdamW([weights], lr=lr, weight_decay=0.0)
    measure, watched = loss or (lambda model, batch: model(**batch).loss), progress or Silent()
    with ExitStack() as stack:
        stack.callback(watched.finish)
        for place in places:
            parts = [(index, pairs[place]) for index, pairs in enumerate(known) if place in pairs]
            stack.callback(model.get_submodule(place).register_forward_hook(_added(weights, rows[place], parts)).remove)
        watched.start(steps, "learning weights")
        for batch in itertools.islice(_again(batches), steps):
            with torch.enable_grad():
                value = measure(model, batch)
            if not value.isfinite():
                raise NonFiniteError("the loss is NaN or infinite while weights are learned", got=str(value.item()))
            (weights.grad,) = torch.autograd.grad(value, [weights])
            optimiser.step()
            watched.step(loss=value.item())
    found = weights.detach().tolist()
    return [{f"^{re.escape(place)}": found[rows[place]][index] for place in pairs} for index, pairs in enumerate(known)]


def _known(model: nn.Module, adapter: Adapter) -> dict[str, LowRankPair]:
    """The factors of an adapter by module."""
    source = AdapterPairs(adapter, None)
    return {place: _usable(model, source, place) for place in source.places}


def _usable(model: nn.Module, source: AdapterPairs, place: str) -> LowRankPair:
    """The factors at a module, if they are those of a linear one."""
    names = dict(model.named_modules())
    if place not in names:
        raise StateError("the model has no such module", where=place, hint=nearest(place, names))
    stored = source.at(place)
    if stored.stem != "lora_" or stored.kernel:
        raise UnsupportedError(
            "weights are learned at linear modules only", where=place, got=type(names[place]).__name__
        )
    return stored.pair[0].folded()


def _added(weights: Tensor, row: int, parts: list[tuple[int, LowRankPair]]) -> Callable[..., Tensor]:
    """A hook that adds the weighted changes to what a module gives."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = arguments[0]
        for index, pair in parts:
            out = out + (weights[row, index] * pair.to(x.device).apply(x)).to(out.dtype)
        return out

    return hook


def _again(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches over and over."""
    kept = [*batches]
    if not kept:
        raise DataError("no batches to learn weights from")
    return itertools.cycle(kept)
