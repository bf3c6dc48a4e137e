"""The loss: only the positions that have a label meet the head, and its gradient is formed on the way forward.

    loss = mean over supervised tokens of  logsumexp(z) - z[target]        z = W h of shape (V,), h the hidden state

A row of T tokens has T - 1 predictions, of which training needs the supervised ones alone. The head's input is narrowed
from (B, T, D) to those M positions by a hook, inside the model's own forward. Where the logits are the head's plain
output, the head itself runs for one position only, and the loss takes the others from there: a chunk of logits exists
at a time, and of each only `d nll / d h` is kept, so that neither (B, T, V) nor (M, V) ever exists. Where the model
does something to its logits (soft-capping), or the head is trained, the M logits are computed by the model.

Source: Wijmans et al. 2024, arXiv:2411.09009, section 3 (the idea: never write the logits).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gossamer.data.batches import Batch
from gossamer.errors import UnsupportedError
from gossamer.kernels.losses import head_nll, token_nll
from gossamer.training.audit import refuse_if_it_sees_ahead

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

    What a model reads is tried once, see `gossamer.training.audit`.
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
