"""Packed rows through a transformers model: its attention keeps to the sequences, and nothing else looks sideways.

A packed row is `model(input_ids=(1, N), position_ids=(1, N), attention_mask=NO_MASK, packing=Packing)`. transformers
hands what it does not know down to the attention function, and leaves a mask of four dimensions as it is. While
`packed_attention` is open that function is one that reads `packing`; to any other call it is torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gossamer.families import FAMILIES
from gossamer.kernels import packed
from gossamer.kernels.packed import Packing
from gossamer.methods.virtual_tokens import VirtualTokensLayer

if TYPE_CHECKING:
    pass

NAME = "gossamer"
"""Of the attention function, as transformers knows it."""


def obstacle(model: nn.Module) -> str:
    """Why rows cannot be packed for this model, or nothing."""
    config: Any = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or not family.packable:
        return f"packing is not proven for {type(model).__name__}"
    if config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is {config._attn_implementation}, and packing needs sdpa"
    rates = {name: getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop")}
    if any(rates.values()):
        return "it drops out attention"
    if any(isinstance(module, VirtualTokensLayer) for module in model.modules()):
        return "virtual tokens stand before each row"
    return ""


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Let a model's attention understand `packing` for a block: backwards too, which may run its layers again."""
    configs: list[Any] = [*{id(one.config): one.config for one in model.modules() if hasattr(one, "config")}.values()]
    before = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (1, heads, N, d) each, to (1, N, heads, d)."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
    return packed.attention(q, k, v, packing, scaling, others.get("sliding_window")).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
