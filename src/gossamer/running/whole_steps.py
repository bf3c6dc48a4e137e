"""Steps through a model's own forward, for every causal model of transformers whose memory is keys and values.

Sequences that are continued are one call, laid together with padding on their left; every chunk of a prompt is a call
of its own. Adapters add their terms by hooks that are there while a step runs, and gone after it.

The plain twin is the same forward on a whole sequence, without a cache.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache, DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer as SlidingLayer

from gossamer.attachment import walk
from gossamer.attachment.kinds import kind_of
from gossamer.errors import UnsupportedError
from gossamer.methods.base import LINEAR_KINDS
from gossamer.running.row_cache import RowCache
from gossamer.running.steps import AdapterTerms, Chunk, ChunkRows, LinearGroup, StepInput

_ASKED = ("attention_mask", "past_key_values", "logits_to_keep")
"""What a forward must take."""
_PROBE = 16
_ROUNDING = {torch.float32: 1e-3}
"""Of the logits' length, between ways to the same; 0.2 in 16 bits, where a token may change experts."""


class TransformersDecoder:
    """A causal model, one step at a time, by its own forward.

    Construction runs the model on a few tokens: to see what its layers keep, and which of its linear maps read every
    token (adapters may stand at those; experts that read some of the tokens are none), and to compare steps with the
    whole forward.

    Raises: UnsupportedError for a model whose memory is more than keys and values, that does not continue texts, or
        whose steps are not its forward.
    """

    copied = 0

    def __init__(self, model: Any) -> None:
        if reason := refusal(model):
            raise UnsupportedError("a model that steps cannot run", got=type(model).__name__, expected=reason)
        self.model = model
        self.like: Tensor = model.get_input_embeddings().weight.detach()
        """Of the dtype and on the device that steps run in."""
        self.named_positions = "position_ids" in inspect.signature(model.forward).parameters
        maps = {path: one for path, one in walk.modules(model).items() if kind_of(one) in LINEAR_KINDS}
        words = _words(model, _PROBE, self.like.device)
        self.samples, whole = _probed(model, maps, words)
        self.sites = tuple(LinearGroup((path,), (one,)) for path, one in maps.items() if path in whole)
        self.head = model.get_output_embeddings()
        if not any(self.samples) or not self._agrees(words[0]):
            expected = "steps with keys and values that give what the whole forward gives"
            raise UnsupportedError("a model that steps cannot run", got=type(model).__name__, expected=expected)

    @torch.inference_mode()
    def _agrees(self, words: Tensor) -> bool:
        """Whether steps give what the whole forward gives: not where a model looks ahead or has other positions."""
        texts, cache = (words[:8], words[8:14]), self.cache()
        for chunks in (
            (Chunk(0, 0, 5), Chunk(1, 0, 4)),
            (Chunk(1, 4, 1), Chunk(0, 5, 2)),
            (Chunk(0, 7, 1), Chunk(1, 5, 1)),
        ):
            tokens = [texts[row][start : start + count] for row, start, count in chunks]
            out = self(StepInput(torch.cat(tokens), chunks, (0, 1)), cache).float()
        whole = [self.model(input_ids=one.unsqueeze(0), use_cache=False).logits[0, -1].float() for one in texts]
        rounding = _ROUNDING.get(self.like.dtype, 0.2)
        return all((one - other).norm() <= rounding * other.norm() for one, other in zip(out, whole, strict=True))

    @staticmethod
    def takes(model: nn.Module) -> bool:
        """Whether this is a causal model that keeps keys and values, and nothing else."""
        return refusal(model) is None

    def cache(self, rows: int = 0, tokens: int = 0) -> RowCache:
        """An empty cache; what it may grow to does not matter here."""
        return RowCache(self.samples, axis=1)

    def parts(self, step: StepInput) -> list[ChunkRows]:
        """For each call its tokens, and the last one of each of its chunks, for the head."""
        found: list[ChunkRows] = []
        for numbers in _calls(step):
            found.append(tuple((number, step.chunks[number].length) for number in numbers))
            found.append(tuple((number, 1) for number in numbers))
        return found

    @torch.inference_mode()
    def __call__(self, step: StepInput, cache: RowCache, terms: AdapterTerms | None = None) -> Tensor:
        """Take a step: write keys and values of its tokens, and give the logits that are wanted."""
        cache.reserve(*step.extent)
        tokens = step.tokens.split([chunk.length for chunk in step.chunks])
        found = []
        with _Hooks(terms, self.sites, self.head) as hooks:
            for call, numbers in enumerate(_calls(step)):
                hooks.call = call
                ids = torch.stack([tokens[number] for number in numbers])
                found.append(self._run(ids, cache, [step.chunks[number] for number in numbers]))
        return torch.cat(found)[[*step.wanted]]

    def _run(self, ids: Tensor, cache: RowCache, chunks: Sequence[Chunk]) -> Tensor:
        """One call: (chunks, vocabulary) after the last token of each."""
        laid = _Laid.of(chunks, ids.device)
        memory = Cache(layers=[_Layer(states, laid) if states else DummyLayer() for states in cache.layers])
        options = {"position_ids": laid.positions} if self.named_positions else {}
        out = self.model(
            input_ids=ids,
            attention_mask=laid.mask,
            past_key_values=memory,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
            **options,
        )
        return out.logits[:, -1]


