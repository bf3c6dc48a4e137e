"""What a foreign format is: one file or folder both ways, and what it loses."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from gossamer.errors import AdapterFileError, UsageError
from gossamer.files.atomic import write_bytes
from gossamer.files.folder import read_json
from gossamer.files.foreign.changes import Changes


@dataclass(frozen=True)
class Base:
    """What some formats need to know of the base: its config's numbers and its modules' paths."""

    model_type: str = ""
    heads: int = 0
    kv_heads: int = 0
    layers: int = 0
    modules: tuple[str, ...] = ()

    @classmethod
    def of_folder(cls, folder: Path) -> Base:
        """From a model folder's `config.json` and the headers of its safetensors. Raises `AdapterFileError`."""
        config = read_json(folder / "config.json")
        numbers = [config.get(key) or 0 for key in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")]
        if not all(isinstance(number, int) and 0 <= number <= 65536 for number in numbers):
            raise AdapterFileError("not a model's config", where=str(folder / "config.json"), got=str(numbers))
        modules: list[str] = []
        for file in sorted(folder.glob("*.safetensors")):
            with _opened(file) as stored:
                modules += [name.removesuffix(".weight") for name in sorted(stored.keys()) if name.endswith(".weight")]
        heads, kv_heads, layers = numbers
        return cls(str(config.get("model_type", "")), heads, kv_heads or heads, layers, tuple(modules))


class Format(ABC):
    """One format of another tool."""

    name: ClassVar[str]
    reader: ClassVar[str]
    """The tool that reads it."""

    @abstractmethod
    def detects(self, path: Path) -> bool:
        """Whether a file or folder is of this format, by its names alone."""

    @abstractmethod
    def read(self, path: Path, base: Base | None) -> Changes:
        """The changes a file says. Raises `AdapterFileError`, `UnsupportedError`."""

    @abstractmethod
    def write(self, changes: Changes, path: Path, base: Base | None) -> list[str]:
        """Write them, whole or not at all; returns in words what the format has no place for."""


def needed(base: Base | None, format_name: str, why: str) -> Base:
    """The base, which the caller must have named."""
    if base is None:
        raise UsageError(f"{format_name} needs the base: {why}", hint="name its folder with --base")
    return base


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises `AdapterFileError`."""
    try:
        with _opened(path) as stored:
            return {name: stored.get_tensor(name) for name in sorted(stored.keys())}, dict(stored.metadata() or {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterFileError("not a whole safetensors file", where=str(path), got=str(error)) from None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in sorted(tensors.items())}
    write_bytes(path, save_safetensors(plain, dict(metadata)))


def paired(
    tensors: Mapping[str, Tensor], endings: tuple[str, str], source: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Pairs of factors by what stands before their endings, and all the other tensors. Raises `AdapterFileError`."""
    first, second = endings
    names = {name.removesuffix(end) for end in endings for name in tensors if name.endswith(end)}
    for name in sorted(names):
        for end in endings:
            if name + end not in tensors:
                raise AdapterFileError("a factor is missing", where=f"{source}: {name}", expected=name + end)
    pairs = {name: (tensors[name + first], tensors[name + second]) for name in sorted(names)}
    return pairs, {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}


def refuse_rest(rest: Mapping[str, Tensor], source: Path, format_name: str) -> None:
    """Every tensor must be understood."""
    if rest:
        raise AdapterFileError(
            f"tensors that {format_name} does not explain", where=f"{source}: {next(iter(rest))}", got=str(len(rest))
        )


def json_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object out of a metadata string. Raises `AdapterFileError`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError("not valid JSON", where=where, got=str(error)) from None
    if not isinstance(value, dict):
        raise AdapterFileError("not a JSON object", where=where, got=type(value).__name__)
    return value


def number_in(values: Mapping[str, Any], key: str, where: str) -> float:
    """A number out of a config. Raises `AdapterFileError`."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterFileError("not a number", where=where, got=f"{key}={value!r}", expected="a number")
    return float(value)


def rotated(rows: Tensor, heads: int, back: bool = False) -> Tensor:
    """Rows of a query or key projection, from halves (Hugging Face) to pairs (Meta, llama.cpp) or back.

    (heads, 2, half, ...) -> (heads, half, 2, ...)
    """
    if heads < 1 or rows.shape[0] % (2 * heads):
        raise UsageError("rows that are no whole heads", got=str(tuple(rows.shape)), expected=f"{heads} heads")
    half = rows.shape[0] // heads // 2
    split = (heads, half, 2) if back else (heads, 2, half)
    return rows.reshape(*split, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise AdapterFileError("no such file", where=str(path))
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterFileError("not a whole safetensors file", where=str(path), got=str(error)) from None
