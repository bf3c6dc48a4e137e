"""From what the user calls a model to its numbers: at most a config.json is read or fetched, never weights."""

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from gossamer.errors import BaseFileError, SpecError, nearest
from gossamer.planning.shape import FIELDS, KNOWN, ModelShape, known

_LARGEST = 8 << 20
_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def shape_of(model: Any) -> ModelShape:
    """The numbers of a model.

    Args:
        model: a `ModelShape`; a torch module, or a callable that makes one (on the meta device); a mapping, either the
            content of a config.json or the fields of `ModelShape` typed in; a folder with a config.json, or such a
            file; a name that is known here; an id on the hub, whose config.json is looked up in the hub's cache, or
            fetched alone.

    Raises: BaseFileError for what is not there or not readable; UnsupportedError for an unknown architecture;
        SpecError for numbers typed in that make no model.
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, Mapping):
        return shape_of_config(model) if "model_type" in model or "text_config" in model else typed_in(model)
    if callable(model):
        return _of_code(model)
    name = os.fspath(model)
    path = Path(name).expanduser()
    if path.is_dir():
        return shape_of_config(_read(path / "config.json"), path.name)
    if path.is_file():
        return shape_of_config(_read(path), path.parent.name or path.name)
    found = known(name)
    if found is not None:
        return found
    if _HUB_ID.fullmatch(name) and not isinstance(model, Path):
        return shape_of_config(_read(_from_hub(name)), name)
    raise _unknown(name)


def shape_of_config(config: Mapping[str, Any], name: str = "") -> ModelShape:
    """The numbers of the model that transformers makes of a config.

    Raises: UnsupportedError for what transformers knows no class for; BaseFileError for numbers that are missing.
    """
    return _counted(json.dumps(config, default=str, sort_keys=True), name)


@lru_cache(maxsize=16)
def _counted(text: str, name: str) -> ModelShape:
    from gossamer.planning.counting import shape_of_module
    from gossamer.planning.fake import described

    config: dict[str, Any] = json.loads(text)
    model = described(config, name)
    known = {*config, *(one for one, own in getattr(model.config, "attribute_map", {}).items() if own in config)}
    several = any(key.endswith("_config") and isinstance(value, dict) for key, value in config.items())
    missing = [] if several else [one for one in _NEEDED if hasattr(model.config, one) and one not in known]
    if missing:
        raise BaseFileError("numbers are missing in this config", where=name, expected=", ".join(missing))
    return shape_of_module(model, name or str(config.get("model_type", "")), text)


def _of_code(model: Any) -> ModelShape:
    import torch

    from gossamer.planning.counting import shape_of_module

    if not isinstance(model, torch.nn.Module):
        with torch.device("meta"):
            model = model()
    return shape_of_module(model)


def typed_in(given: Mapping[str, Any]) -> ModelShape:
    """A model of numbers alone: at least layers, hidden, heads, vocabulary and intermediate. Raises `SpecError`."""
    numbers: dict[str, Any] = {"name": "numbers typed in"} | dict(given)
    faults = [f"{key}: unknown; {nearest(key, FIELDS)}" for key in numbers if key not in FIELDS]
    needed = ("layers", "hidden", "heads", "vocabulary", "intermediate")
    faults += [f"{key}: required, but missing" for key in needed if numbers.get(key) is None]
    faults += [
        f"{key}: must be a whole number from 1; got {numbers[key]!r}"
        for key in needed
        if numbers.get(key) is not None and (not isinstance(numbers[key], int) or numbers[key] < 1)
    ]
    if faults:
        raise SpecError("numbers that make no model", faults=faults)
    return ModelShape(**numbers)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object. No code can be in it, so nothing else is asked of it here."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseFileError("not a readable config.json", where=str(path), got=str(error)) from None
    if not isinstance(config, dict):
        raise BaseFileError("not a JSON object", where=str(path), got=type(config).__name__)
    return config


def _from_hub(name: str) -> Path:
    """The config.json of a repository: from the hub's cache, or fetched alone."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached if isinstance(cached, str) else hf_hub_download(name, "config.json"))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise _unknown(name, " ".join(str(error).split())[:200]) from None


def _unknown(name: str, got: str = "") -> BaseFileError:
    hint = nearest(name.rpartition("/")[2].lower(), KNOWN)
    return BaseFileError(
        "no such model to plan for",
        where=name,
        got=got,
        expected=f"a folder or file with its config, an id on the hub, or one of {', '.join(KNOWN)}",
        hint=hint or "download its config.json and name that file, or type its numbers in",
    )
