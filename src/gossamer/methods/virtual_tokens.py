"""The key-value cache that begins with virtual tokens, and how it is filled."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import StateError, UnsupportedError
from gossamer.methods.base import Base, Layer, Shape

SLOT = "prompt_embeddings"
_MARK = "_gossamer_virtual_tokens"


class VirtualTokensLayer(Layer):
    """Sees to it that the model runs with a cache that begins with the virtual tokens."""

    def __init__(self, slots: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(slots[SLOT].detach().clone())

    @abstractmethod
    def keys_and_values(self, base: Base) -> list[tuple[Tensor, Tensor]]:
        """For each layer of the model, keys and values (1, kv heads, P, head dim)."""

    def neutral(self, base: Base) -> Mapping[str, Tensor | None]:
        """None: every token attends to the virtual ones, whatever they are."""
        return {SLOT: None}

    def replaces(self) -> list[str]:
        return ["the beginning of the key-value cache"]

    def forward(self, base: Base, **kwargs: Any) -> Any:
        count = len(self.prompt_embeddings)
        if base.checkpointed():
            raise StateError("gradient checkpointing switches off the key-value cache, where virtual tokens are")
        cache = kwargs.get("past_key_values")
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        if cache is None or cache.get_seq_length() == 0:
            cache = kwargs["past_key_values"] = self._filled(base, cache, tokens.shape[0])
        elif getattr(cache, _MARK, None) != count:
            raise StateError("this cache was begun without the virtual tokens that are active now")
        before = cache.get_seq_length()
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if mask.ndim != 2:
                raise UnsupportedError("virtual tokens need a mask of rows and tokens", got=str(tuple(mask.shape)))
            kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + count
        out = base(**kwargs)
        if cache.get_seq_length() != before + tokens.shape[1]:
            raise StateError("the model did not use its key-value cache, where the virtual tokens are")
        if kwargs.get("use_cache") is False and "past_key_values" in out:
            out["past_key_values"] = None
        return out

    def _filled(self, base: Base, cache: Any, rows: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache() if cache is None else cache
        for index, (keys, values) in enumerate(self.keys_and_values(base)):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        setattr(cache, _MARK, len(self.prompt_embeddings))
        return cache

    def merged(self, current: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise UnsupportedError("no weight says what virtual tokens do, so they cannot be merged")


class PrefixLayer(VirtualTokensLayer):
    """The keys and values themselves."""

    def keys_and_values(self, base: Base) -> list[tuple[Tensor, Tensor]]:
        layers, heads, size = cache_shape(base.shape.config)
        table = self.prompt_embeddings.to(embeddings_of(base.shape).dtype)
        pairs = table.view(1, -1, layers * 2, heads, size).permute(2, 0, 3, 1, 4)
        return [(pairs[2 * layer], pairs[2 * layer + 1]) for layer in range(layers)]


class PromptLayer(VirtualTokensLayer):
    """What the embeddings leave in the cache when they have gone through the model."""

    def keys_and_values(self, base: Base) -> list[tuple[Tensor, Tensor]]:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        soft = self.prompt_embeddings.to(embeddings_of(base.shape).dtype)
        base(inputs_embeds=soft[None], past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]


def embeddings_of(shape: Shape) -> Tensor:
    """A model's input embeddings, (rows, hidden)."""
    assert shape.embeddings is not None, "a model has input embeddings"
    return shape.embeddings


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Layers, key-value heads and head size of a decoder, from its config."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return text.num_hidden_layers, 1, size
    shared = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    return text.num_hidden_layers, shared or heads, size


def refuse_other_caches(config: Any) -> None:
    """Raise `UnsupportedError` unless every layer of a decoder keeps all keys and values."""
    text = config.get_text_config()
    kinds = {*(getattr(text, "layer_types", None) or ["full_attention"])}
    if kinds != {"full_attention"} or getattr(text, "sliding_window", None):
        raise UnsupportedError(
            "virtual tokens would fall out of a sliding window, or have no place in another kind of state",
            got=f"{text.model_type}, {', '.join(sorted(kinds))}, window {getattr(text, 'sliding_window', None)}",
            expected="a decoder with full attention in every layer",
        )
