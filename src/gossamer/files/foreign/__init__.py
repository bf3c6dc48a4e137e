"""Adapters in the formats of other tools, both ways; every conversion reads back what it wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gossamer.adapter import Adapter
from gossamer.errors import AdapterFileError, StateError, UnsupportedError, nearest
from gossamer.files.foreign import format as form
from gossamer.files.foreign.diffusers import DIFFUSERS
from gossamer.files.foreign.factors import Factors, adapter_from, factors_of
from gossamer.files.foreign.format import BaseFacts, ForeignFormat
from gossamer.files.foreign.gguf import GGUF
from gossamer.files.foreign.kohya import KOHYA
from gossamer.files.foreign.mlx import MLX
from gossamer.files.foreign.torchtune import TORCHTUNE
from gossamer.linalg import LowRankPair

FORMATS: dict[str, ForeignFormat] = {one.name: one for one in (GGUF, KOHYA, DIFFUSERS, MLX, TORCHTUNE)}


@dataclass(frozen=True)
class Written:
    """What a conversion did.

    Attributes:
        path: what was written.
        exact: whether reading it back gave every factor bit for bit and every scaling exactly.
        error: the largest relative error of a module's change, read back (Frobenius norm).
        lost: in words, what the format has no place for.
    """

    path: Path
    exact: bool
    error: float
    lost: tuple[str, ...]


def read_foreign(path: str | Path, format_name: str | None = None, base: str | Path | None = None) -> Adapter:
    """An adapter out of another tool's file or folder.

    Args:
        path: the file, or for MLX and torchtune the folder.
        format_name: one of `FORMATS`; found out from the names in it when left out.
        base: the base's folder, where the format does not say enough by itself.

    Raises `AdapterFileError` for what cannot be trusted, `UnsupportedError` by name for what is not covered.
    """
    path = Path(path)
    one = _format(format_name) if format_name else _detected(path)
    return adapter_from(form.read(one, path, _base(base)), path, one.name)


def write_foreign(adapter: Adapter, path: str | Path, format_name: str, base: str | Path | None = None) -> Written:
    """Write an adapter in another tool's format, read it back, and say what differs.

    Raises `UnsupportedError` by name for what the format cannot hold; `StateError` when `path` exists; `DiskError`.
    """
    path, one, known = Path(path), _format(format_name), _base(base)
    if path.exists():
        raise StateError("the output exists already", where=str(path), hint="choose another name")
    factors, lost = factors_of(adapter, one.name)
    lost += form.write(one, factors, path, known)
    exact, error = _compared(factors, form.read(one, path, known), path)
    return Written(path, exact, error, tuple(lost))


def _compared(before: Mapping[str, Factors], after: Mapping[str, Factors], path: Path) -> tuple[bool, float]:
    """Whether the factors are bit-equal, and the largest relative error of a module's change."""
    if before.keys() != after.keys():
        raise AdapterFileError("what was written does not read back", where=str(path), got=str(len(after)))
    exact, worst = True, 0.0
    for name, one in before.items():
        two = after[name]
        same = torch.equal(one.down, two.down) and torch.equal(one.up, two.up) and one.down.dtype == two.down.dtype
        if same and one.alpha == two.alpha:
            continue
        exact = False
        wrong, size = LowRankPair.concatenated([one.pair, two.pair.scaled(-1)]).norm(), one.pair.norm()
        worst = max(worst, wrong / size if size else wrong)
    return exact, worst


def _format(name: str) -> ForeignFormat:
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise UnsupportedError("this format is not covered", got=name, expected=known, hint=nearest(name, FORMATS))
    return FORMATS[name]


def _detected(path: Path) -> ForeignFormat:
    if not path.exists():
        raise AdapterFileError("no such file or folder", where=str(path))
    for one in FORMATS.values():
        if form.detects(one, path):
            return one
    raise UnsupportedError("no format that is covered", where=str(path), expected=", ".join(FORMATS))


def _base(folder: str | Path | None) -> BaseFacts | None:
    return None if folder is None else BaseFacts.of_folder(Path(folder))


__all__ = ["FORMATS", "BaseFacts", "Written", "read_foreign", "write_foreign"]
