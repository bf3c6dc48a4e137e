"""The loss: only the positions that have a label meet the head.

    loss = mean over supervised tokens of  logsumexp(z) - z[target]        z = head(hidden) of shape (V,)

A row of T tokens has T - 1 predictions, of which training needs the supervised ones alone. The head's input is narrowed
from (B, T, D) to those N positions by a hook, inside the model's own forward, so whatever the model does to its logits
afterwards (scaling, soft-capping) still happens, and (B, T, V) never exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import UnsupportedError
from gossamer.training.batches import IGNORED, Batch

CHUNK = 2**24
"""Logits that are turned to float32 at once: 64 MiB."""


def supervised_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of every supervised token, float32 (N,), in nats, rows one after the other.

    Raises: UnsupportedError for a model whose output is not one row of logits over the vocabulary for each token.
    """
    return token_nll(supervised_logits(model, batch), batch.labels[batch.labels != IGNORED])


def supervised_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that predict the supervised tokens, (N, V) in the model's dtype, rows one after the other."""
    before = nn.functional.pad(batch.labels[:, 1:] != IGNORED, (0, 1))  # token t is predicted at t - 1
    return logits_at(model, batch.input_ids, batch.attention_mask, before)


def logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor) -> Tensor:
    """The logits at the wanted positions alone, (N, V) in the model's dtype, rows one after the other.

    Args:
        wanted: (B, T) bool.

    Cost: one forward without the head, and the head at N positions. A model that does not call its output embeddings
    on (B, T, D) computes all logits, of which the wanted ones are taken.
    """
    refuse_unless_causal(model)
    picked = wanted.reshape(-1).nonzero().squeeze(1)
    narrowed = False

    def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal narrowed
        hidden = inputs[0] if inputs else None
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != wanted.shape:
            return None
        narrowed = True
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, picked).unsqueeze(0), *inputs[1:])

    head = output_embeddings(model)
    hook = head.register_forward_pre_hook(narrow) if head is not None else None
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    expected = (1, len(picked)) if narrowed else tuple(wanted.shape)
    if tuple(logits.shape[:-1]) != expected:
        raise UnsupportedError(
            "the model's output is not one row of logits for each token",
            where=type(model).__name__,
            got=f"logits of shape {tuple(logits.shape)}",
            expected="(batch, tokens, vocabulary)",
        )
    return logits[0] if narrowed else logits.reshape(-1, logits.shape[-1]).index_select(0, picked)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, if the model names one."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def refuse_unless_causal(model: nn.Module) -> None:
    """Raise `UnsupportedError` for a transformers model that does not predict the next token."""
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False) or (callable(generates) and not generates()):
        raise UnsupportedError(
            "only causal language models can be trained and evaluated by this version",
            where=type(model).__name__,
            expected="a ...ForCausalLM class that reads left to right",
        )


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """`logsumexp(logits) - logits[target]` of each row of (N, V), shape (N,), in float32 or the logits' wider dtype.

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
        for rows in _chunks(logits):
            lse[rows] = logits[rows].to(wide).logsumexp(dim=-1)
        ctx.save_for_backward(logits, targets, lse)
        return lse - logits.gather(1, targets.unsqueeze(1)).squeeze(1).to(wide)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        logits, targets, lse = ctx.saved_tensors
        inner = torch.empty_like(logits)
        for rows in _chunks(logits):
            slope = (logits[rows].to(lse.dtype) - lse[rows].unsqueeze(1)).exp_()
            slope.scatter_add_(1, targets[rows].unsqueeze(1), torch.full_like(slope[:, :1], -1.0))
            inner[rows] = slope.mul_(outer[0][rows].unsqueeze(1)).to(logits.dtype)
        return inner, None


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, CHUNK // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]
