"""Starts that need more than a weight: EVA looks at a module's inputs, LoftQ at what quantisation does to its weight.

Both return an Adapter, a value to be attached with `trainable=True`; the model itself is left as it is.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.attachment import walk
from gossamer.attachment.frozen import Frozen
from gossamer.attachment.host import find_host
from gossamer.attachment.match import select
from gossamer.attachment.site import BASE_ALONE
from gossamer.errors import NonFiniteError, StateError, TargetError, UnsupportedError, UsageError
from gossamer.methods import LoRA, starts
from gossamer.methods.base import LINEAR_KINDS, wide
from gossamer.methods.targeted import exactly
from gossamer.quant import dequantize, format_of, quantize

_SPARE = 8
"""Directions followed beyond those that can be used: what leads in the end may be small in the first batches."""


def eva(model: nn.Module, spec: LoRA, batches: Iterable[Mapping[str, Any]], *, rho: float = 2.0) -> Adapter:
    """A start in the directions in which each module's inputs vary most, with the ranks spent where that pays.

    A (r, in) holds the leading right-singular vectors of the module's inputs less their mean, B (out, r) is zero, so
    the output is unchanged. The sum of all ranks stays what the spec says, and so does the scaling at each module; a
    module that ends with rank 0 is no longer a target.

    Args:
        model: run in evaluation mode, under no_grad, without its adapters, on every batch: `model(**batch)`. Tokens
            that the batch's `attention_mask` (B, T) leaves out do not count in inputs of (B, T, in).
        spec: which modules, and r; its patterns and scaling hold, its start does not.
        batches: until they end; a few hundred rows of the data to be learnt are enough. A module has at most as many
            directions as it saw tokens.
        rho: most rank of one module, as a multiple of its r in the spec; 1 keeps every module at r.

    Raises: UnsupportedError for what is not the factors of a linear module; UsageError for a rho below 1 or a batch
        that is no mapping; StateError when a module saw no input, or while merged; NonFiniteError.
    Source: Paischer et al. 2024, arXiv:2410.07170.
    """
    frozen = _linear_targets(model, spec)
    running = {path: starts.RunningSVD(starts.most(spec.rank_at(path), rho) + _SPARE) for path in frozen}
    _observe(model, {path: (one.module, running[path]) for path, one in frozen.items()}, batches)
    unseen = [path for path, one in running.items() if not one.rows]
    if unseen:
        raise StateError("EVA needs inputs, and none reached some of the modules", got=", ".join(unseen[:3]))
    found = {path: one.components() for path, one in running.items()}
    shares = {path: shares for path, (_, shares) in found.items()}
    ranks = starts.redistribute(shares, {path: spec.rank_at(path) for path in frozen}, rho)
    tensors: dict[str, dict[str, Tensor]] = {}
    for path, rank in ranks.items():
        if rank:
            inner = found[path][0][:rank].cpu().clone()
            tensors[path] = {"lora_A": inner, "lora_B": inner.new_zeros(frozen[path].shape.out_features, rank)}
    provenance = {"start": "eva", "rho": rho, "tokens": max(one.rows for one in running.values())}
    kept = {path: ranks[path] for path in tensors}
    return Adapter(_with_ranks(spec, kept), tensors, walk.base_fingerprint(model), provenance)


def loftq(
    model: nn.Module, spec: LoRA, quantise: starts.Quantise | str, *, iterations: int = 1
) -> tuple[Adapter, dict[str, Tensor]]:
    """A start that makes up for what quantising the base loses: `W ~ Q + scaling * B A` at every module.

    Args:
        model: the base before it is quantised; it is not changed.
        spec: which modules, and r; its start does not hold.
        quantise: "nf4" or another of the formats a base may be quantised to; or any function of a weight (out, in),
            at least float32, to what would be stored of it, turned back to numbers.
        iterations: how often factors and quantised weight are fitted to each other.

    Returns:
        The adapter, which belongs to no fingerprint since its base is the quantised twin, and for each module the
        quantised-and-back weight, oriented and of the dtype as the module stores it, that the twin has to hold. With
        one iteration that is `quantise(W)`, what any base quantised so holds: `quantize_model(model, "nf4")` and then
        `attach(model, adapter, trainable=True)`.

    Raises: UnsupportedError for what is not the factors of a linear module; TargetError for a rank larger than a
        weight's; StateError while merged; UsageError for no iteration or a `quantise` that changes the shape;
        NonFiniteError when it gives NaN or infinity.
    Source: Li et al. 2023, arXiv:2310.08659.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    rounded = _there_and_back(quantise) if isinstance(quantise, str) else quantise
    for path, one in _linear_targets(model, spec).items():
        weight, rank = one.affine()[0].detach(), spec.rank_at(path)
        if rank > min(weight.shape):
            raise TargetError(
                "LoftQ has at most the rank of the weight",
                where=path,
                got=str(rank),
                expected=f"<= {min(weight.shape)}",
            )

        def stored_as(matrix: Tensor, dtype: torch.dtype = weight.dtype) -> Tensor:
            return rounded(matrix).to(dtype)  # rounded as the module will hold it, so that the factors see that too

        inner, outer, stored = starts.loftq(
            wide(weight).contiguous(), rank, spec.scaling_at(path), stored_as, iterations
        )
        tensors[path] = {"lora_A": inner.cpu(), "lora_B": outer.cpu()}
        weights[path] = (stored.T if one.shape.kind == "conv1d" else stored).to(weight.dtype).contiguous()
    return Adapter(spec.replace(start="gaussian"), tensors, None, {"start": "loftq", "iterations": iterations}), weights