def refusal(model: Any) -> str | None:
    """What `TransformersDecoder` asks for and this model is not; None if it can be run."""
    config = getattr(model, "config", None)
    if not callable(getattr(type(model), "can_generate", None)) or not type(model).can_generate():
        return "a transformers model with a language head"
    if getattr(config, "is_encoder_decoder", False):
        return "a decoder alone: an encoder-decoder reads a second text"
    if getattr(model, "_is_stateful", False):
        return "keys and values as the only memory: this model has a recurrent state"
    if model.get_output_embeddings() is None or model.get_input_embeddings() is None:
        return "input and output embeddings"
    known = (DynamicLayer, SlidingLayer, DummyLayer)
    strange = {type(one).__name__ for one in DynamicCache(config=config).layers if type(one) not in known}
    if strange:
        return f"keys and values as the only memory: this model has {', '.join(sorted(strange))}"
    missing = [name for name in _ASKED if name not in inspect.signature(model.forward).parameters]
    return f"a forward that takes {', '.join(missing)}" if missing else None


@torch.inference_mode()
def _probed(model: Any, maps: dict[str, nn.Module], ids: Tensor) -> tuple[list[tuple[Tensor, ...]], set[str]]:
    """What each layer keeps of a token, and the maps that read every token (the head: the last one) at each call."""
    head, memory = model.get_output_embeddings(), Cache(layer_class_to_replicate=DynamicLayer)
    with _Watch(maps, {one: 1 if one is head else ids.numel() for one in maps.values()}) as watch:
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=memory,
            use_cache=True,
            logits_to_keep=1,
        )
    layers: list[Any] = memory.layers
    return [() if one.keys is None else (one.keys[0, :, 0], one.values[0, :, 0]) for one in layers], watch.whole


