"""Steps through a model's own forward, for every causal model of transformers whose memory is keys and values.

Sequences that are continued are one call, laid together with padding on their left; every chunk of a prompt is a call
of its own. Adapters add their terms by hooks that are there while a step runs, and gone after it.

The plain twin is the same forward on a whole sequence, without a cache.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

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

_REQUIRED = ("attention_mask", "past_key_values", "logits_to_keep")
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
            raise _unsupported(model, reason)
        self.model = model
        self.like: Tensor = model.get_input_embeddings().weight.detach()
        self.named_positions = "position_ids" in inspect.signature(model.forward).parameters
        maps = {path: one for path, one in walk.modules(model).items() if kind_of(one) in LINEAR_KINDS}
        words = _words(model, _PROBE, self.like.device)
        self.samples, whole = _probed(model, maps, words)
        self.sites = tuple(LinearGroup((path,), (one,)) for path, one in maps.items() if path in whole)
        self.head = model.get_output_embeddings()
        if not any(self.samples) or not self._agrees(words[0]):
            raise _unsupported(model, "steps with keys and values that give what the whole forward gives")

    @torch.inference_mode()
    def _agrees(self, words: Tensor) -> bool:
        """Whether steps give what the whole forward gives: not where a model looks ahead or has other positions."""
        texts, cache = (words[:8], words[8:14]), self.cache()
        for chunks in (
            (Chunk(0, 0, 5), Chunk(1, 0, 4)),
            (Chunk(1, 4, 1), Chunk(0, 5, 2)),
            (Chunk(0, 7, 1), Chunk(1, 5, 1)),
        ):
            tokens = torch.cat([texts[one.row][one.start : one.end] for one in chunks])
            out = self(StepInput(tokens, chunks, (0, 1)), cache).float()
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
        with _adapted(terms, self.sites, self.head) as begin_call:
            for call, numbers in enumerate(_calls(step)):
                begin_call(call)
                ids = torch.stack([tokens[number] for number in numbers])
                found.append(self._run(ids, cache, [step.chunks[number] for number in numbers]))
        return torch.cat(found)[[*step.wanted]]

    def _run(self, ids: Tensor, cache: RowCache, chunks: Sequence[Chunk]) -> Tensor:
        """One call: (chunks, vocabulary) after the last token of each."""
        laid = _Padding(chunks, ids.device)
        memory = Cache(layers=[_Layer(states, laid) if states else DummyLayer() for states in cache.layers])
        options = {"position_ids": laid.positions} if self.named_positions else {}
        options |= {"attention_mask": laid.mask, "past_key_values": memory}
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=1, return_dict=True, **options).logits[:, -1]


def refusal(model: Any) -> str | None:
    """What `TransformersDecoder` needs and this model is not; None if it can be run."""
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
    missing = [name for name in _REQUIRED if name not in inspect.signature(model.forward).parameters]
    return f"a forward that takes {', '.join(missing)}" if missing else None


def _unsupported(model: Any, expected: str) -> UnsupportedError:
    return UnsupportedError("a model that steps cannot run", got=type(model).__name__, expected=expected)


def _words(model: Any, count: int, device: torch.device) -> Tensor:
    """(1, count) tokens, none of which is padding: some models leave that out when they number positions."""
    size, padding = model.get_input_embeddings().num_embeddings, getattr(model.config, "pad_token_id", None)
    ids = [one % size for one in range(size // 2, size // 2 + count + 1)]
    return torch.tensor([[one for one in ids if one != padding][:count]], device=device)


@torch.inference_mode()
def _probed(model: Any, maps: Mapping[str, nn.Module], ids: Tensor) -> tuple[list[tuple[Tensor, ...]], set[str]]:
    """What each layer keeps of a token, and the maps that read every token (the head: the last one) at each call."""
    head, memory = model.get_output_embeddings(), Cache(layer_class_to_replicate=DynamicLayer)
    reads: dict[str, set[bool]] = {path: set() for path in maps}

    def watch(path: str, rows: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            reads[path].add(bool(args) and args[0].numel() == rows * args[0].shape[-1])

        return hook

    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "past_key_values": memory}
    with ExitStack() as stack:
        for path, one in maps.items():
            rows = 1 if one is head else ids.numel()
            stack.callback(one.register_forward_hook(watch(path, rows)).remove)
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **options)
    layers: list[Any] = memory.layers
    kept = [() if one.keys is None else (one.keys[0, :, 0], one.values[0, :, 0]) for one in layers]
    return kept, {path for path, found in reads.items() if found == {True}}


def _calls(step: StepInput) -> list[list[int]]:
    """Numbers of the chunks of each call."""
    alone = sum(chunk.continues for chunk in step.chunks)
    return ([[*range(alone)]] if alone else []) + [[number] for number in range(alone, len(step.chunks))]


class _Padding:
    """Where the tokens of a call stand, and what they look at; the same for all layers.

    Attributes:
        chunks: of the call: one of any length, or several of one token.
        before: tokens in the cache, of the longest.
        mask: (chunks, longest), 1 where there is a token: padding is on the left.
        positions: (chunks, tokens) of the call's tokens, each in its own sequence.
        rows: (chunks,) in the cache.
        places: (chunks, longest), which token of its row stands at each place.
    """

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        length, self.chunks = chunks[0].length, chunks
        starts = torch.tensor([chunk.start for chunk in chunks], device=device).unsqueeze(1)
        self.rows = torch.tensor([chunk.row for chunk in chunks], device=device)
        self.before = max(chunk.start for chunk in chunks)
        places = torch.arange(self.before + length, device=device) - (self.before - starts)
        self.positions = starts + torch.arange(length, device=device)
        self.mask, self.places = (places >= 0).long(), places.clamp(min=0)


class _Layer(CacheLayerMixin):
    """One layer's keys and values as transformers uses them, for the length of a call."""

    is_sliding = False

    def __init__(self, states: tuple[Tensor, ...], laid: _Padding) -> None:
        super().__init__()
        self.states, self.laid, self.is_initialized = states, laid, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the call's keys and values, (chunks, heads, tokens, d), and give (chunks, heads, all tokens, d)."""
        keys, values = self.states
        self.keys, self.values = self._both(keys, key_states), self._both(values, value_states)
        return self.keys, self.values

    def _both(self, kept: Tensor, new: Tensor) -> Tensor:
        laid = self.laid
        kept[laid.rows[:, None], laid.positions] = new.transpose(1, 2)
        if len(laid.chunks) == 1:
            row = laid.chunks[0].row
            return kept[row : row + 1, : laid.places.shape[1]].transpose(1, 2)
        places = laid.rows[:, None] * kept.shape[1] + laid.places
        found = kept.flatten(0, 1).index_select(0, places.flatten())
        return found.unflatten(0, places.shape).transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens that there will be, from the first on."""
        return self.laid.before + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the call's own."""
        return self.laid.before

    def get_max_length(self) -> int:
        """No limit."""
        return -1


@contextmanager
def _adapted(
    terms: AdapterTerms | None, sites: Sequence[LinearGroup], head: nn.Module
) -> Iterator[Callable[[int], None]]:
    """While open, the sites' inputs and outputs pass through the terms. Yields what to call before each call."""
    part = 0

    def begin_call(number: int) -> None:
        nonlocal part
        part = 2 * number  # the head's rows are the part after it

    def add(number: int, one: nn.Module, terms: AdapterTerms) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            flat = args[0].flatten(0, -2)
            changed = terms.before(part + (one is head), number, flat)
            return None if changed is flat else (changed.view(args[0].shape), *args[1:])

        def after(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            flat = out.flatten(0, -2)
            terms.after(part + (one is head), number, args[0].flatten(0, -2), [flat])
            return flat.view(out.shape)

        for handle in (one.register_forward_pre_hook(before), one.register_forward_hook(after)):
            stack.callback(handle.remove)

    with ExitStack() as stack:
        if terms is not None:
            for number, site in enumerate(sites):
                add(number, site.modules[0], terms)
        yield begin_call
