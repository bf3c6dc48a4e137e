"""The files of an adapter folder: what is opened and how. One read each; what is checked is what is used."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from gossamer.errors import AdapterFileError, UnsupportedError

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "gossamer.json"
PICKLE = "adapter_model.bin"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def missing_hint(folder: Path) -> str:
    """What is there instead of a missing file."""
    if not os.path.isdir(folder):  # which, unlike Path.is_dir, takes names that no file system can hold
        return "there is no such folder"
    return f"the folder holds {', '.join(sorted(entry.name for entry in folder.iterdir())[:8]) or 'nothing'}"


def read_json(path: Path, missing: str = "") -> dict[str, Any]:
    """The JSON object in a file. Raises `AdapterFileError`."""
    return json_object(_read_bytes(path, missing), str(path))


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys. Raises `AdapterFileError`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError("not valid JSON", where=where, got=str(error)) from None
    if not isinstance(value, dict):
        raise AdapterFileError("not a JSON object", where=where, got=type(value).__name__)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the folder, all finite, and their file's metadata.

    Raises `AdapterFileError`; `UnsupportedError` for a pickle.
    """
    path = folder / WEIGHTS
    refuse_pickle(folder)
    content = _read_bytes(path)
    try:
        tensors = load_safetensors(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length], object_pairs_hook=_unique)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterFileError("not a whole safetensors file", where=str(path), got=str(error)) from None
    if not tensors:
        raise AdapterFileError("the file holds no tensors", where=str(path))
    _check_numbers(tensors, str(path))
    return tensors, header.get("__metadata__") or {}


def refuse_pickle(folder: Path) -> None:
    """Raise `UnsupportedError` for an older adapter, which is a pickle."""
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise UnsupportedError(
            "only safetensors are read: a .bin file is a pickle, which can run code",
            where=str(folder / PICKLE),
            hint="load it once with PEFT, and its save_pretrained(folder) writes safetensors",
        )


def _check_numbers(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse what is not finite. One sum for each dtype tells; only where that is not finite are tensors looked at."""
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        named = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        if dtype in DTYPES:
            total = torch.cat([tensor.reshape(-1) for tensor in named.values()]).sum(
                dtype=torch.promote_types(dtype, torch.float32)
            )
            if torch.isfinite(total):
                continue
        for name, tensor in named.items():
            if dtype not in DTYPES or not torch.isfinite(tensor).all():
                raise AdapterFileError(
                    "a tensor that is not made of finite numbers", where=f"{where}: {name}", got=str(dtype)
                )


def _read_bytes(path: Path, missing: str = "") -> bytes:
    """A regular file's bytes; a pipe or a device, which could block for ever, is not opened."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EINVAL, "not a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        got = getattr(error, "strerror", None) or str(error)
        raise AdapterFileError("cannot read an adapter's file", where=str(path), got=got, hint=missing) from None
