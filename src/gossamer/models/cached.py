"""The Llama family with a key-value cache of rows, for many requests at once that are each at another place.

Tokens of all sequences go through a layer together, (N, hidden); nothing is padded but attention over the cache.

    h = x + o(attention(rotated(q), rotated(k), v))         q, k, v = linears(rms_norm(x))
    y = h + down(act(gate) * up)                            gate, up = linears(rms_norm(h))

The plain twin is transformers' own model with a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.kernels import elementwise
from gossamer.kernels.frozen_maps import Map, map_of, prepacked_bytes
from gossamer.kernels.linears import ACTIVATIONS
from gossamer.models.blocks import ATTENTION, FAMILIES, FEEDFORWARD, norm_of
from gossamer.models.steps import Part, Piece, Site, Step, Terms

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The maps of a layer that read the same input."""
_PAGE = 128


class Cache:
    """Keys and values of every layer, (rows, heads, tokens, d); rows in use are kept together by whoever uses it."""

    def __init__(self, layers: int, heads: int, width: int, rows: int, like: Tensor) -> None:
        self.shape, self.like = (rows, heads, 0, width), like
        self.layers = [(self._empty(0), self._empty(0)) for _ in range(layers)]

    def _empty(self, tokens: int) -> Tensor:
        rows, heads, _, width = self.shape
        return self.like.new_zeros(rows, heads, tokens, width)  # zeros: what is masked must not be NaN

    @property
    def tokens(self) -> int:
        """Tokens that a row has room for."""
        return self.layers[0][0].shape[2]

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens a row."""
        if tokens <= self.tokens:
            return
        tokens = -(-max(tokens, self.tokens * 3 // 2) // _PAGE) * _PAGE
        for index, pair in enumerate(self.layers):
            grown = (self._empty(tokens), self._empty(tokens))
            for old, new in zip(pair, grown, strict=True):
                new[:, :, : old.shape[2]] = old
            self.layers[index] = grown

    @torch.inference_mode()
    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a row the first tokens of another."""
        for pair in self.layers:
            for one in pair:
                one[target, :, :tokens] = one[source, :, :tokens]

    @torch.inference_mode()
    def keep(self, row: int, tokens: int) -> KeptRow:
        """A copy of a row's first tokens."""
        return KeptRow(torch.stack([one[row, :, :tokens] for pair in self.layers for one in pair]))

    @torch.inference_mode()
    def give(self, row: int, kept: KeptRow, tokens: int) -> None:
        """Give a row the first tokens of what was kept."""
        self.reserve(tokens)
        for place, one in enumerate(one for pair in self.layers for one in pair):
            one[row, :, :tokens] = kept.values[place, :, :tokens]

    def trim(self) -> None:
        """Let go of all room."""
        self.layers = [(self._empty(0), self._empty(0)) for _ in self.layers]


