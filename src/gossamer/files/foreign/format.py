"""What a foreign format is: a table of names, and how the factors in it are decoded and encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from gossamer.errors import AdapterFileError, UnsupportedError, UsageError
from gossamer.files.atomic import new_folder, write_bytes, write_json
from gossamer.files.folder import CONFIG, read_json
from gossamer.files.foreign.factors import Factors

ALPHA = ".alpha"


@dataclass(frozen=True)
class BaseFacts:
    """What some formats need to know of the base: its config's numbers and its modules' paths."""

    model_type: str = ""
    heads: int = 0
    kv_heads: int = 0
    modules: tuple[str, ...] = ()

    @classmethod
    def of_folder(cls, folder: Path) -> BaseFacts:
        """From a model folder's `config.json` and the headers of its safetensors. Raises `AdapterFileError`."""
        config = read_json(folder / "config.json")
        heads, kv_heads = numbers = [config.get(key) or 0 for key in ("num_attention_heads", "num_key_value_heads")]
        if not all(isinstance(number, int) and 0 <= number <= 65536 for number in numbers):
            raise AdapterFileError("not a model's config", where=str(folder / "config.json"), got=str(numbers))
        names = [name for file in sorted(folder.glob("*.safetensors")) for name in sorted(_opened(file).keys())]
        modules = tuple(name.removesuffix(".weight") for name in names if name.endswith(".weight"))
        return cls(str(config.get("model_type", "")), heads, kv_heads or heads, modules)


@dataclass(frozen=True)
class ForeignFile:
    """What a file or folder says, under its own names.

    Attributes:
        pairs: name -> down and up. alphas: those that have a tensor of their own.
        facts: the file's metadata, or the folder's config. facts_at: the path of those.
        where: the path of the tensors. lost: in words, what the format has no place for.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    alphas: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    facts_at: str = ""
    lost: tuple[str, ...] = ()


Decode = Callable[[ForeignFile, BaseFacts | None], dict[str, Factors]]
Encode = Callable[[Mapping[str, Factors], BaseFacts | None], ForeignFile]


@dataclass(frozen=True)
class ForeignFormat:
    """One format of another tool.

    Attributes:
        name: as `gossamer convert --to` takes it.
        endings: of the names of down and up.
        decode: the factors that a file says, by module path. Raises `AdapterFileError`, `UnsupportedError`.
        encode: the file that says them; `lost` is what it has no place for.
        weights: the file in a folder with `adapter_config.json`; "" where a format is one file.
        suffix: of a format that is one file.
        alphas: whether a pair may have an alpha of its own, as a tensor.
        starts: how one of the names of its tensors begins.
        stamp: what its safetensors metadata calls the format.
        read, write: of what is no safetensors: a path -> facts and tensors, and back.
    """

    name: str
    endings: tuple[str, str]
    decode: Decode
    encode: Encode
    weights: str = ""
    suffix: str = ".safetensors"
    alphas: bool = False
    starts: tuple[str, ...] = ("",)
    stamp: str = "pt"
    read: Callable[[Path], tuple[dict[str, Any], dict[str, Tensor]]] | None = None
    write: Callable[[Path, Mapping[str, Any], Mapping[str, Tensor]], None] | None = None


def detects(form: ForeignFormat, path: Path) -> bool:
    """Whether a file or folder is of a format, by its names alone."""
    if form.weights:
        return (path / form.weights).is_file()
    if not path.is_file() or path.suffix != form.suffix:
        return False
    names = () if form.read else read_safetensors(path)[1]
    return bool(form.read) or any(name.startswith(form.starts) and name.endswith(form.endings) for name in names)


def read(form: ForeignFormat, path: Path, base: BaseFacts | None) -> dict[str, Factors]:
    """The factors in a file or folder. Raises `AdapterFileError`, `UnsupportedError`."""
    config = read_json(path / CONFIG) if form.weights else None
    place = path / form.weights if form.weights else path
    facts, tensors = (form.read or read_safetensors)(place)
    down, up = form.endings
    stems = sorted({name.removesuffix(end) for end in form.endings for name in tensors if name.endswith(end)})
    for stem in stems:
        for end in form.endings:
            if stem + end not in tensors:
                raise AdapterFileError("a factor is missing", where=f"{place}: {stem}", expected=stem + end)
    pairs = {stem: (tensors[stem + down], tensors[stem + up]) for stem in stems}
    own = [stem for stem in stems if form.alphas and stem + ALPHA in tensors]
    alphas = {stem: _number(tensors[stem + ALPHA], f"{place}: {stem}") for stem in own}
    rest = [name for name in tensors if not name.endswith(form.endings) and name.removesuffix(ALPHA) not in alphas]
    if rest:
        what = f"tensors that {form.name} does not explain"
        raise AdapterFileError(what, where=f"{place}: {rest[0]}", got=str(len(rest)))
    file = ForeignFile(pairs, alphas, facts, str(place), str(place))
    return form.decode(file if config is None else replace(file, facts=config, facts_at=str(path / CONFIG)), base)


def write(form: ForeignFormat, factors: Mapping[str, Factors], path: Path, base: BaseFacts | None) -> tuple[str, ...]:
    """Write them, whole or not at all; returns in words what the format has no place for."""
    made = form.encode(factors, base)
    tensors = {stem + end: pair[side] for stem, pair in made.pairs.items() for side, end in enumerate(form.endings)}
    tensors |= {stem + ALPHA: torch.tensor(alpha, dtype=torch.float32) for stem, alpha in made.alphas.items()}
    if form.write:
        form.write(path, made.facts, tensors)
    elif form.weights:
        with new_folder(path) as fresh:
            _write_safetensors(fresh / form.weights, tensors, {"format": form.stamp})
            write_json(fresh / CONFIG, made.facts)
    else:
        _write_safetensors(path, tensors, {"format": form.stamp, **made.facts})
    return made.lost


def needed(base: BaseFacts | None, format_name: str, why: str) -> BaseFacts:
    """The base, which the caller must have named."""
    if base is None:
        raise UsageError(f"{format_name} needs the base: {why}", hint="name its folder with --base")
    return base


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Raises `AdapterFileError`."""
    try:
        with _opened(path) as stored:
            return dict(stored.metadata() or {}), {name: stored.get_tensor(name) for name in sorted(stored.keys())}
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterFileError("not a whole safetensors file", where=str(path), got=str(error)) from None


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise AdapterFileError("no such file", where=str(path))
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterFileError("not a whole safetensors file", where=str(path), got=str(error)) from None


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in sorted(tensors.items())}
    write_bytes(path, save_safetensors(plain, dict(metadata)))


