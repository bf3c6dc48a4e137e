"""From what the user calls a base model to the folder or GGUF file that holds it."""

import os
import re
from pathlib import Path

from gossamer.catalog.catalog import CATALOG, cached
from gossamer.errors import BaseFileError, nearest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_CLUTTER = ["*/*", "consolidated*"]  # a second copy of the weights, other formats


def locate(base: str | Path) -> Path:
    """The folder or `.gguf` file of a base model; goes to the network for an id of the hub alone.

    Raises `BaseFileError` with the nearest names.
    """
    name = os.fspath(base)
    if name in CATALOG:
        return _fetched(name)
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise BaseFileError("not a base model", where=name, expected="a folder, or a file that ends in .gguf")
    # a misspelt catalog name must not leave this machine
    typo = "/" not in name and nearest(name, CATALOG)
    if isinstance(base, Path) or typo or not _HUB_ID.fullmatch(name) or name.endswith(".gguf"):
        raise _unknown(name)
    return _snapshot(name)


def _fetched(name: str) -> Path:
    folder = cached(name)
    if folder is None:
        raise BaseFileError(f"{name} has not been fetched yet", hint=f"gossamer fetch {name}")
    if CATALOG[name].kind != "model":
        raise BaseFileError(f"{name} is a data set, not a model", where=str(folder))
    return folder


def _snapshot(name: str) -> Path:
    """The hub's snapshot of a repository: from the cache when offline, without the files that are never read."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_CLUTTER))
    except LocalEntryNotFoundError as error:
        hint = "connect once to download it, or name a folder"
        raise _unknown(name, "neither in the hub's cache nor within reach", hint) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _unknown(name, " ".join(str(error).split())[:300]) from error


def _unknown(name: str, got: str = "", hint: str = "") -> BaseFileError:
    """The error for a base that is nowhere, with what is nearby: catalog names, and neighbours on disk."""
    parent = Path(name).expanduser().parent
    neighbours = [str(parent / one) for one in os.listdir(parent)] if parent.is_dir() else []
    close = nearest(name, [*CATALOG, *neighbours])
    expected = f"a catalog name ({', '.join(one for one in CATALOG if CATALOG[one].kind == 'model')}), a folder, "
    expected += "a .gguf file, or an id on the Hugging Face hub"
    return BaseFileError("no such base model", where=name, got=got, expected=expected, hint=close or hint)
