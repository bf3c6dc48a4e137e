"""The weights of a model folder as views of its safetensors files, and such a file written as its tensors come.

A view costs no memory until it is read, and what was read can be given back, so a checkpoint of any size can be walked
in the memory of one tensor. The safetensors package writes a file only from tensors that are all there at once, so its
layout (eight bytes of length, a JSON header, the tensors end to end) is written here.
"""

import ctypes
import hashlib
import json
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gossamer.errors import BaseFileError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_POPULATE_READ = 22
"""Of Linux 5.14; what does not know it leaves everything as it was."""
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_flush = getattr(os, "fdatasync", os.fsync)  # macOS and Windows have the second alone
_PIECE, _PENDING = 1 << 23, 16
"""Bytes handed on at once, and how many such pieces may wait to be written."""
_FLUSHED = 1 << 28
"""Bytes after which the disk is asked to begin, so that it is not left idle until the end."""


@dataclass
class Shard:
    """One safetensors file: its tensors as views, in the order they lie in it."""

    path: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        head, self.metadata = _checked_header(self.path)
        with open(self.path, "rb") as file:
            # private, so that nobody can write to the file through a tensor
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._address = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        start = 8 + int.from_bytes(self._map[:8], "little")
        self.tensors = {name: self._view(name, facts, start) for name, facts in head.items()}

    def _view(self, name: str, facts: Mapping[str, Any], start: int) -> Tensor:
        if facts["dtype"] not in DTYPES:
            raise BaseFileError("a dtype that is not read", where=f"{self.path}: {name}", got=str(facts["dtype"]))
        dtype, (first, last) = DTYPES[facts["dtype"]], facts["data_offsets"]
        if first == last:
            return torch.empty(facts["shape"], dtype=dtype)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=last - first, offset=start + first)
        if raw.data_ptr() % dtype.itemsize:
            raise BaseFileError("a tensor that is not aligned", where=f"{self.path}: {name}")
        return raw.view(dtype).view(facts["shape"])

    def forget(self, tensor: Tensor) -> None:
        """Give back the memory of the pages that a view was read into; reading it again reads the file."""
        self._advise(tensor, "MADV_DONTNEED")

    def ahead(self, tensor: Tensor) -> None:
        """Let the system begin to read a view's pages."""
        self._advise(tensor, "MADV_WILLNEED")

    def read_in(self, tensor: Tensor) -> None:
        """Read a view's pages now, so that whoever computes in another thread need not wait for them."""
        start = tensor.data_ptr() - tensor.data_ptr() % mmap.PAGESIZE
        if _madvise is not None and tensor.nbytes:
            _madvise(start, tensor.data_ptr() + tensor.nbytes - start, _POPULATE_READ)

    def ahead_at(self, tensor: Tensor, places: Iterable[int]) -> None:
        """Let the system begin to read single numbers of a view, all at once and nothing around them."""
        self._advise(tensor, "MADV_RANDOM")
        flat = tensor.reshape(-1)
        for place in places:
            self._advise(flat[place : place + 1], "MADV_WILLNEED")

    def in_order(self, tensor: Tensor) -> None:
        """Let the system read on from where a view is read, as it does by itself."""
        self._advise(tensor, "MADV_NORMAL")

    def _advise(self, tensor: Tensor, what: str) -> None:
        start = tensor.data_ptr() - self._address
        stop = start + tensor.nbytes
        if hasattr(mmap, what) and 0 <= start < stop <= len(self._map):  # Windows has no such calls, and manages
            start -= start % mmap.PAGESIZE
            self._map.madvise(getattr(mmap, what), start, stop - start)


def shards_of(folder: Path) -> dict[str, Shard]:
    """File name -> shard of a model folder, in the order of the names.

    Raises `BaseFileError` for files that are not whole, and for a tensor that lies in two of them.
    """
    index = folder / INDEX
    names = [SINGLE]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = {name: Shard(folder / name) for name in names}
    seen: dict[str, str] = {}
    for file, shard in found.items():
        for name in shard.tensors:
            if name in seen:
                raise BaseFileError(
                    "a tensor lies in two files", where=f"{folder}: {name}", got=f"{seen[name]}, {file}"
                )
            seen[name] = file
    return found


@dataclass
class Outline:
    """What a file will hold: name -> dtype and shape, in the order in which its tensors will be written."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    metadata: Mapping[str, str]

    def header(self) -> bytes:
        """The bytes before the tensors."""
        head: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        place = 0
        for name, (dtype, shape) in self.tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            head[name] = {"dtype": _NAMES[dtype], "shape": [*shape], "data_offsets": [place, place + size]}
            place += size
        return header_bytes(head)

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return len(self.header()) + sum(
            torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.tensors.values()
        )


def header_bytes(head: Mapping[str, Any]) -> bytes:
    """The header of a safetensors file as the file begins with it; the tensors then stand on a multiple of 8 bytes."""
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(
    file: BinaryIO,
    outline: Outline,
    values: Iterable[Iterator[Tensor]],
    written: Callable[[Tensor], None] = lambda piece: None,
) -> str:
    """Write a safetensors file, and return its sha256. Both run beside whatever computes the next values.

    Args:
        values: for each tensor of the outline its values in flat pieces, one after the other, in their dtype.
        written: told of each piece that is in the file, beside whatever computes the next.
    """
    header = outline.header()
    digest = hashlib.sha256(header)
    file.write(header)
    flushed = file.tell()

    def put(data: memoryview) -> None:
        nonlocal flushed
        file.write(data)
        if file.tell() - flushed > _FLUSHED:
            flushed = file.tell()
            flushing.submit(_flush, file.fileno())

    pending: deque[tuple[Tensor, Future[None], Future[None]]] = deque()

    def settle() -> None:
        piece, *done = pending.popleft()
        for one in done:
            one.result()
        written(piece)

    with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as flushing:
        for piece in _complete(outline, values):
            data = piece.view(torch.uint8).numpy().data
            pending.append((piece, hashing.submit(digest.update, data), writing.submit(put, data)))
            if len(pending) > _PENDING:
                settle()
        while pending:
            settle()
    return digest.hexdigest()


def _complete(outline: Outline, values: Iterable[Iterator[Tensor]]) -> Iterator[Tensor]:
    for (name, (dtype, shape)), pieces in zip(outline.tensors.items(), values, strict=True):
        left = torch.Size(shape).numel()
        for piece in pieces:
            assert piece.dtype == dtype, name
            left -= piece.numel()
            yield piece
        assert left == 0, f"{name}: {left} values too few"


def pieces_of(tensor: Tensor, nbytes: int = _PIECE) -> Iterator[Tensor]:
    """A tensor flat, in pieces of so many bytes."""
    yield from tensor.reshape(-1).split(max(1, nbytes // tensor.element_size())) if tensor.numel() else ()


def _checked_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Names in the order of their places; the safetensors package has judged the file before."""
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        with open(path, "rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError, ValueError) as error:
        raise BaseFileError("not a whole safetensors file", where=str(path), got=str(error)) from None
    head.pop("__metadata__", None)
    return dict(sorted(head.items(), key=lambda item: (item[1]["data_offsets"], item[0]))), metadata