def _number(tensor: Tensor, where: str) -> float:
    if tensor.numel() != 1:
        raise AdapterFileError("an alpha that is not one number", where=where, got=str(tensor.shape))
    return float(tensor.item())


def number_in(values: Mapping[str, Any], key: str, where: str) -> float:
    """A number out of a config. Raises `AdapterFileError`."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterFileError("not a number", where=where, got=f"{key}={value!r}", expected="a number")
    return float(value)


def only_matrices(factors: Mapping[str, Factors], format_name: str) -> None:
    """Refuse convolutions by name, where a format holds matrices alone."""
    for path, one in factors.items():
        if one.down.ndim != 2:
            raise UnsupportedError(
                f"{format_name} holds linear modules alone", where=path, got=f"a convolution, {tuple(one.down.shape)}"
            )


def rotated(up: Tensor, module: str, heads: tuple[int, int], back: bool = False) -> Tensor:
    """Rows of a query or key projection, from halves (Hugging Face) to pairs (Meta, llama.cpp) or back.

    (heads, 2, half, ...) -> (heads, half, 2, ...)

    Args:
        up: rows of any module; those of others stay as they are.
        heads: of queries and of keys.
    """
    if not module.endswith(("q_proj", "k_proj")):
        return up
    count = heads[0] if module.endswith("q_proj") else heads[1]
    if count < 1 or up.shape[0] % (2 * count):
        raise UsageError("rows that are no whole heads", got=str(tuple(up.shape)), expected=f"{count} heads")
    half = up.shape[0] // count // 2
    split = (count, half, 2) if back else (count, 2, half)
    return up.reshape(*split, *up.shape[1:]).transpose(1, 2).reshape(up.shape).contiguous()
