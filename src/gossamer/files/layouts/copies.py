"""Copies of the base's own embedding and head, which PEFT writes beside an adapter of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from gossamer.adapter import Tensors
from gossamer.errors import AdapterFileError

_HEADS = ("lm_head", "embed_out")


def dropped(copies: Mapping[str, Tensor], tensors: Tensors, where: str) -> None:
    """Accept `<path>.base_layer.weight` where it is such a copy; it is not the adapter's, so it is not kept.

    Raises `AdapterFileError` for any other module's, or of another shape than the factors have.
    """
    for path, weight in copies.items():
        slots = tensors.get(path, {})
        embedding = "lora_embedding_A" in slots and "lora_embedding_B" in slots
        first, second = ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_A", "lora_B")
        named = embedding or path.rpartition(".")[2] in _HEADS
        if not named or any(name not in slots or slots[name].ndim != 2 for name in (first, second)):
            raise AdapterFileError(
                "a weight of the base's own, which no adapter changes",
                where=f"{where}: {path}.base_layer.weight",
                expected="such a copy beside the factors of an embedding or a head only",
            )
        expected = (slots[second].shape[1 if embedding else 0], slots[first].shape[0 if embedding else 1])
        if tuple(weight.shape) != expected:
            raise AdapterFileError(
                "a copy of the base's weight that does not fit the factors beside it",
                where=f"{where}: {path}.base_layer.weight",
                got=str(tuple(weight.shape)),
                expected=str(expected),
            )
    if copies:
        warnings.warn(
            f"{where}: copies of the base's own weights are left out, the model has them: {', '.join(copies)} "
            "(if they had been changed, for example by a resized vocabulary, load them into the model first)",
            stacklevel=2,
        )
