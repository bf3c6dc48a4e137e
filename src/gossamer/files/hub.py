"""Adapters to and from a hub, through huggingface_hub; the only two functions that use the network, when called."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.adapter import Adapter
from gossamer.errors import DownloadError, GossamerError, UsageError
from gossamer.files.atomic import write_bytes
from gossamer.files.folder import CONFIG, OURS, WEIGHTS

CARD, PICTURE = "README.md", "spectrum.svg"
FILES = (CONFIG, WEIGHTS, OURS, CARD, PICTURE)
"""All that is ever sent or fetched: no checkpoint, no log, no pickle."""


def push(
    folder: str | Path, repository: str, card: str, picture: str = "", *, private: bool = True, dry_run: bool = False
) -> dict[str, Any]:
    """Send an adapter folder with its card to `owner/name`; with `dry_run` only say what would go.

    The adapter is loaded first, strictly, so that nothing broken is published. Returns repository, private, the files
    with their bytes, and the url where it went ("" in a dry run).

    Raises `UsageError` for a name that is none; `AdapterFileError`; `DownloadError` for what the hub answers.
    """
    _check_name(repository)
    folder = Path(folder)
    Adapter.load(folder)
    content = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS, OURS) if (folder / name).is_file()}
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
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", repository) or ".." in repository:
        raise UsageError("not a repository's name", got=repr(repository), expected="owner/name")
