"""Adapters to and from a hub, through huggingface_hub; the only two functions that use the network, when called."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gossamer.adapter import Adapter
from gossamer.attachment.remarks import base_name
from gossamer.errors import DownloadError, GossamerError, UsageError
from gossamer.files.atomic import write_bytes
from gossamer.files.folder import CONFIG, OURS, WEIGHTS

CARD, PICTURE = "README.md", "spectrum.svg"
FILES = (CONFIG, WEIGHTS, OURS, CARD, PICTURE)
"""All that is ever sent or fetched: no checkpoint, no log, no pickle."""

_BASE = "base_model_name_or_path"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_PATH = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
"""How text begins that names a place on a machine."""


def push(
    folder: str | Path, repository: str, card: str, picture: str = "", *, private: bool = True, dry_run: bool = False
) -> dict[str, Any]:
    """Send an adapter folder with its card to `owner/name`; with `dry_run` only say what would go.

    The adapter is loaded first, strictly, so that nothing broken is published. What it says of its base is what the
    card says, and no path of this machine goes with it. Returns repository, private, the files with their bytes, and
    the url where it went ("" in a dry run).

    Raises `UsageError` for a name that is none, or a base that nobody can find by what config and card call it;
    `AdapterFileError`; `DownloadError` for what the hub answers.
    """
    _check_name(repository)
    content = _publishable(Adapter.load(folder), _base_of(card))
    content[CARD] = card.encode()
    if picture:
        content[PICTURE] = picture.encode()
    told = {"repository": repository, "private": private, "files": {name: len(data) for name, data in content.items()}}
    return told | {"url": "" if dry_run else _sent(content, repository, private)}


def pull(repository: str, output: str | Path, revision: str | None = None) -> Adapter:
    """Fetch `owner/name` into a new folder, after it was read strictly. Raises as `Adapter.load`; `DownloadError`."""
    from huggingface_hub import HfApi

    _check_name(repository)
    output = Path(output)
    if output.exists():
        raise UsageError("the output folder exists already", where=str(output), hint="choose a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        api = HfApi()
        _asked(
            lambda: api.snapshot_download(
                repository, revision=revision, local_dir=scratch, allow_patterns=[*FILES], max_workers=1
            ),
            repository,
        )
        adapter = Adapter.load(scratch)
        adapter.save(output)
        for name in (CARD, PICTURE):
            if Path(scratch, name).is_file():
                write_bytes(output / name, Path(scratch, name).read_bytes())
    return adapter


def _base_of(card: str) -> str:
    """The hub id that a card's front matter names as its base; "" where it names none."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    parts = card.split("---\n", 2)
    try:
        front = YAML(typ="safe", pure=True).load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except YAMLError:
        front = None
    base = front.get("base_model") if isinstance(front, dict) else None
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and _is_id(base) else ""


def _publishable(adapter: Adapter, base: str) -> dict[str, bytes]:
    """The adapter's files, written anew with the base's id and without paths."""
    named = base_name(adapter.foreign.get(_BASE)) or None
    if not base and named and not _is_id(named):
        raise UsageError(
            "the adapter names its base by a path of this machine, and the card by no id of the hub",
            got=f"{_BASE}={named!r}",
            expected="owner/name",
            hint="give the card the base's id: model_card(..., base=), gossamer push --base owner/name",
        )
    foreign = {key: _without_paths(value) for key, value in adapter.foreign.items()}
    if base or named:
        foreign[_BASE] = base or named
    provenance = {key: _without_paths(value) for key, value in adapter.provenance.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = replace(adapter, foreign=foreign, provenance=provenance).save(Path(scratch, "adapter"))
        return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS, OURS)}


def _without_paths(value: Any) -> Any:
    """Text that is a path is left with its last part; a base's snapshot in the hub's cache is called by its id."""
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(entry) for entry in value]
    if not isinstance(value, str) or not _PATH.match(value):
        return value
    name = base_name(value)
    return name if _is_id(name) else re.split(r"[/\\]+", value.rstrip("/\\"))[-1]


def _is_id(name: str) -> bool:
    return bool(_ID.fullmatch(name)) and ".." not in name and not Path(name).exists()


def _sent(content: Mapping[str, bytes], repository: str, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in content.items():
            write_bytes(Path(scratch, name), data)
        _asked(lambda: api.create_repo(repository, private=private, exist_ok=True), repository)
        sent = _asked(
            lambda: api.upload_folder(repo_id=repository, folder_path=scratch, commit_message="Add the adapter"),
            repository,
        )
    return str(getattr(sent, "commit_url", sent))


def _asked(call: Any, repository: str) -> Any:
    """What the hub answers, or what went wrong in one error of ours; a token is never part of it."""
    from huggingface_hub.errors import (
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the client it has
        LocalTokenNotFoundError,
    )

    try:
        return call()
    except GossamerError:
        raise
    except (HTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise DownloadError(
            "the hub did not do it", where=repository, got=first, hint="is the name right, and are you logged in?"
        ) from None


def _check_name(repository: str) -> None:
    if not _ID.fullmatch(repository) or ".." in repository:
        raise UsageError("not a repository's name", got=repr(repository), expected="owner/name")