@dataclass(frozen=True)
class KeptRow:
    """Keys and values of a sequence's first tokens, (2 layers, heads, tokens, d)."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self.values.nbytes


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
        self.head = map_of(model.lm_head, prepack)
        self.norm = norm_of(inner.norm, self.layers[0].offset)
        self.copied = self.prepacked_bytes(model) if prepack else 0
        self.like: Tensor = self.norm.weight
        """Of the dtype and on the device that steps run in."""
        names = {module: path for path, module in model.named_modules()}
        maps = [layer.modules(group) for layer in self.layers for group in GROUPS] + [(model.lm_head,)]
        self.sites = tuple(Site(tuple(names[one] for one in group), group) for group in maps)

    @staticmethod
    def takes(model: nn.Module) -> bool:
        """Whether this is a model whose layers are known, and nothing stands in their way."""
        layers = getattr(getattr(model, "model", None), "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(model, "lm_head"):
            return False
        if any("forward" in vars(one) or one._forward_pre_hooks or one._forward_hooks for one in model.modules()):
            return False
        known: list[Any] = [one for one in layers if type(one).__name__ in FAMILIES]
        return len(known) == len(layers) and all(one.self_attn.config.hidden_act in ACTIVATIONS for one in known)

    @staticmethod
    def prepacked_bytes(model: nn.Module) -> int:
        """What the copies of the weights would take; 0 where nothing can be prepacked."""
        return prepacked_bytes(model.modules())

    def cache(self, rows: int) -> Cache:
        """An empty cache with so many rows."""
        first = self.layers[0]
        heads = first.maps["k_proj"].out_features // first.width
        return Cache(len(self.layers), heads, first.width, rows, self.like)

    def parts(self, step: Step) -> tuple[Part, Part, Part]:
        """Sequences that are continued, prompts that are read, and the head's rows."""
        sizes = [(number, piece.count) for number, piece in enumerate(step.pieces)]
        alone = sum(piece.continues for piece in step.pieces)
        return tuple(sizes[:alone]), tuple(sizes[alone:]), tuple((number, 1) for number in step.wanted)

    @torch.inference_mode()
    def __call__(self, step: Step, cache: Cache, terms: Terms | None = None) -> Tensor:
        """Take a step: write keys and values of its tokens, and give the logits that are wanted."""
        cache.reserve(max(piece.start + piece.count for piece in step.pieces))
        look = _Look(step, step.tokens.device)
        x = self.inner.embed_tokens(step.tokens)
        look.turn(self.inner.rotary_emb, x)
        body = _Adapted(terms, ((0, slice(0, look.count)), (1, slice(look.count, len(x)))))
        for index, layer in enumerate(self.layers):
            x = layer(x, look, cache.layers[index], body)
        x = x[look.last]
        x = self.norm.forward(x, self.norm.inverse(x))
        return _Adapted(terms, ((2, slice(0, len(x))),))(len(self.sites) - 1, (self.head,), x)[0]


class _Adapted:
    """Maps that read the same input, with the adapters' terms of the parts that the rows belong to."""

    def __init__(self, terms: Terms | None, parts: Sequence[tuple[int, slice]]) -> None:
        self.terms, self.parts = terms, [(part, rows) for part, rows in parts if rows.stop > rows.start]

    def __call__(self, site: int, maps: Sequence[Map], x: Tensor) -> list[Tensor]:
        """Each map's output, (N, out)."""
        if self.terms is None:
            return [one(x) for one in maps]
        given = [(x[rows], self.terms.before(part, site, x[rows])) for part, rows in self.parts]
        if any(changed is not same for same, changed in given):
            x = torch.cat([changed for _, changed in given])
        outs = [one(x) for one in maps]
        for part, rows in self.parts:
            self.terms.after(part, site, x[rows], [out[rows] for out in outs])
        return outs


