"""What a model folder must be before transformers may open it: plain JSON, plain weights, a tokenizer."""

import json
import re
from pathlib import Path
from typing import Any

from gossamer.errors import BaseFileError, UnsupportedError, UsageError
from gossamer.quant import FORMATS, QuantFormat

_LARGEST_CONFIG = 8 << 20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, once neither it nor the tokenizer's asks for code from elsewhere.

    Raises `BaseFileError`; `UnsupportedError` for weights that are stored quantised.
    """
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise BaseFileError(
            "this folder holds an adapter, not a base model" if adapter else "not a model folder: no config.json",
            where=str(folder),
            hint="give the base that the adapter was trained on as the base" if adapter else "",
        )
    if (folder / "adapter_config.json").is_file():  # transformers would load it into the base without a word
        raise BaseFileError("the base's folder also holds an adapter", where=str(folder / "adapter_config.json"))
    config = _read_plain(folder / "config.json")
    if (folder / "tokenizer_config.json").is_file():
        _read_plain(folder / "tokenizer_config.json")
    stored = config.get("quantization_config")
    if stored is not None and stored_quant(stored) is None:
        raise UnsupportedError(
            "this base is stored quantised in a way that is not read",
            where=str(folder),
            got=str(stored.get("quant_method") if isinstance(stored, dict) else stored),
            expected=f"bitsandbytes, as one of {', '.join(FORMATS)}",
            hint="take the 16-bit weights that it was made of, or write them once with transformers where it reads "
            "this format (from_pretrained, dequantize, save_pretrained), and name that folder as the base",
        )
    return config


def stored_quant(stored: Any) -> str | None:
    """Which of `FORMATS` a folder's `quantization_config` describes; None for what is none of them."""
    if not isinstance(stored, dict) or stored.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    if stored.get("load_in_8bit") or stored.get("_load_in_8bit"):
        return "int8"
    table, double = stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant", False))
    return next((name for name, form in FORMATS.items() if form == QuantFormat(str(table), double)), None)


def require_same(stored: Any, quant: str | None, folder: Path) -> None:
    """Raise `UsageError` when a base that is stored quantised is asked for in another format."""
    if quant not in (None, stored_quant(stored)):
        raise UsageError(
            "the base is stored in another format than the one asked for",
            where=str(folder),
            got=f"quant={quant!r}",
            expected=f"{stored_quant(stored)!r} or None",
            hint="quantise the original base instead: each rounding adds its error",
        )


def require_plain_weights(folder: Path) -> None:
    """Weights in safetensors, every shard of them; raises `BaseFileError`."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_plain(index).get("weight_map")
        names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
        absent = sorted(name for name in names if "/" in name or "\\" in name or not (folder / name).is_file())
        if absent or not names:
            raise BaseFileError("weights are missing", where=str(index), got=", ".join(absent[:5]) or "an empty index")
    elif not (folder / "model.safetensors").is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        raise BaseFileError(
            "the weights are pickled, and opening a pickle runs code" if pickled else "the folder holds no weights",
            where=str(folder),
            got=", ".join(pickled[:5]),
            expected="model.safetensors",
            hint="convert them with safetensors' own convert tool on a machine you can lose" if pickled else "",
        )


def require_tokenizer(folder: Path) -> None:
    """One of the files a tokenizer is read from; raises `BaseFileError`."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BaseFileError(
            "the folder holds no tokenizer",
            where=str(folder),
            expected=f"one of {', '.join(_TOKENIZER_FILES)}",
            hint="copy the tokenizer's files of the model it was made from into it",
        )


def _read_plain(path: Path) -> dict[str, Any]:
    """A JSON object without duplicate keys and without a word about code to run."""
    try:
        if path.stat().st_size > _LARGEST_CONFIG and not path.name.endswith(".index.json"):
            raise ValueError(f"{path.stat().st_size:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _checked(pairs, path))
    except (ValueError, OSError, RecursionError) as error:
        raise BaseFileError("not a readable JSON file", where=str(path), got=str(error)) from error
    if not isinstance(value, dict):
        raise BaseFileError("not a JSON object", where=str(path), got=type(value).__name__)
    return value


def _checked(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """Called for every object in the file, however deep it lies."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BaseFileError("a key is there twice", where=str(path), got=repr(twice))
    for name, value in pairs:
        kernel = _IMPLEMENTATION.fullmatch(name) and ("/" in json.dumps(value) or name.endswith("_internal"))
        if name == "auto_map" or kernel:
            raise BaseFileError(
                "the model wants to run code of its own, and that is never done",
                where=str(path),
                got=f"{name}: {json.dumps(value)[:200]}",
                hint="if transformers knows this architecture itself, remove the key",
            )
    return fields
