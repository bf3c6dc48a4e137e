"""Decoder layers of the Llama family with their backward written out, standing in for transformers' own.

The model keeps its modules, its weights and their names: while blocks stand, a layer's `forward` is the block's, which
reads the same weights and the adapters' factors where they are. A block looks at each call what is active; where that
is more than plain low-rank terms (another method, dropout, a trained bias, a key-value cache), the layer's own forward
runs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from gossamer.attachment.frozen import Frozen
from gossamer.attachment.host import Host, require_host
from gossamer.attachment.kinds import shape_of
from gossamer.attachment.site import Site
from gossamer.kernels.linears import Term, gated_mlp, linears, normed_linears
from gossamer.kernels.packed import rotated
from gossamer.running.layers import OUTPUT, QKV, LayerParts, known


@contextmanager
def blocks(model: nn.Module) -> Iterator[int]:
    """Stand blocks in place of the decoder layers that have one, for as long as the context is open.

    Yields:
        How many stand. A layer with hooks inside, dropout in attention or a forward of its own is left as it is.
    """
    host = require_host(model)
    sites = {site.module: site for site in host.sites.values()}
    standing = [(layer, Block(layer, host, sites)) for layer in model.modules() if _eligible(layer)]
    try:
        for layer, block in standing:
            layer.forward = block
        yield len(standing)
    finally:
        for layer, _ in standing:
            layer.__dict__.pop("forward", None)


def _eligible(layer: Any) -> bool:
    if not known(layer) or "forward" in vars(layer) or layer.self_attn.config.attention_dropout:
        return False
    inner = (module for name, module in layer.named_modules() if name)
    return not any(one._forward_hooks or one._forward_pre_hooks or one._backward_hooks for one in inner)


class Block:
    """One decoder layer's forward."""

    def __init__(self, layer: Any, host: Host, sites: Mapping[nn.Module, Site]) -> None:
        self.layer, self.host, self.parts = layer, host, LayerParts(layer)
        modules = self.parts.linears
        self.sites = [sites.get(one) for one in modules]
        self.maps = [
            site.frozen if site else Frozen(shape_of("", one), one)
            for site, one in zip(self.sites, modules, strict=True)
        ]
        self.others = [sites[one] for one in layer.modules() if one in sites and one not in modules]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, (B, T, hidden)."""
        layer, terms = self.layer, self.terms()
        cached, unplaced = kwargs.get("past_key_values") is not None, kwargs.get("position_embeddings") is None
        if terms is None or args or cached or unplaced:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        run = partial(self._run, terms, kwargs)
        if layer.training and getattr(layer, "gradient_checkpointing", False):  # as transformers' forward does
            return layer._gradient_checkpointing_func(run, hidden_states)
        return run(hidden_states)

    def _run(self, terms: list[list[Term]], others: Mapping[str, Any], hidden_states: Tensor) -> Tensor:
        first, second = self.parts.norms
        query, key, value = normed_linears(hidden_states, first, self.maps[QKV], terms[QKV])
        attended = self._attended(query, key, value, **others)
        hidden = hidden_states + linears(attended, self.maps[OUTPUT], terms[OUTPUT])[0]
        return gated_mlp(hidden, second, self.parts.activation, self.maps[4:], terms[4:])

    def terms(self) -> list[list[Term]] | None:
        """The active terms beside each of the seven maps; None where something else is active in this layer."""
        routing = self.host.active
        if routing.unit == "row" or any(site.standing(names) for site in self.others for names in routing.mixes):
            return None
        found: list[list[Term]] = []
        for site, base in zip(self.sites, self.maps, strict=True):
            each = [
                (layer.plain_pair(), (start, stop))
                for start, stop, names in routing.spans
                if site
                for layer in site.standing(names)
            ]
            if not base.is_plain() or any(pair is None for pair, _ in each):
                return None
            found.append([Term(pair, rows) for pair, rows in each if pair is not None])
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

        parts, attention = self.parts, self.parts.attention
        query, key, value = parts.heads(query, key, value)
        cos, sin = (one.unsqueeze(2) for one in position_embeddings)
        heads = (rotated(query, cos, sin), rotated(key, cos, sin), value)
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        if parts.window is not None:
            others["sliding_window"] = parts.window
        states = (one.transpose(1, 2) for one in heads)
        return attend(attention, *states, attention_mask, dropout=0.0, scaling=parts.scaling, **others)[0].flatten(2)