class _Look:
    """Where the tokens of a step stand, and what each may look at: the same for all layers.

    Sequences that are continued by one token look at the cache together, as many rows of it as there are up to the
    last of theirs; a row between them that is not continued now takes part for nothing.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        ends = [*itertools.accumulate(piece.count for piece in step.pieces)]
        starts = [end - piece.count for piece, end in zip(step.pieces, ends, strict=True)]
        places = [(piece.row, piece.start + place) for piece in step.pieces for place in range(piece.count)]
        self.rows, self.positions = torch.tensor(places, device=device).T
        self.last = torch.tensor([ends[number] - 1 for number in step.wanted], dtype=torch.int64, device=device)
        placed = [*zip(step.pieces, starts, strict=True)]
        alone = [piece for piece in step.pieces if piece.continues]
        self.count = len(alone)
        self.pieces = [(piece, slice(at, at + piece.count)) for piece, at in placed[self.count :]]
        if not alone:
            return
        self.own = torch.tensor([piece.row for piece in alone], device=device)
        self.extent, self.longest = int(self.own.max()) + 1, max(piece.start for piece in alone) + 1
        self.whole = self.count == self.extent and all(piece.row == row for row, piece in enumerate(alone))
        self.here = torch.zeros(self.extent, dtype=torch.int64, device=device)  # a row that is not continued sees one
        self.here[self.own] = torch.tensor([piece.start for piece in alone], device=device)
        self.every = torch.arange(self.longest, device=device)
        self.masks: dict[int | None, Tensor] = {}

    def turn(self, rotary: Any, x: Tensor) -> None:
        """Rotary angles of every token, (N, 1, d)."""
        cos, sin = rotary(x.unsqueeze(0), self.positions.unsqueeze(0))
        self.cos, self.sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)

    def attend(self, q: Tensor, pair: tuple[Tensor, Tensor], scaling: float, window: int | None) -> Tensor:
        """(N, H, d) of each token with what is in the cache of its own row."""
        out = torch.empty_like(q)
        if self.count:
            out[: self.count] = self._continued(q[: self.count], pair, scaling, window)
        for piece, tokens in self.pieces:
            out[tokens] = self._read(q[tokens], pair, piece, scaling, window)
        return out

    def _continued(self, q: Tensor, pair: tuple[Tensor, Tensor], scaling: float, window: int | None) -> Tensor:
        """One query a row, (rows, H, d); heads that share keys are as so many queries of one head."""
        laid = q
        if not self.whole:
            laid = q.new_zeros(self.extent, *q.shape[1:])
            laid[self.own] = q
        keys, values = (one[: self.extent, :, : self.longest] for one in pair)
        grouped = laid.view(self.extent, keys.shape[1], -1, q.shape[2])
        out = _sdpa(grouped, keys, values, scaling, attn_mask=self._mask(window)).reshape(laid.shape)
        return out if self.whole else out[self.own]

    def _mask(self, window: int | None) -> Tensor:
        if window not in self.masks:
            seen = self.every <= self.here[:, None]
            self.masks[window] = (seen if window is None else seen & (self.every > self.here[:, None] - window))[
                :, None, None
            ]
        return self.masks[window]

    def _read(self, q: Tensor, pair: tuple[Tensor, Tensor], piece: Piece, scaling: float, window: int | None) -> Tensor:
        """A piece of a prompt, (tokens, H, d)."""
        end = piece.start + piece.count
        keys, values = (one[piece.row : piece.row + 1, :, :end] for one in pair)
        options: dict[str, Any] = {"is_causal": True}
        if piece.start or (window is not None and window < end):
            every = torch.arange(end, device=q.device)
            own = every[piece.start :, None]
            mask = every <= own
            options = {"attn_mask": mask if window is None else mask & (every > own - window)}
        query = q.transpose(0, 1).unsqueeze(0)
        out = _sdpa(query, keys, values, scaling, enable_gqa=keys.shape[1] != q.shape[1], **options)
        return out[0].transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float, **options: Any) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling, **options)


class _Layer:
    """One decoder layer."""

    def __init__(self, index: int, layer: Any, prepack: bool) -> None:
        self.sites = range(index * len(GROUPS), (index + 1) * len(GROUPS))
        family, attention = FAMILIES[type(layer).__name__], layer.self_attn
        config = attention.config
        self.attention, self.offset, self.activation = attention, family.offset, config.hidden_act
        self.window = config.sliding_window if family.window else getattr(attention, "sliding_window", None)
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.norms = [norm_of(one, family.offset) for one in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.maps = {name: getattr(attention, name) for name in ATTENTION}
        self.maps |= {name: getattr(layer.mlp, name) for name in FEEDFORWARD}
        self.groups = [tuple(map_of(self.maps[name], prepack) for name in group) for group in GROUPS]

    def modules(self, names: Sequence[str]) -> tuple[nn.Module, ...]:
        """The model's modules of these names."""
        return tuple(self.maps[name] for name in names)

    def __call__(self, x: Tensor, look: _Look, pair: tuple[Tensor, Tensor], adapted: _Adapted) -> Tensor:
        """The layer's output, (N, hidden)."""

        def group(number: int, given: Tensor) -> list[Tensor]:
            return adapted(self.sites[number], self.groups[number], given)

        first, second = self.norms
        q, k, v = (one.unflatten(-1, (-1, self.width)) for one in group(0, first.forward(x, first.inverse(x))))
        if hasattr(self.attention, "q_norm"):
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
        keys, values = pair
        keys[look.rows, :, look.positions] = elementwise.turned(k, look.cos, look.sin, -1)
        values[look.rows, :, look.positions] = v
        attended = look.attend(elementwise.turned(q, look.cos, look.sin, -1), pair, self.scaling, self.window)
        x = x + group(1, attended.flatten(1))[0]
        gate, up = group(2, second.forward(x, second.inverse(x)))
        return x + group(3, elementwise.gated(self.activation, gate, up))[0]
