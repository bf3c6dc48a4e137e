"""Adapters that hold an embedding and a head of their own, made room for in a base that is loaded to be merged into."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.adapter import Adapter
from gossamer.attachment import base_fingerprint
from gossamer.attachment.walk import NOTED, modules
from gossamer.errors import AdapterFileError, UsageError
from gossamer.methods.whole import Whole


def own_vocabulary(model: PreTrainedModel, adapters: Sequence[Adapter]) -> bool:
    """Whether a merge has to give the base more rows, or two weights where it has one for embedding and head."""
    ends = _ends(model)
    saved = _saved(ends, adapters)
    return bool(saved) and (_tied(ends) or any(len(own) != rows_of(model) for path, own in saved))


@contextmanager
@torch.no_grad()
def room_for_vocabulary(model: PreTrainedModel, adapters: Sequence[Adapter]) -> Iterator[list[str]]:
    """Let adapters with an embedding or a head of their own be attached inside; yields in words what was changed.

    The embedding and head get the adapters' number of rows, and a weight each where they shared one. The model is
    taken for the base that it was before.

    Raises: UsageError for adapters that want different numbers of rows; AdapterFileError for one that holds new rows of
        the embedding and none of the head, or the other way round.
    """
    notes: list[str] = []
    if not own_vocabulary(model, adapters):
        yield notes
        return
    ends, before = _ends(model), base_fingerprint(model)
    sizes = sorted({len(own) for _, own in _saved(ends, adapters)})
    rows = rows_of(model)
    if len(sizes) > 1:
        raise UsageError("adapters whose vocabularies differ in size have no one merge", got=", ".join(map(str, sizes)))
    if sizes != [rows]:
        _require_both(ends, adapters)
        whole: Any = model
        whole.resize_token_embeddings(sizes[0], mean_resizing=False)
        notes.append(f"the vocabulary has the adapter's {sizes[0]} rows; the base's has {rows}")
    ends = _ends(model)
    if _tied(ends):
        *_, head = ends.values()
        head.weight = nn.Parameter(head.get_parameter("weight").detach().clone(), requires_grad=False)
        _say_untied(model.config)
        notes.append("embedding and head, one weight in the base, are two now (tie_word_embeddings: false)")
    vars(model)[NOTED] = before
    try:
        yield notes
    finally:
        vars(model).pop(NOTED, None)


def _say_untied(config: Any) -> None:
    for one in (config, config.get_text_config()):
        one.tie_word_embeddings = False


def rows_of(model: PreTrainedModel) -> int:
    """Tokens that a model has an embedding for."""
    embedding: Any = model.get_input_embeddings()
    return len(embedding.weight)


def _require_both(ends: dict[str, nn.Module], adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        absent = [path for path in ends if "weight" not in adapter.tensors.get(path, ())]
        if absent:
            raise AdapterFileError(
                "a vocabulary of another size than the base's, and not all of its rows",
                got=f"no weight of {', '.join(absent)}",
                hint="save embedding and head with the adapter (modules_to_save)",
            )


def _ends(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The embedding, and the head where there is one, by path."""
    wanted = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
    paths = {id(module): path for path, module in modules(model).items()}
    return {paths[id(one)]: one for one in wanted if id(one) in paths and "weight" in one._parameters}


def _tied(ends: dict[str, nn.Module]) -> bool:
    return len({id(one._parameters["weight"]) for one in ends.values()}) < len(ends)


def _saved(ends: dict[str, nn.Module], adapters: Sequence[Adapter]) -> list[tuple[str, Tensor]]:
    """The whole weights that adapters hold for them; of methods that train one weight for both, none."""
    return [
        (path, adapter.tensors[path]["weight"])
        for adapter in adapters
        if not isinstance(adapter.spec, Whole)
        for path in ends
        if "weight" in adapter.tensors.get(path, ())
    ]
