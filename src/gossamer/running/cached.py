"""The Llama family with a key-value cache of rows, for many requests at once that are each at another place.

Tokens of all sequences go through a layer together, (N, hidden); nothing is padded but attention over the cache. The
plain twin is transformers' own model with a cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.families import LAYERS
from gossamer.kernels import elementwise
from gossamer.kernels.frozen_maps import Maps, maps_of, prepacked_bytes
from gossamer.running.graphs import StepGraphs
from gossamer.running.layers import GROUPS, LayerParts, known, norm_of
from gossamer.running.row_attention import RowAttention
from gossamer.running.row_cache import RowCache
from gossamer.running.steps import AdapterTerms, ChunkRows, LinearGroup, StepInput


class CachedDecoder:
    """A causal model of the Llama family, one step at a time.

    Args:
        prepack: copy the weights into the layout that products on this CPU read best; else they are read where they
            are.
    """

    def __init__(self, model: Any, prepack: bool = False) -> None:
        inner = model.model
        self.model, self.inner = model, inner
        self.layers = [_Layer(number * len(GROUPS), layer, prepack) for number, layer in enumerate(inner.layers)]
        self.head = maps_of((model.lm_head,), prepack)
        self.norm = norm_of(inner.norm, LAYERS[type(inner.layers[0]).__name__].offset)
        self.copied = self.prepacked_bytes(model) if prepack else 0
        self.like: Tensor = self.norm.weight
        names = {module: path for path, module in model.named_modules()}
        groups = [layer.parts.linears[group] for layer in self.layers for group in GROUPS] + [(model.lm_head,)]
        self.sites = tuple(LinearGroup(tuple(names[one] for one in group), group) for group in groups)
        self.graphs = StepGraphs(self.run, inner.rotary_emb, self.like) if self.like.is_cuda else None

    @staticmethod
    def takes(model: nn.Module) -> bool:
        """Whether this is a model whose layers are known, and nothing stands in their way."""
        layers = getattr(getattr(model, "model", None), "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(model, "lm_head"):
            return False
        if any("forward" in vars(one) or one._forward_pre_hooks or one._forward_hooks for one in model.modules()):
            return False
        return all(known(one) for one in layers)

    @staticmethod
    def prepacked_bytes(model: nn.Module) -> int:
        """What the copies of the weights would take; 0 where nothing can be prepacked."""
        return prepacked_bytes(model.modules())

    def cache(self, rows: int = 0, tokens: int = 0) -> RowCache:
        """An empty cache; on CUDA with room for so much for good, so that recorded steps find it where it was."""
        attention = self.layers[0].parts.attention
        token = self.like.new_empty(attention.k_proj.out_features // attention.head_dim, attention.head_dim)
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
        attention = RowAttention.of(step, step.tokens.device)
        attention.set_angles(self.inner.rotary_emb, self.like)
        return self.run(step.tokens, attention, cache, terms)

    def run(self, tokens: Tensor, attention: RowAttention, cache: RowCache, terms: AdapterTerms | None) -> Tensor:
        """The step itself."""
        x = self.inner.embed_tokens(tokens)
        body = _Adapted(terms, ((0, slice(0, attention.count)), (1, slice(attention.count, len(x)))))
        for layer, (keys, values) in zip(self.layers, cache.layers, strict=True):
            x = layer(x, attention, keys, values, body)
        x = x[attention.last]
        x = self.norm.forward(x, self.norm.inverse(x))
        return _Adapted(terms, ((2, slice(0, len(x))),))(len(self.sites) - 1, self.head, x)[0]


class _Adapted:
    """Maps that read the same input, with the adapters' terms of the parts that the rows belong to."""

    def __init__(self, terms: AdapterTerms | None, parts: Sequence[tuple[int, slice]]) -> None:
        self.terms, self.parts = terms, [(part, rows) for part, rows in parts if rows.stop > rows.start]

    def __call__(self, site: int, maps: Maps, x: Tensor) -> Sequence[Tensor]:
        """Each map's output, (N, out)."""
        terms = self.terms
        if terms is None or not (there := [one for one in self.parts if terms.at(one[0], site)]):
            return maps(x).each
        if len(there) == 1 and there[0][1] == slice(0, len(x)):  # all rows: nothing is cut
            part = there[0][0]
            read = terms.before(part, site, x)
            outs = maps(read)
            terms.after(part, site, read, outs.each, outs.whole)
            return outs.each
        given = [(rows, x[rows]) for _, rows in there]
        changed = [terms.before(part, site, same) for (part, _), (_, same) in zip(there, given, strict=True)]
        if any(one is not same for one, (_, same) in zip(changed, given, strict=True)):
            x = x.clone()
            for one, (rows, _) in zip(changed, given, strict=True):
                x[rows] = one
        outs = maps(x)
        for part, rows in there:
            whole = None if outs.whole is None else outs.whole[rows]
            terms.after(part, site, x[rows], [out[rows] for out in outs.each], whole)
        return outs.each


class _Layer:
    """One decoder layer, whose groups of maps are the sites from `first` on."""

    def __init__(self, first: int, layer: Any, prepack: bool) -> None:
        self.first, self.parts = first, LayerParts(layer)
        self.groups = [maps_of(self.parts.linears[group], prepack) for group in GROUPS]

    def __call__(self, x: Tensor, attention: RowAttention, keys: Tensor, values: Tensor, adapted: _Adapted) -> Tensor:
        """The layer's output, (N, hidden)."""

        def group(number: int, given: Tensor) -> Sequence[Tensor]:
            return adapted(self.first + number, self.groups[number], given)

        parts = self.parts
        first, second = parts.norms
        q, k, v = parts.heads(*group(0, first.forward(x, first.inverse(x))))
        q, k = (elementwise.turned(one, attention.cos, attention.sin, -1) for one in (q, k))
        keys[attention.rows, :, attention.positions] = k
        values[attention.rows, :, attention.positions] = v
        attended = attention.attend(q, k, v, (keys, values), parts.scaling, parts.window)
        x = x + group(1, attended.flatten(1))[0]
        gate, up = group(2, second.forward(x, second.inverse(x)))
        return x + group(3, elementwise.gated(parts.activation, gate, up))[0]
