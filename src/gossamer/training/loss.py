"""The loss: only the positions that have a label meet the head, and its gradient is formed on the way forward.

    loss = mean over supervised tokens of  logsumexp(z) - z[target]        z = W h of shape (V,), h the hidden state
    d nll / d h = softmax(z) W - W[target]

A row of T tokens has T - 1 predictions, of which training needs the supervised ones alone. The head's input is narrowed
from (B, T, D) to those M positions by a hook, inside the model's own forward. Where the logits are the head's plain
output, the head itself runs for one position only, and the loss takes the others from there: a chunk of logits exists
at a time, and of each only `d nll / d h` is kept, so that neither (B, T, V) nor (M, V) ever exists. Where the model
does something to its logits (soft-capping), or the head is trained, the M logits are computed by the model.

Source: Wijmans et al. 2024, arXiv:2411.09009, section 3 (the idea: never write the logits).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gossamer.data.batches import Batch
from gossamer.errors import UnsupportedError
from gossamer.planning.layers import CHUNK, columns_at_once
from gossamer.training.causal import refuse_if_it_sees_ahead

_CHANGES_LOGITS: WeakSet[nn.Module] = WeakSet()
"""Models seen to do more to their hidden states than to send them through the head."""


def supervised_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of every supervised token, float32 (M,), in nats, example by example.

    Raises: UnsupportedError for a model whose output is not one row of logits over the vocabulary for each token.
    """
    refuse_unless_causal(model)
    head = output_embeddings(model)
    if isinstance(head, nn.Linear) and model not in _CHANGES_LOGITS and _is_plain(head):
        with _narrowed(head, batch, first_only=True) as seen:
            logits = model(**batch.inputs()).logits
        plain = seen.get("logits")
        if plain is not None and logits.shape == plain.shape and torch.allclose(logits, plain, 0, 0, equal_nan=True):
            return head_nll(seen["hidden"], head.weight, head.bias, batch.targets)
        _CHANGES_LOGITS.add(model)
    return token_nll(supervised_logits(model, batch), batch.targets)


