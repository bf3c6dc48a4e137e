"""Adapter folders: PEFT's two files, and `gossamer.json` beside them, which PEFT ignores.

    adapter_config.json          PEFT's config
    adapter_model.safetensors    base_model.model.<path>.lora_A.weight ..., metadata {"format": "pt"}
    gossamer.json                our spec, the sha256 digest of spec and tensors, the base's fingerprint, provenance

Reading is strict: every tensor must be understood, every slot filled, every number finite, and the digest, where there
is one, must hold. Only safetensors and JSON are ever opened.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from gossamer.adapter import Adapter, Tensors
from gossamer.errors import AdapterFileError, SpecError, StateError, UnsupportedError, nearest
from gossamer.files.atomic import new_folder, write_bytes, write_json
from gossamer.files.peft_config import config_from_spec, is_saved, spec_from_config
from gossamer.methods import TargetedMethod, method_from_dict

FORMAT = 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "gossamer.json"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<path>.+)\.(?P<slot>lora_[AB])\.weight")
_REFUSED = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA on an embedding",
    "lora_B.bias": "lora_bias",
    "token_adapter.": "trainable tokens",
    "base_layer.weight": "a copy of the base's own embedding or head (save_embedding_layers)",
}


# Reading -------------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder; see `Adapter.load`."""
    config = read_json(folder / CONFIG, missing=_missing_hint(folder))
    stored = _read_tensors(folder)
    ours = read_json(folder / OURS) if (folder / OURS).exists() else None
    tensors = _sorted_out(stored, folder)
    spec = spec_from_config(config, str(folder / CONFIG), whole_paths(tensors))
    _check_accounted(tensors, spec, str(folder / WEIGHTS))
    if ours is None:
        return Adapter(spec, tensors, foreign=config)
    return _verified(ours, config, tensors, folder)


def _verified(ours: Mapping[str, Any], config: Mapping[str, Any], tensors: Tensors, folder: Path) -> Adapter:
    """The adapter as `gossamer.json` describes it, if config and tensors are still the ones it was written with."""
    where = str(folder / OURS)
    if ours.get("format") != FORMAT:
        raise AdapterFileError("an unknown format", where=where, got=repr(ours.get("format")), expected=str(FORMAT))
    expected, base, provenance = str(ours.get("digest")), ours.get("base"), ours.get("provenance")
    if not (isinstance(base, dict | None) and isinstance(provenance, dict) and isinstance(ours.get("spec"), dict)):
        raise AdapterFileError("not a gossamer.json", where=where, expected="spec, base and provenance as objects")
    try:
        adapter = Adapter(method_from_dict(ours["spec"], where=where), tensors, base, provenance, config)
    except (TypeError, SpecError) as error:
        raise AdapterFileError("not a gossamer.json", where=where, got=str(error)) from None
    written = _config(adapter, str(folder / CONFIG))
    changed = [key for key in written if _unordered(written[key]) != _unordered(config.get(key))]
    if changed:
        raise AdapterFileError(
            "the config was changed after the adapter was written",
            where=str(folder / CONFIG),
            got=", ".join(f"{key}={config.get(key)!r}" for key in changed),
            expected=", ".join(f"{key}={written[key]!r}" for key in changed),
            hint=f"if the change is meant, delete {OURS}",
        )
    if adapter.digest != expected:
        raise AdapterFileError(
            "the tensors are not the ones that were written",
            where=str(folder / WEIGHTS),
            got=adapter.digest,
            expected=expected,
        )
    return adapter


def _unordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


def _missing_hint(folder: Path) -> str:
    if not os.path.isdir(folder):  # which, unlike Path.is_dir, takes names that no file system can hold
        return "there is no such folder"
    return f"the folder holds {', '.join(sorted(entry.name for entry in folder.iterdir())[:8]) or 'nothing'}"


def read_json(path: Path, missing: str = "") -> dict[str, Any]:
    """A JSON object without duplicate keys. Raises `AdapterFileError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
        return dict(pairs)

    try:
        value = json.loads(_read_bytes(path), object_pairs_hook=unique)
    except OSError as error:
        raise AdapterFileError(
            "cannot read an adapter's file", where=str(path), got=error.strerror or str(error), hint=missing
        ) from None
    except (ValueError, RecursionError) as error:
        raise AdapterFileError("not valid JSON", where=str(path), got=str(error)) from None
    if not isinstance(value, dict):
        raise AdapterFileError("not a JSON object", where=str(path), got=type(value).__name__)
    return value


def _read_bytes(path: Path) -> bytes:
    """A regular file's bytes; a pipe or a device, which could block for ever, is not opened."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file")
    return path.read_bytes()


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise UnsupportedError(
            "only safetensors are read: a .bin file is a pickle, which can run code",
            where=str(folder / "adapter_model.bin"),
            hint="load it once with PEFT and save_pretrained(safe_serialization=True)",
        )
    try:
        tensors = load_safetensors(_read_bytes(path))  # one read: the bytes checked are the bytes used
    except OSError as error:
        raise AdapterFileError(
            "cannot read an adapter's file", where=str(path), got=error.strerror or str(error)
        ) from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterFileError("not a whole safetensors file", where=str(path), got=str(error)) from None
    if not tensors:
        raise AdapterFileError("the file holds no tensors", where=str(path))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or not torch.isfinite(tensor).all():
            raise AdapterFileError(
                "a tensor that is not made of finite numbers", where=f"{path}: {name}", got=str(tensor.dtype)
            )
    return tensors