def _words(model: Any, count: int, device: torch.device) -> Tensor:
    """(1, count) tokens, none of which is padding: some models leave that out when they number positions."""
    size, padding = model.get_input_embeddings().num_embeddings, getattr(model.config, "pad_token_id", None)
    ids = [one % size for one in range(size // 2, size // 2 + count + 1)]
    return torch.tensor([[one for one in ids if one != padding][:count]], device=device)


class _Watch(contextlib.ExitStack):
    """While open, finds the maps that read so many rows at every call."""

    def __init__(self, maps: dict[str, nn.Module], rows: dict[nn.Module, int]) -> None:
        super().__init__()
        self.rows, self.reads = rows, {path: set[bool]() for path in maps}
        for path, one in maps.items():
            self.callback(one.register_forward_hook(self._hook(path)).remove)

    def _hook(self, path: str) -> Any:
        def hook(one: nn.Module, args: tuple[Any, ...], _: Any) -> None:
            self.reads[path].add(bool(args) and args[0].numel() == self.rows[one] * args[0].shape[-1])

        return hook

    @property
    def whole(self) -> set[str]:
        """Their paths."""
        return {path for path, found in self.reads.items() if found == {True}}


def _calls(step: StepInput) -> list[list[int]]:
    """Numbers of the chunks of each call."""
    alone = sum(chunk.continues for chunk in step.chunks)
    return ([[*range(alone)]] if alone else []) + [[number] for number in range(alone, len(step.chunks))]


class _Laid(NamedTuple):
    """Where the tokens of a call stand, and what they look at; the same for all layers.

    Attributes:
        chunks: of the call: one of any size, or several of one token.
        before: tokens in the cache, of the longest.
        mask: (chunks, longest), 1 where there is a token: padding is on the left.
        positions: (chunks, tokens) of the call's tokens, each in its own sequence.
        rows: (chunks,) in the cache.
        index: (chunks, longest), which token of its row stands at each place.
    """

    chunks: Sequence[Chunk]
    before: int
    mask: Tensor
    positions: Tensor
    rows: Tensor
    index: Tensor

    @classmethod
    def of(cls, chunks: Sequence[Chunk], device: torch.device) -> _Laid:
        count = chunks[0].length
        starts = torch.tensor([chunk.start for chunk in chunks], device=device).unsqueeze(1)
        rows = torch.tensor([chunk.row for chunk in chunks], device=device)
        longest = max(chunk.start for chunk in chunks) + count
        index = torch.arange(longest, device=device) - (longest - count - starts)
        positions = starts + torch.arange(count, device=device)
        return cls(chunks, longest - count, (index >= 0).long(), positions, rows, index.clamp(min=0))


class _Layer(CacheLayerMixin):
    """One layer's keys and values as transformers asks for them, for the length of a call."""

    is_sliding = False

    def __init__(self, states: tuple[Tensor, ...], laid: _Laid) -> None:
        super().__init__()
        self.states, self.laid, self.is_initialized = states, laid, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """It is there already."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the call's keys and values, (chunks, heads, tokens, d), and give (chunks, heads, all tokens, d)."""
        self.keys, self.values = (
            self._both(*pair) for pair in zip(self.states, (key_states, value_states), strict=True)
        )
        return self.keys, self.values

    def _both(self, kept: Tensor, new: Tensor) -> Tensor:
        laid = self.laid
        kept[laid.rows[:, None], laid.positions] = new.transpose(1, 2)
        if len(laid.chunks) == 1:
            row = laid.chunks[0].row
            return kept[row : row + 1, : laid.index.shape[1]].transpose(1, 2)
        places = laid.rows[:, None] * kept.shape[1] + laid.index
        found = kept.flatten(0, 1).index_select(0, places.flatten())
        return found.unflatten(0, places.shape).transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All that there will be, from the first on."""
        return self.laid.before + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the call's own."""
        return self.laid.before

    def get_max_length(self) -> int:
        """None."""
        return -1


class _Hooks(contextlib.ExitStack):
    """While open, the sites' inputs and outputs pass through the terms; `call` says for which call."""

    def __init__(self, terms: AdapterTerms | None, sites: Sequence[LinearGroup], head: nn.Module) -> None:
        super().__init__()
        self.call = 0
        for number, site in enumerate(sites if terms is not None else ()):
            (one,) = site.modules
            self._add(number, one, one is head, terms)

    def _add(self, number: int, one: nn.Module, is_head: bool, terms: Any) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            flat = args[0].flatten(0, -2)
            changed = terms.before(2 * self.call + is_head, number, flat)
            return None if changed is flat else (changed.view(args[0].shape), *args[1:])

        def after(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            flat = out.flatten(0, -2)
            terms.after(2 * self.call + is_head, number, args[0].flatten(0, -2), [flat])
            return flat.view(out.shape)

        for handle in (one.register_forward_pre_hook(before), one.register_forward_hook(after)):
            self.callback(handle.remove)
