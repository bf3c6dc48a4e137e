"""How a base's vectors are pooled, as the sentence-transformers files beside a model say it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gossamer.errors import BaseFileError, UnsupportedError

Pooling = Literal["mean", "cls", "last", "max"]

POOLS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda states, there: (states * there).sum(1) / there.sum(1),
    "cls": lambda states, _: states[:, 0],
    "last": lambda states, there: states[torch.arange(len(states)), there.sum(1).long()[:, 0] - 1],
    "max": lambda states, there: states.masked_fill(there == 0, -torch.inf).amax(1),
}
"""Of states (B, T, D) with `there` (B, T, 1), 1 at tokens and 0 at padding: (B, D)."""
_FIELDS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last", "max_tokens": "max"}
"""In a pooling's config `pooling_mode_<field>`."""
_PLAIN_TEXT: Mapping[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
"""What sentence_bert_config.json may say besides a length."""
_LARGEST_FILE = 2**20


class PoolingStyle(NamedTuple):
    """How a text becomes a vector.

    Attributes:
        longest: tokens of a text at most. prompt: what stands before every text.
        as_chat: whether sentence-transformers would put texts through a chat template, if the tokenizer has one.
    """

    pooling: Pooling = "mean"
    normalise: bool = True
    longest: int | None = None
    prompt: str = ""
    as_chat: bool = False


def style_of(base: Path) -> PoolingStyle:
    """What sentence-transformers' files beside a model say; the mean, normalised, where there are none.

    Raises: UnsupportedError for what they say beyond that; BaseFileError for files that cannot be read.
    """
    if not (base / "modules.json").is_file():
        return PoolingStyle()
    listed = [part for part in _read(base / "modules.json", list) if isinstance(part, dict)]
    parts = [(str(part.get("type", "")).rpartition(".")[2], str(part.get("path", ""))) for part in listed]
    kinds = [kind for kind, _ in parts]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or parts[0][1]:
        expected = "a Transformer in the folder itself, a Pooling, and perhaps a Normalize"
        got = ", ".join(f"{kind} in {path or 'the folder'}" for kind, path in parts)
        raise UnsupportedError("sentence-transformers modules", where=str(base), got=got, expected=expected)
    place = base / parts[1][1] / "config.json"
    if base.resolve() not in place.resolve().parents:
        raise BaseFileError("a module outside of the model's folder", where=str(base), got=parts[1][1])
    pooling, text = _read(place, dict), _optional(base / "sentence_bert_config.json")
    longest, prompt = text.pop("max_seq_length", None), _prompt(base / "config_sentence_transformers.json")
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise BaseFileError("not a length", where=f"{base}: max_seq_length", got=str(longest))
    unknown = [name for name, value in text.items() if value and value != _PLAIN_TEXT.get(name)]
    if prompt and pooling.get("include_prompt") is False:
        unknown.append("include_prompt: false")
    if unknown:
        raise UnsupportedError("a setting of sentence-transformers", where=str(base), got=", ".join(unknown))
    as_chat = "modality_config" not in text
    return PoolingStyle(_pooling(pooling, place), "Normalize" in kinds, longest, prompt, as_chat)


def _prompt(file: Path) -> str:
    about = _optional(file)
    name, known = about.get("default_prompt_name"), about.get("prompts")
    if name is None:
        return ""
    if not isinstance(known, dict) or not isinstance(known.get(name), str):
        raise BaseFileError("no such prompt", where=str(file), got=str(name))
    return known[name]


def _pooling(config: Mapping[str, Any], place: Path) -> Pooling:
    prefix = "pooling_mode_"
    named = [name.removeprefix(prefix) for name, value in config.items() if name.startswith(prefix) and value is True]
    found: list[Any] = [_FIELDS.get(name, name) for name in named]
    if isinstance(config.get("pooling_mode"), str):
        found = [config["pooling_mode"].replace("lasttoken", "last")]
    if len(found) != 1 or found[0] not in POOLS:
        expected = f"one of {', '.join(POOLS)}"
        raise UnsupportedError("a way of pooling", where=str(place), got=", ".join(found) or "none", expected=expected)
    return found[0]


def _optional(file: Path) -> dict[str, Any]:
    return _read(file, dict) if file.is_file() else {}


def _read(file: Path, kind: type) -> Any:
    """A small JSON file whose outermost value is of a kind."""
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise BaseFileError("too large to be a config", where=str(file))
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseFileError("a config that cannot be read", where=str(file), got=str(error)) from error
    if not isinstance(value, kind):
        raise BaseFileError("a config of another form", where=str(file), got=type(value).__name__)
    return value
