"""Writes that happen whole or not at all.

A file is written beside its final place, flushed to the disk (fsync) and renamed over it; then the folder itself is
flushed, so that the new name survives a power cut. Whoever looks sees the old content or the new one, never a part of
either, and whatever goes wrong leaves no temporary file behind. A folder is written the same way, as one.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gossamer.errors import DiskError, StateError

TEMPORARY_SUFFIX = ".partial"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHUNK = 1 << 20


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Replace the content of `path` by `data`, creating its folder. Returns the path.

    Raises `DiskError` (with needed and free bytes when the disk is full); the old content is then still there.
    """
    with new_file(path, needed=len(data)) as file:
        file.write(data)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Replace the content of `path` by `text` in UTF-8, line ends as given; see `write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Replace the content of `path` by `value` as JSON, two spaces deep; NaN is a ValueError. See `write_bytes`."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_file(path: str | Path, *, needed: int | None = None) -> Iterator[BinaryIO]:
    """A binary file to write to that becomes `path` when the block ends, or nothing at all when it raises.

    Args:
        path: the final place; its folder is created.
        needed: the bytes that will be written where known, for the message when the disk is full.

    Raises `DiskError` when writing, flushing or renaming fails; the old content is then still there.
    """
    with written_path(path, needed=needed) as temporary, open(temporary, "xb") as file:
        yield file


@contextmanager
def written_path(path: str | Path, *, needed: int | None = None) -> Iterator[Path]:
    """The same for libraries that open files themselves: a path to write to that becomes `path` when the block ends."""
    path = Path(path)
    temporary = _beside(path)
    with _as_disk_error(path, temporary, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # KeyboardInterrupt too: nothing that looks like a result may stay
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def new_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to fill that becomes `path` when the block ends, or nothing at all when it raises.

    Args:
        path: the final place; its parent is created.
        replace: move an existing `path` out of the way first, and delete it once the new folder stands.

    Raises `StateError` when `path` exists and `replace` is false; `DiskError` when writing, flushing or renaming fails.
    """
    temporary = _beside(Path(path))
    try:
        with _filled_folder(temporary, Path(path), replace):
            yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def continued_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends, and stays under another name when it raises.

    It is called like `path` with TEMPORARY_SUFFIX, so whoever comes again finds what is there already; the block says
    what of that can be trusted.

    Raises `StateError` when `path` exists; `DiskError` when writing, flushing or renaming fails.
    """
    path = Path(path)
    temporary = path.parent / f"{path.name}{TEMPORARY_SUFFIX}"
    with _filled_folder(temporary, path, replace=False):
        yield temporary


@contextmanager
def _filled_folder(temporary: Path, path: Path, replace: bool) -> Iterator[None]:
    """Make the folder that the block fills the one at `path`."""
    _refuse_existing(path, replace)
    with _as_disk_error(path, temporary, None):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(exist_ok=True)
        yield
        _settle_tree(temporary)
        _refuse_existing(path, replace)  # someone else may have finished first
        old = _beside(path)
        if os.path.lexists(path):
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, path)
            raise
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
        _sync_folder(path.parent)


def require_space(path: Path, needed: int) -> None:
    """Raise `DiskError` when the disk that `path` lies on has fewer bytes free than are needed."""
    free = _free_bytes(path.parent)
    if free is not None and free < needed:
        raise _disk_error(path, errno.ENOSPC, needed)


def sha256_file(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hex, read in pieces of 1 MiB."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    """A fresh hidden name in the same folder, hence on the same file system, where a rename is atomic."""
    return path.parent / f".{path.name[:60]}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}"


def _refuse_existing(path: Path, replace: bool) -> None:
    if not replace and os.path.lexists(path):
        raise StateError("the folder exists already", where=str(path), hint="choose another name, or remove it first")


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders; its renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _settle_tree(folder: Path) -> None:
    """Flush every file and folder, and let whoever may enter the folder read its files (safetensors says 0600)."""
    readable = folder.stat().st_mode & 0o666
    for parent, _, files in os.walk(folder):
        for name in files:
            os.chmod(Path(parent, name), readable)
            with open(Path(parent, name), "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


@contextmanager
def _as_disk_error(path: Path, temporary: Path, needed: int | None) -> Iterator[None]:
    """Turn what the operating system says about our own writing into `DiskError`; let everything else pass."""
    try:
        yield
    except Exception as error:
        number = _error_number(error, path, temporary)
        if number is None:
            raise
        raise _disk_error(path, number, needed) from error


def _error_number(error: Exception, path: Path, temporary: Path) -> int | None:
    """The errno behind a failed write, or None for a failure of something else (a read elsewhere, the network)."""
    if isinstance(error, OSError):
        file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | os.PathLike) else path
        ours = file in (path, *path.parents) or temporary in (file, *file.parents)
        return error.errno if ours else None
    # safetensors and tokenizers write from Rust, whose errors carry the number only in their text
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def _disk_error(path: Path, number: int, needed: int | None) -> DiskError:
    free = _free_bytes(path.parent)
    parts = {"where": str(path), "got": os.strerror(number)}
    if number in _FULL:
        parts["got"] += f"; {free:,} bytes free" if free is not None else ""
        parts["expected"] = f"{needed:,} bytes free" if needed is not None else ""
        parts["hint"] = "free some space or choose another folder; what was there before is untouched"
    return DiskError("writing failed", **parts)


def _free_bytes(folder: Path) -> int | None:
    """Free bytes on the file system of `folder` or of its nearest existing parent."""
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None
