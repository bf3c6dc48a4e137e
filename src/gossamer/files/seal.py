"""The seal of an adapter: what its weights' file says of itself, of the config beside it, and of the base.

It stands in the metadata of the safetensors file, which every reader ignores, beside PEFT's `"format": "pt"`:

    gossamer    {"base": ..., "config": ..., "tensors": ...}

`base` is the fingerprint that `gossamer.json` holds too, `tensors` the sha256 of it and of the names, dtypes, shapes
and bytes in the file, and `config` that of what `adapter_config.json` says about how the tensors act. So a folder that
loses `gossamer.json` is still known for what it was, and so is one whose `gossamer.json` was changed.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save
from torch import Tensor

from gossamer.adapter import Adapter, hash_tensors
from gossamer.errors import AdapterFileError
from gossamer.files.shards import header_bytes
from gossamer.methods.peft import DESCRIPTIVE

PEFTS = {"format": "pt"}
"""The metadata that PEFT writes."""
KEY = "gossamer"
"""Our entry beside it."""


def sealed_file(adapter: Adapter, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The safetensors file of an adapter; config and tensors are as they are written. Equal ones give equal bytes."""
    base = adapter.base and dict(adapter.base)
    seal = {"base": base, "config": _meaning(config), "tensors": _bits(tensors, base)}
    content = save(dict(tensors), PEFTS)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = PEFTS | {KEY: json.dumps(seal, sort_keys=True)}  # safetensors would shuffle the two
    return b"".join((header_bytes(header), memoryview(content)[start:]))


def read_seal(found: Mapping[str, str], where: str) -> dict[str, Any]:
    """The seal in a file's metadata; empty where there is none. Raises `AdapterFileError`."""
    if KEY not in found:
        return {}
    try:
        seal = json.loads(found[KEY])
    except (ValueError, RecursionError):
        seal = None
    if not isinstance(seal, dict) or sorted(seal) != ["base", "config", "tensors"]:
        raise AdapterFileError("the file's seal is damaged", where=where, got=repr(found[KEY])[:120])
    if not isinstance(seal["base"], dict | None):
        raise AdapterFileError("the file's seal is damaged", where=where, got=f"base={seal['base']!r}"[:120])
    return seal


def check_base(base: Any, seal: Mapping[str, Any], where: str) -> None:
    """Refuse another base in `gossamer.json` than the file was sealed with."""
    if seal and base != seal["base"]:
        raise AdapterFileError(
            "gossamer.json names another base than the adapter was written with",
            where=where,
            got=f"base={base!r}",
            expected=f"base={seal['base']!r}",
            hint="attach(..., force_base=True) stands an adapter at another base",
        )


def check_tensors(tensors: Mapping[str, Tensor], seal: Mapping[str, Any], where: str) -> None:
    """Refuse tensors that are not the ones the file was sealed with."""
    if seal and (found := _bits(tensors, seal["base"])) != seal["tensors"]:
        raise AdapterFileError(
            "the tensors are not the ones that were written", where=where, got=found, expected=str(seal["tensors"])
        )


def same_config(config: Mapping[str, Any], seal: Mapping[str, Any]) -> bool:
    """Whether the config says about the tensors what it said when the file was sealed."""
    return not seal or _meaning(config) == seal["config"]


def unordered(value: Any) -> Any:
    """A value of PEFT's config with its lists sorted."""
    return sorted(value, key=str) if isinstance(value, list) else value


def _meaning(config: Mapping[str, Any]) -> str:
    """sha256 of the keys that change how tensors act; lists stand for sets, which PEFT writes in any order."""
    kept = {key: unordered(value) for key, value in config.items() if key not in DESCRIPTIVE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _bits(tensors: Mapping[str, Tensor], base: Any) -> str:
    total = hashlib.sha256(json.dumps(base, sort_keys=True).encode())
    hash_tensors(total, {name: tensors[name] for name in sorted(tensors)})
    return total.hexdigest()