def _sorted_out(stored: Mapping[str, Tensor], folder: Path) -> Tensors:
    """The file's tensors by module and slot; refuses what is of another method or outside the model."""
    tensors: dict[str, dict[str, Tensor]] = {}
    where = str(folder / WEIGHTS)
    for key, tensor in stored.items():
        for mark, feature in _REFUSED.items():
            if mark in key:
                raise UnsupportedError("this PEFT feature is not covered", where=f"{where}: {key}", got=feature)
        if not key.startswith(_PREFIX):
            expected = f"names that begin with {_PREFIX!r}"
            raise AdapterFileError("a tensor outside the model", where=f"{where}: {key}", expected=expected)
        path, slot = _split(key.removeprefix(_PREFIX))
        tensors.setdefault(path, {})[slot] = tensor
    return tensors


def _check_accounted(tensors: Tensors, spec: TargetedMethod, where: str) -> None:
    """Every module's tensors are what the spec says they are, and complete."""
    factored = [path for path, slots in tensors.items() if {"lora_A", "lora_B"} & set(slots)]
    for path, slots in tensors.items():
        if path in factored:
            _check_factors(path, slots, spec, where)
        elif not _named_whole(path, slots, spec):
            _refuse_whole(path, slots, factored, where)
    if not factored:
        raise AdapterFileError("the file holds no LoRA factors", where=where, got=", ".join([*tensors][:4]))


def _split(name: str) -> tuple[str, str]:
    """Module path and slot of a name without PEFT's prefix."""
    factor = _FACTOR.fullmatch(name)
    if factor:
        return factor["path"], factor["slot"]
    path, _, parameter = name.rpartition(".")
    return path.removesuffix(".base_layer"), parameter


def _check_factors(path: str, slots: Mapping[str, Tensor], spec: TargetedMethod, where: str) -> None:
    missing = {"lora_A", "lora_B"} - set(slots)
    if missing:
        raise AdapterFileError(f"{missing.pop()} is missing", where=f"{where}: {path}", got=", ".join(slots))
    extra = set(slots) - {"lora_A", "lora_B"} - ({"bias"} if getattr(spec, "bias", "none") != "none" else set())
    if extra:
        raise AdapterFileError("a tensor that the config does not account for", where=f"{where}: {path}.{extra.pop()}")
    shapes = {slot: tuple(slots[slot].shape) for slot in ("lora_A", "lora_B")}
    rank = spec.rank_at(path)  # pyright: ignore[reportAttributeAccessIssue]
    if any(len(shape) != 2 for shape in shapes.values()) or not shapes["lora_A"][0] == shapes["lora_B"][1] == rank:
        raise AdapterFileError(
            "factors that do not have the rank the config gives",
            where=f"{where}: {path}",
            got=str(shapes),
            expected=f"rank {rank}",
        )


def _named_whole(path: str, slots: Mapping[str, Tensor], spec: TargetedMethod) -> bool:
    return is_saved(path, spec) or (getattr(spec, "bias", "none") == "all" and set(slots) == {"bias"})


def _refuse_whole(path: str, slots: Mapping[str, Tensor], factored: list[str], where: str) -> NoReturn:
    raise AdapterFileError(
        "a tensor that the config does not account for",
        where=f"{where}: {path}.{next(iter(slots))}",
        expected="LoRA factors, or parameters of modules_to_save",
        hint=nearest(path, factored),
    )


# Writing -------------------------------------------------------------------------------------------------------------


def write_adapter(adapter: Adapter, folder: Path) -> Path:
    """Write an adapter folder whole or not at all; other files in an adapter folder that is replaced are kept."""
    spec = adapter.spec
    assert isinstance(spec, TargetedMethod)
    if folder.exists() and not (folder.is_dir() and ((folder / CONFIG).exists() or not any(folder.iterdir()))):
        raise StateError(
            "this folder is not an adapter's, so it is not written to", where=str(folder), hint="choose a new folder"
        )
    from gossamer import __version__

    targets = _targets(adapter)
    description = {
        "format": FORMAT,
        "gossamer": __version__,
        "digest": adapter.digest,
        "spec": spec.to_dict(),
        "base": adapter.base,
        "provenance": dict(adapter.provenance),
    }
    named = {
        _peft_name(path, slot, path in targets): tensor
        for path, slots in adapter.tensors.items()
        for slot, tensor in slots.items()
    }
    with new_folder(folder, replace=True) as fresh:
        for entry in folder.iterdir() if folder.exists() else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, fresh / entry.name, symlinks=True)
            elif entry.name not in (CONFIG, WEIGHTS, OURS):
                shutil.copy2(entry, fresh / entry.name, follow_symlinks=False)
        write_bytes(
            fresh / WEIGHTS,
            save_safetensors(
                {name: tensor.detach().clone().contiguous() for name, tensor in named.items()}, {"format": "pt"}
            ),
        )
        write_json(fresh / CONFIG, dict(sorted(_config(adapter, str(folder)).items())))
        write_json(fresh / OURS, description)
    return folder


def _config(adapter: Adapter, where: str) -> dict[str, Any]:
    spec = adapter.spec
    assert isinstance(spec, TargetedMethod)
    return config_from_spec(spec, _targets(adapter), whole_paths(adapter.tensors), adapter.foreign, where)


def _targets(adapter: Adapter) -> list[str]:
    return [path for path, slots in adapter.tensors.items() if "lora_A" in slots]


def whole_paths(tensors: Tensors) -> list[str]:
    """The modules whose own parameters were trained, rather than factors beside them."""
    return [path for path, slots in tensors.items() if not {"lora_A", "lora_B"} & set(slots)]


def _peft_name(path: str, slot: str, targeted: bool) -> str:
    if slot in ("lora_A", "lora_B"):
        return f"{_PREFIX}{path}.{slot}.weight"
    return f"{_PREFIX}{path}.{'base_layer.' if targeted else ''}{slot}"
