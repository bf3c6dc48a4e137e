"""Adapters in the formats of other tools, both ways; every conversion reads back what it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gossamer.adapter import Adapter
from gossamer.errors import AdapterFileError, StateError, UnsupportedError, nearest
from gossamer.files.foreign.changes import Changes, adapter_from, changes_of
from gossamer.files.foreign.diffusers import Diffusers
from gossamer.files.foreign.format import Base, Format
from gossamer.files.foreign.gguf import GGUF
from gossamer.files.foreign.kohya import Kohya
from gossamer.files.foreign.mlx import MLX
from gossamer.files.foreign.torchtune import Torchtune

FORMATS: dict[str, Format] = {one.name: one for one in (GGUF(), Kohya(), Diffusers(), MLX(), Torchtune())}


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
    return adapter_from(one.read(path, _base(base)), path, one.name)


def write_foreign(adapter: Adapter, path: str | Path, format_name: str, base: str | Path | None = None) -> Written:
    """Write an adapter in another tool's format, read it back, and say what differs.

    Raises `UnsupportedError` by name for what the format cannot hold; `StateError` when `path` exists; `DiskError`.
    """
    path, one, known = Path(path), _format(format_name), _base(base)
    if path.exists():
        raise StateError("the output exists already", where=str(path), hint="choose another name")
    changes, lost = changes_of(adapter, one.name)
    lost += one.write(changes, path, known)
    exact, error = _compared(changes, one.read(path, known), path)
    return Written(path, exact, error, tuple(lost))


def _compared(before: Changes, after: Changes, path: Path) -> tuple[bool, float]:
    """Whether the changes are bit-equal, and the largest relative error of one. Factors only; no (out, in) matrix.

    ||U D - U' D'||^2 = ||[U, -U'] [D; D']||^2 = trace(([U, -U']^T [U, -U']) ([D; D'] [D; D']^T))
    """
    if before.keys() != after.keys():
        raise AdapterFileError("what was written does not read back", where=str(path), got=str(len(after)))
    exact, worst = True, 0.0
    for name, one in before.items():
        two = after[name]
        same = torch.equal(one.down, two.down) and torch.equal(one.up, two.up) and one.down.dtype == two.down.dtype
        if same and one.alpha == two.alpha:
            continue
        exact = False
        ups = [change.up.double().flatten(1) * (change.alpha / change.rank) for change in (one, two)]
        downs = [change.down.double().flatten(1) for change in (one, two)]
        outer, inner = torch.cat([ups[0], -ups[1]], 1), torch.cat(downs)
        wrong = ((outer.T @ outer) * (inner @ inner.T)).sum().clamp(min=0).sqrt()
        size = ((ups[0].T @ ups[0]) * (downs[0] @ downs[0].T)).sum().clamp(min=0).sqrt()
        worst = max(worst, float(wrong / size) if size else float(wrong))
    return exact, worst


def _format(name: str) -> Format:
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise UnsupportedError("this format is not covered", got=name, expected=known, hint=nearest(name, FORMATS))
    return FORMATS[name]


def _detected(path: Path) -> Format:
    if not path.exists():
        raise AdapterFileError("no such file or folder", where=str(path))
    for one in FORMATS.values():
        if one.detects(path):
            return one
    raise UnsupportedError("no format that is covered", where=str(path), expected=", ".join(FORMATS))


def _base(folder: str | Path | None) -> Base | None:
    return None if folder is None else Base.of_folder(Path(folder))


__all__ = ["FORMATS", "Base", "Written", "read_foreign", "write_foreign"]