def supervised_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that predict the supervised tokens, (M, V) in the model's dtype, example by example.

    Cost: one forward without the head, and the head at M positions. A model that does not call its output embeddings
    on (B, T, D) computes all logits, of which the wanted ones are taken.
    """
    refuse_unless_causal(model)
    with _narrowed(output_embeddings(model), batch) as seen:
        logits = model(**batch.inputs()).logits
    expected = (1, batch.supervised) if seen else tuple(batch.input_ids.shape)
    if tuple(logits.shape[:-1]) != expected:
        raise UnsupportedError(
            "the model's output is not one row of logits for each token",
            where=type(model).__name__,
            got=f"logits of shape {tuple(logits.shape)}",
            expected="(batch, tokens, vocabulary)",
        )
    return logits[0] if seen else logits.reshape(-1, logits.shape[-1]).index_select(0, batch.at)


@contextmanager
def _narrowed(head: nn.Module | None, batch: Batch, first_only: bool = False) -> Iterator[dict[str, Tensor]]:
    """While open, the head meets the batch's supervised positions alone.

    Args:
        first_only: let the head itself meet the first of them only.

    Yields:
        A mapping that is given "hidden" (M, D), what came to the head, and "logits", what the head made of it.
    """
    seen: dict[str, Tensor] = {}

    def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0] if inputs else None
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != batch.input_ids.shape:
            return None
        picked = seen["hidden"] = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.at)
        return ((picked[:1] if first_only else picked).unsqueeze(0), *inputs[1:])

    def keep(_: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        if "hidden" in seen:  # a method may run the model on tokens of its own before
            seen["logits"] = logits.detach().clone()  # of one position; what follows may write into it

    hooks = [] if head is None else [head.register_forward_pre_hook(narrow), head.register_forward_hook(keep)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _is_plain(head: nn.Linear) -> bool:
    """Whether the head is one product whose weight gets no gradient and at which no adapter stands."""
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())
    return not trained and type(head) is nn.Linear and "forward" not in vars(head)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, if the model names one."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def refuse_unless_causal(model: nn.Module) -> None:
    """Raise `UnsupportedError` for a transformers model that does not predict the next token from those before it.

    What a model reads is tried once, see `gossamer.training.causal`.
    """
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False) or (callable(generates) and not generates()):
        raise UnsupportedError(
            "only causal language models can be trained and evaluated by this version",
            where=type(model).__name__,
            expected="a ...ForCausalLM class that reads left to right",
        )
    refuse_if_it_sees_ahead(model)


def head_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """`logsumexp(z) - z[target]`, z = W h + b, of each row of `hidden`, without ever holding all z.

    Args:
        hidden: (M, D). weight: (V, D), frozen. bias: (V,) or None. targets: (M,) int64.

    Returns:
        (M,) in float32 or the hidden states' wider dtype. Within 1e-6 of float64 (relative) for a vocabulary of 49,152.

    Keeps (M, D). Cost: 4 M V D FLOPs with a gradient, all of it forwards, half of it without.
    """
    return _HeadNLL.apply(hidden, weight, bias, targets)  # pyright: ignore[reportReturnType]


class _HeadNLL(torch.autograd.Function):
    """The gradient of row i is the outer one times a vector that depends on row i alone, which is formed at once.

    Some columns of z exist at a time: what was summed before is scaled down when a larger z comes. The target's z is
    a product of its own.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wide, learns = torch.promote_types(hidden.dtype, torch.float32), ctx.needs_input_grad[0]
        largest = torch.full((len(hidden), 1), -torch.inf, dtype=wide, device=hidden.device)
        total = torch.zeros_like(largest)
        slope = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if learns else None
        for columns in _slices(len(weight), columns_at_once(len(hidden), len(weight))):
            part = weight[columns]
            z = nn.functional.linear(hidden, part, None if bias is None else bias[columns]).to(wide)
            before, largest = largest, torch.maximum(largest, z.amax(1, keepdim=True))
            shrink = (before - largest).exp_()
            z.sub_(largest).exp_()
            total.mul_(shrink).add_(z.sum(1, keepdim=True))
            if slope is not None:
                slope.mul_(shrink).add_(z.to(part.dtype) @ part)
            del z  # before the next one is made
        target = weight[targets]
        if slope is not None:
            ctx.save_for_backward(slope.div_(total).sub_(target).to(hidden.dtype))
        there = torch.linalg.vecdot(hidden.to(wide), target.to(wide)) + (0.0 if bias is None else bias[targets])
        return (total.log_() + largest).squeeze(1) - there

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * outer[0].unsqueeze(1).to(slope.dtype), None, None, None


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """`logsumexp(logits) - logits[target]` of each row of (M, V), shape (M,), in float32 or the logits' wider dtype.

    Saves the logits as they are and one number a row; float32 copies exist for a chunk of rows at a time. Within 1e-6
    of float64 (relative) for a vocabulary of 49,152.
    """
    return _TokenNLL.apply(logits, targets)  # pyright: ignore[reportReturnType]


class _TokenNLL(torch.autograd.Function):
    """d nll / d logits = softmax(logits) - onehot(target), from the saved logsumexp."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.empty(len(logits), dtype=wide, device=logits.device)
        for rows in _chunks(*logits.shape):
            lse[rows] = logits[rows].to(wide).logsumexp(dim=-1)
        ctx.save_for_backward(logits, targets, lse)
        return lse - logits.gather(1, targets.unsqueeze(1)).squeeze(1).to(wide)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        logits, targets, lse = ctx.saved_tensors
        inner = torch.empty_like(logits)
        for rows in _chunks(*logits.shape):
            slope = (logits[rows].to(lse.dtype) - lse[rows].unsqueeze(1)).exp_()
            slope.scatter_add_(1, targets[rows].unsqueeze(1), torch.full_like(slope[:, :1], -1.0))
            inner[rows] = slope.mul_(outer[0][rows].unsqueeze(1)).to(logits.dtype)
        return inner, None


def _chunks(count: int, width: int) -> list[slice]:
    """Slices of `count` rows that hold `CHUNK` numbers, of `width` each."""
    return _slices(count, max(1, CHUNK // width))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
