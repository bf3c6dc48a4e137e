"""The Llama family with a key-value cache of rows, for many requests at once that are each at another place.

Tokens of all sequences go through a layer together, (N, hidden); nothing is padded but attention over the cache.

    h = x + o(attention(rotated(q), rotated(k), v))         q, k, v = linears(rms_norm(x))
    y = h + down(act(gate) * up)                            gate, up = linears(rms_norm(h))

The plain twin is transformers' own model with a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.families import LAYERS
from gossamer.kernels import elementwise
from gossamer.kernels.frozen_maps import Maps, maps_of, prepacked_bytes
from gossamer.kernels.linears import ACTIVATIONS
from gossamer.running.blocks import ATTENTION, FEEDFORWARD, norm_of
from gossamer.running.graphs import StepGraphs
from gossamer.running.row_attention import AttentionMetadata
from gossamer.running.row_cache import RowCache
from gossamer.running.steps import AdapterTerms, ChunkRows, LinearGroup, StepInput

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The maps of a layer that read the same input."""


class CachedDecoder:
    """A causal model of the Llama family, one step at a time.

    Args:
        prepack: copy the weights into the layout that products on this CPU read best; else they are read where they
            are.
    """

    def __init__(self, model: Any, prepack: bool = False) -> None:
        inner = model.model
        self.model, self.inner = model, inner
        self.layers = [_Layer(index, layer, prepack) for index, layer in enumerate(inner.layers)]
        self.head = maps_of((model.lm_head,), prepack)
        self.norm = norm_of(inner.norm, self.layers[0].offset)
        self.copied = self.prepacked_bytes(model) if prepack else 0
        self.like: Tensor = self.norm.weight
        """Of the dtype and on the device that steps run in."""
        names = {module: path for path, module in model.named_modules()}
        maps = [layer.modules(group) for layer in self.layers for group in GROUPS] + [(model.lm_head,)]
        self.sites = tuple(LinearGroup(tuple(names[one] for one in group), group) for group in maps)
        self.graphs = StepGraphs(self.run, inner.rotary_emb, self.like) if self.like.is_cuda else None

    @staticmethod
    def takes(model: nn.Module) -> bool:
        """Whether this is a model whose layers are known, and nothing stands in their way."""
        layers = getattr(getattr(model, "model", None), "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(model, "lm_head"):
            return False
        if any("forward" in vars(one) or one._forward_pre_hooks or one._forward_hooks for one in model.modules()):
            return False
        known: list[Any] = [one for one in layers if type(one).__name__ in LAYERS]
        return len(known) == len(layers) and all(one.self_attn.config.hidden_act in ACTIVATIONS for one in known)

    @staticmethod
    def prepacked_bytes(model: nn.Module) -> int:
        """What the copies of the weights would take; 0 where nothing can be prepacked."""
        return prepacked_bytes(model.modules())

    def cache(self, rows: int = 0, tokens: int = 0) -> RowCache:
        """An empty cache; on CUDA with room for so much for good, so that recorded steps find it where it was."""
        first = self.layers[0]
        token = self.like.new_empty(first.maps["k_proj"].out_features // first.width, first.width)
        room = (rows, tokens) if self.like.is_cuda else (0, 0)
        return RowCache([(token, token)] * len(self.layers), axis=2, room=room)

    def parts(self, step: StepInput) -> tuple[ChunkRows, ChunkRows, ChunkRows]:
        """Sequences that are continued, prompts that are read, and the head's rows."""
        sizes = [(number, chunk.length) for number, chunk in enumerate(step.chunks)]
        alone = sum(chunk.continues for chunk in step.chunks)
        return tuple(sizes[:alone]), tuple(sizes[alone:]), tuple((number, 1) for number in step.wanted)

    @torch.inference_mode()
    def __call__(self, step: StepInput, cache: RowCache, terms: AdapterTerms | None = None) -> Tensor:
        """Take a step: write keys and values of its tokens, and give the wanted logits, which last until the next."""
        cache.reserve(*step.extent)
        replayed = self.graphs(step, cache, terms) if self.graphs is not None else None
        if replayed is not None:
            return replayed
        look = AttentionMetadata(step, step.tokens.device)
        look.turn(self.inner.rotary_emb, self.like)
        return self.run(step.tokens, look, cache, terms)

    def run(self, tokens: Tensor, look: AttentionMetadata, cache: RowCache, terms: AdapterTerms | None) -> Tensor:
        """The step itself."""
        x = self.inner.embed_tokens(tokens)
        body = _Adapted(terms, ((0, slice(0, look.count)), (1, slice(look.count, len(x)))))
        for layer, (keys, values) in zip(self.layers, cache.layers, strict=True):
            x = layer(x, look, (keys, values), body)
        x = x[look.last]
        x = self.norm.forward(x, self.norm.inverse(x))
        return _Adapted(terms, ((2, slice(0, len(x))),))(len(self.sites) - 1, self.head, x)[0]


class _Adapted:
    """Maps that read the same input, with the adapters' terms of the parts that the rows belong to."""

    def __init__(self, terms: AdapterTerms | None, parts: Sequence[tuple[int, slice]]) -> None:
        self.terms, self.parts = terms, [(part, rows) for part, rows in parts if rows.stop > rows.start]

    def __call__(self, site: int, maps: Maps, x: Tensor) -> Sequence[Tensor]:
        """Each map's output, (N, out)."""
        if self.terms is None or not (there := [one for one in self.parts if self.terms.at(one[0], site)]):
            return maps(x).each
        if len(there) == 1 and there[0][1] == slice(0, len(x)):  # all rows: nothing is cut
            part = there[0][0]
            read = self.terms.before(part, site, x)
            outs = maps(read)
            self.terms.after(part, site, read, outs.each, outs.whole)
            return outs.each
        given = [(rows, x[rows]) for _, rows in there]
        changed = [self.terms.before(part, site, same) for (part, _), (_, same) in zip(there, given, strict=True)]
        if any(one is not same for one, (_, same) in zip(changed, given, strict=True)):
            x = x.clone()
            for one, (rows, _) in zip(changed, given, strict=True):
                x[rows] = one
        outs = maps(x)
        for part, rows in there:
            whole = None if outs.whole is None else outs.whole[rows]
            self.terms.after(part, site, x[rows], [out[rows] for out in outs.each], whole)
        return outs.each


class _Layer:
    """One decoder layer."""

    def __init__(self, index: int, layer: Any, prepack: bool) -> None:
        self.sites = range(index * len(GROUPS), (index + 1) * len(GROUPS))
        family, attention = LAYERS[type(layer).__name__], layer.self_attn
        config = attention.config
        self.attention, self.offset, self.activation = attention, family.offset, config.hidden_act
        self.window = config.sliding_window if family.window else getattr(attention, "sliding_window", None)
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.norms = [norm_of(one, family.offset) for one in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.maps = {name: getattr(attention, name) for name in ATTENTION}
        self.maps |= {name: getattr(layer.mlp, name) for name in FEEDFORWARD}
        self.groups = [maps_of(self.modules(group), prepack) for group in GROUPS]

    def modules(self, names: Sequence[str]) -> tuple[nn.Module, ...]:
        """The model's modules of these names."""
        return tuple(self.maps[name] for name in names)

    def __call__(self, x: Tensor, look: AttentionMetadata, pair: tuple[Tensor, Tensor], adapted: _Adapted) -> Tensor:
        """The layer's output, (N, hidden)."""

        def group(number: int, given: Tensor) -> Sequence[Tensor]:
            return adapted(self.sites[number], self.groups[number], given)

        first, second = self.norms
        q, k, v = (one.unflatten(-1, (-1, self.width)) for one in group(0, first.forward(x, first.inverse(x))))
        if hasattr(self.attention, "q_norm"):
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
        keys, values = pair
        q, k = (elementwise.turned(one, look.cos, look.sin, -1) for one in (q, k))
        keys[look.rows, :, look.positions] = k
        values[look.rows, :, look.positions] = v
        attended = look.attend(q, k, v, pair, self.scaling, self.window)
        x = x + group(1, attended.flatten(1))[0]
        gate, up = group(2, second.forward(x, second.inverse(x)))
        return x + group(3, elementwise.gated(self.activation, gate, up))[0]
