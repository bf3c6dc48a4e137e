"""Decoder layers of the Llama family with their backward written out, standing in for transformers' own.

    h = x + o(attention(rotated(q), rotated(k), v))         q, k, v = linears(rms_norm(x))
    y = h + down(act(gate) * up)                            gate, up = linears(rms_norm(h))

The model keeps its modules, its weights and their names: while blocks stand, a layer's `forward` is the block's, which
reads the same weights and the adapters' factors where they are. A block looks at each call what is active; where that
is more than plain low-rank terms (another method, dropout, a trained bias, a key-value cache), the layer runs as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from gossamer.attachment.frozen import Frozen
from gossamer.attachment.host import Host, require_host
from gossamer.attachment.kinds import shape_of
from gossamer.attachment.site import Site
from gossamer.families import LAYERS, Family
from gossamer.kernels.linears import ACTIVATIONS, Norm, Term, gated_mlp, linears, normed_linears
from gossamer.kernels.packed import rotated

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEEDFORWARD = ("gate_proj", "up_proj", "down_proj")


@contextmanager
def blocks(model: nn.Module) -> Iterator[int]:
    """Stand blocks in place of the decoder layers that have one, for as long as the context is open.

    Yields:
        How many stand. A layer that somebody hooks into, or runs in a way of his own, is left as it is.
    """
    host = require_host(model)
    sites = {site.module: site for site in host.sites.values()}
    standing = [(layer, Block(layer, LAYERS[type(layer).__name__], host, sites)) for layer in _eligible(model)]
    try:
        for layer, block in standing:
            layer.forward = block
        yield len(standing)
    finally:
        for layer, _ in standing:
            layer.__dict__.pop("forward", None)


def _eligible(model: nn.Module) -> Iterator[nn.Module]:
    """Layers of a known class that nobody looks into, with an activation that is known and nothing dropped out."""
    for layer in model.modules():
        if type(layer).__name__ not in LAYERS or "forward" in vars(layer):
            continue
        config: Any = layer.get_submodule("self_attn").config
        inner = [module for name, module in layer.named_modules() if name]
        hooked = any(one._forward_hooks or one._forward_pre_hooks or one._backward_hooks for one in inner)
        if config.hidden_act in ACTIVATIONS and not config.attention_dropout and not hooked:
            yield layer


class Block:
    """One decoder layer's forward."""

    def __init__(self, layer: Any, family: Family, host: Host, sites: Mapping[nn.Module, Site]) -> None:
        self.layer, self.host = layer, host
        self.attention, config = layer.self_attn, layer.self_attn.config
        self.activation = config.hidden_act
        self.window = config.sliding_window if family.window else getattr(self.attention, "sliding_window", None)
        self.norms = [norm_of(one, family.offset) for one in (layer.input_layernorm, layer.post_attention_layernorm)]
        parts = [getattr(self.attention, name) for name in ATTENTION] + [
            getattr(layer.mlp, name) for name in FEEDFORWARD
        ]
        self.sites = [sites.get(part) for part in parts]
        self.maps = [
            site.frozen if site else Frozen(shape_of("", part), part)
            for site, part in zip(self.sites, parts, strict=True)
        ]
        self.others = [sites[part] for part in layer.modules() if part in sites and part not in parts]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, (B, T, hidden)."""
        terms = self.terms()
        if (
            terms is None
            or args
            or kwargs.get("past_key_values") is not None
            or kwargs.get("position_embeddings") is None
        ):
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        run = partial(self._run, terms, kwargs)
        if self.layer.training and getattr(
            self.layer, "gradient_checkpointing", False
        ):  # as transformers' forward does
            return self.layer._gradient_checkpointing_func(run, hidden_states)
        return run(hidden_states)

    def _run(self, terms: list[list[Term]], others: Mapping[str, Any], hidden_states: Tensor) -> Tensor:
        first, second = self.norms
        query, key, value = normed_linears(hidden_states, first, self.maps[:3], terms[:3])
        attended = self._attended(query, key, value, **others)
        hidden = hidden_states + linears(attended, self.maps[3:4], terms[3:4])[0]
        return gated_mlp(hidden, second, self.activation, self.maps[4:], terms[4:])

    def terms(self) -> list[list[Term]] | None:
        """The active terms beside each of the seven maps; None where something else is active in this layer."""
        routing = self.host.active
        if routing.unit == "row" or any(site.standing(names) for site in self.others for names in routing.mixes):
            return None
        found: list[list[Term]] = []
        for site, base in zip(self.sites, self.maps, strict=True):
            here: list[Term] = []
            for start, stop, names in routing.spans if site else ():
                for layer in site.standing(names):  # pyright: ignore[reportOptionalMemberAccess]
                    pair = layer.plain_pair()
                    if pair is None:
                        return None
                    here.append(Term(pair, (start, stop)))
            if not base.is_plain():
                return None
            found.append(here)
        return found

    def _attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_embeddings: Any,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """(B, T, heads * d): through the function that transformers has under the name in the config."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attention = self.attention
        query, key, value = (one.unflatten(-1, (-1, attention.head_dim)) for one in (query, key, value))
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        cos, sin = (one.unsqueeze(2) for one in position_embeddings)
        heads = (rotated(query, cos, sin), rotated(key, cos, sin), value)
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        window = {} if self.window is None else {"sliding_window": self.window}
        out, _ = attend(
            attention,
            *(one.transpose(1, 2) for one in heads),
            attention_mask,
            dropout=0.0,
            scaling=attention.scaling,
            **window,
            **others,
        )
        return out.flatten(2)


def norm_of(module: Any, offset: bool) -> Norm:
    """A model's own RMSNorm as numbers; `offset` for Gemma's."""
    eps = module.eps if offset else module.variance_epsilon
    return Norm(module.weight, eps, offset)
