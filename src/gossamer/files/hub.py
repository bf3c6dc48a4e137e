"""Adapters to and from a hub, through huggingface_hub; only `push`, `pull` and `fetch` use the network, when called."""

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gossamer.adapter import Adapter
from gossamer.attachment.remarks import base_name
from gossamer.errors import AdapterFileError, DownloadError, GossamerError, UsageError
from gossamer.files.atomic import write_bytes
from gossamer.files.companions import contents_of, is_companion, write
from gossamer.files.folder import CONFIG, OURS, WEIGHTS, read_json

CARD, PICTURE = "README.md", "spectrum.svg"
ADAPTER = (CONFIG, WEIGHTS, OURS)

_BASE = "base_model_name_or_path"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PATH = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
"""How text begins that names a place on a machine."""


@dataclass(frozen=True)
class Fetched:
    """An adapter that was fetched.

    Attributes:
        folder: where it lies on this machine. revision: the commit that its id meant.
    """

    folder: Path
    revision: str


def is_id(name: str) -> bool:
    """Whether a name is written as the hub's ids are: owner/name."""
    return bool(_ID.fullmatch(name)) and ".." not in name


def push(
    folder: str | Path, repository: str, card: str, picture: str = "", *, private: bool = True, dry_run: bool = False
) -> dict[str, Any]:
    """Send an adapter folder with its card to `owner/name`; with `dry_run` only say what would go.

    What lies beside the adapter and is its own (tokenizer, chat template, settings) goes too, and nothing else. The
    adapter is loaded first, strictly, so that nothing broken is published. What it says of its base is what the
    card says, and no path of this machine goes with it. Returns repository, private, the files with their bytes, and
    the url where it went ("" in a dry run).

    Raises `UsageError` for a name that is none, or a base that nobody can find by what config and card call it;
    `AdapterFileError`; `DownloadError` for what the hub answers.
    """
    _check_name(repository)
    content = _publishable(Adapter.load(folder), _base_of(card)) | _beside(Path(folder))
    content[CARD] = card.encode()
    if picture:
        content[PICTURE] = picture.encode()
    summary = {
        "repository": repository,
        "private": private,
        "files": {name: len(data) for name, data in content.items()},
    }
    return summary | {"url": "" if dry_run else _sent(content, repository, private)}


def pull(repository: str, output: str | Path, revision: str | None = None) -> Adapter:
    """Fetch `owner/name` into a new folder, after it was read strictly. Raises as `Adapter.load`; `DownloadError`."""
    _check_name(repository)
    output = Path(output)
    if output.exists():
        raise UsageError("the output folder exists already", where=str(output), hint="choose a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        if fetch(repository, revision, beside=_is_published, into=Path(scratch)) is None:
            raise DownloadError("the hub did not do it", where=repository, got="no such repository that you may see")
        adapter = Adapter.load(scratch)
        adapter.save(output)
        write(contents_of(Path(scratch)), output)
        for name in (CARD, PICTURE):
            if Path(scratch, name).is_file():
                write_bytes(output / name, Path(scratch, name).read_bytes())
    return adapter


def fetch(
    repository: str,
    revision: str | None = None,
    *,
    beside: Callable[[str], bool],
    into: Path | None = None,
    most: int | None = None,
    seconds: float = 10.0,
) -> Fetched | None:
    """Resolve an id to a commit and fetch an adapter's files at it; None where the hub has no such id for us.

    Args:
        revision: a branch, tag or commit; the newest without it.
        beside: whether a file of another name is fetched too, by its path.
        into: a folder to fill; without it the hub's own cache on this machine.
        most: bytes of all files. seconds: for each answer of the hub.

    Raises: AdapterFileError for what is no adapter, or too large a one; DownloadError when the hub does not answer.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    about = _asked(
        lambda: api.model_info(repository, revision=revision, files_metadata=True, timeout=seconds), repository, True
    )
    if about is None:
        return None
    sizes = {one.rfilename: one.size for one in about.siblings or ()}
    missing = [one for one in (CONFIG, WEIGHTS) if one not in sizes]
    if missing:
        raise AdapterFileError("this id is no adapter in safetensors", where=repository, got=f"no {missing[0]}")
    files = [one for one in ADAPTER if one in sizes] + [*filter(beside, sizes)]
    _check_size([sizes[one] for one in files], most, repository)
    place: dict[str, Any] = {"local_dir": str(into)} if into else {}
    folder = _asked(
        lambda: api.snapshot_download(
            repository, revision=about.sha, allow_patterns=files, etag_timeout=seconds, max_workers=1, **place
        ),
        repository,
        True,
    )
    if folder is None:
        return None
    _check_size([Path(folder, one).stat().st_size for one in files], most, repository)
    return Fetched(Path(folder), about.sha)


def _check_size(sizes: Sequence[int | None], most: int | None, repository: str) -> None:
    if most is not None and sum(most + 1 if size is None else size for size in sizes) > most:
        raise AdapterFileError("this adapter is too large", where=repository, expected=f"at most {most:,} bytes")


def _is_published(path: str) -> bool:
    return path in (CARD, PICTURE) or is_companion(path)


def _beside(folder: Path) -> dict[str, bytes]:
    """The companions of an adapter folder, without what their settings say of places on this machine."""
    found = contents_of(folder)
    for name in found:
        if name.endswith("_config.json"):
            settings = read_json(folder / name)
            plain = {
                key: _without_paths(settings[key]) if key.endswith(("path", "file")) else settings[key]
                for key in settings
            }
            found[name] = found[name] if plain == settings else json.dumps(plain, indent=2, ensure_ascii=False).encode()
    return found


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
    return base if isinstance(base, str) and _is_published_id(base) else ""


def _publishable(adapter: Adapter, base: str) -> dict[str, bytes]:
    """The adapter's files, written anew with the base's id and without paths."""
    named = base_name(adapter.foreign.get(_BASE)) or None
    if not base and named and not _is_published_id(named):
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
        return {name: (folder / name).read_bytes() for name in ADAPTER}


def _without_paths(value: Any) -> Any:
    """Text that is a path is left with its last part; a base's snapshot in the hub's cache is called by its id."""
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(entry) for entry in value]
    if not isinstance(value, str) or not _PATH.match(value):
        return value
    name = base_name(value)
    return name if _is_published_id(name) else re.split(r"[/\\]+", value.rstrip("/\\"))[-1]


def _is_published_id(name: str) -> bool:
    return is_id(name) and not Path(name).exists()


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


def _asked(call: Any, repository: str, may_lack: bool = False) -> Any:
    """What the hub answers, or what went wrong in one error of ours; with `may_lack` None for no such repository."""
    from huggingface_hub.errors import (
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the client it has
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return call()
    except GossamerError:
        raise
    except (HTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        if may_lack and isinstance(error, RepositoryNotFoundError):  # or a gated one: for us it is not there
            return None
        first = str(error).strip().partition("\n")[0]
        raise DownloadError(
            "the hub did not do it", where=repository, got=first, hint="is the name right, and are you logged in?"
        ) from None


def _check_name(repository: str) -> None:
    if not is_id(repository):
        raise UsageError("not a repository's name", got=repr(repository), expected="owner/name")