def _there_and_back(quant: str) -> starts.Quantise:
    form = format_of(quant)
    return lambda weight: dequantize(quantize(weight, form), weight.dtype)


def _linear_targets(model: nn.Module, spec: LoRA) -> dict[str, Frozen]:
    """The modules the spec names, if a pair of factors at each is all that it asks for."""
    host = find_host(model)
    if host:
        host.refuse_while_merged("look at the base")
    selection = select(model, spec)
    frozen = {path: Frozen(selection.shapes[path], selection.modules[path]) for path in selection.targets}
    for path in selection.paths:
        shape = frozen[path].shape if path in frozen else None
        slots = {*spec.expected(shape)} - {"start_A", "start_B"} if shape and shape.kind in LINEAR_KINDS else None
        if slots != {"lora_A", "lora_B"}:
            raise UnsupportedError(
                "this start is for the factors of linear modules alone",
                where=path,
                got=str(sorted(slots)) if slots else type(selection.modules[path]).__name__,
            )
    return frozen


def _observe(
    model: nn.Module, watched: Mapping[str, tuple[nn.Module, starts.RunningSVD]], batches: Iterable[Mapping[str, Any]]
) -> None:
    """Run the base on the batches and give each watched module's inputs to its running SVD."""
    mask: Tensor | None = None

    def collector(path: str, running: starts.RunningSVD) -> Callable[..., None]:
        def collect(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows: Tensor = (*args, *kwargs.values())[0].detach()
            if mask is not None and rows.ndim == 3 and rows.shape[:2] == mask.shape:
                rows = rows[mask.bool().to(rows.device)]
            try:
                running.add(rows.reshape(-1, rows.shape[-1]))
            except NonFiniteError as error:
                raise NonFiniteError(error.what, where=path) from None

        return collect

    host, hooks = find_host(model), []
    try:
        for path, (module, running) in watched.items():
            hooks.append(module.register_forward_pre_hook(collector(path, running), with_kwargs=True))
        with torch.no_grad(), _evaluating(model), host.running(BASE_ALONE) if host else nullcontext():
            for batch in batches:
                if not isinstance(batch, Mapping):
                    raise UsageError(
                        "a batch is a mapping of the model's inputs",
                        got=type(batch).__name__,
                        expected="model(**batch)",
                    )
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """While open, dropout is off and running statistics stand still; then every flag is what it was.

    The flags are set one by one, since a module's own `train` may do more than that.
    """
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _with_ranks(spec: LoRA, ranks: Mapping[str, int]) -> LoRA:
    """The spec with a rank for every module, and alphas that keep the scalings what they were."""
    power = 0.5 if spec.scaling == "rslora" else 1.0
    return spec.replace(
        target_modules=exactly(ranks),
        exclude_modules=(),
        layers_to_transform=None,
        rank_pattern={f"^{re.escape(path)}": rank for path, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(path)}": spec.scaling_at(path) * rank**power for path, rank in ranks.items()},
        start="gaussian",
    )
