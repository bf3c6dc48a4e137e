"""Adapters by their id on the Hugging Face hub, for those ids that whoever runs the server allows.

An id is asked for once: the commit that it means then is what it means until it is unloaded. Nothing but the adapter's
JSON and safetensors, its own tokenizer and chat template is fetched, into the hub's own cache on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import AdapterFileError, DownloadError, UsageError
from gossamer.files.folder import CONFIG, OURS, WEIGHTS
from gossamer.serving.chat_format import is_chat_file

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PATTERN = re.compile(r"[\w.*-]{1,96}/[\w.*-]{1,96}", re.ASCII)


@dataclass(frozen=True)
class Found:
    """An adapter that was fetched.

    Attributes:
        folder: where it lies on this machine. revision: the commit that its id meant.
    """

    folder: Path
    revision: str


class Hub:
    """Fetches what it may.

    Args:
        patterns: of ids, as "owner/*"; a star stands for any part of an owner or a name. Without any, nothing is
            allowed.
        most: bytes of one adapter's files.
        seconds: for each answer of the hub.

    Raises: UsageError for a pattern that is none.
    """

    def __init__(self, patterns: Sequence[str] = (), *, most: int = 2**30, seconds: float = 10.0) -> None:
        for one in patterns:
            if not _PATTERN.fullmatch(one):
                raise UsageError(
                    "not a pattern of ids on the hub", where="--hub", got=one, expected="owner/name or owner/*"
                )
        self.patterns = [re.compile(re.escape(one).replace(r"\*", r"[\w.-]*"), re.ASCII) for one in patterns]
        self.most, self.seconds = most, seconds

    def allows(self, name: str) -> bool:
        """Whether this is an id that may be fetched. Asks nobody."""
        return bool(_ID.fullmatch(name)) and ".." not in name and any(one.fullmatch(name) for one in self.patterns)

    def fetch(self, name: str) -> Found | None:
        """Resolve an id and fetch its files, at that commit; None where the hub has no such id, or tells us so.

        Raises: UsageError for an id that is not allowed; AdapterFileError for what is no adapter, or too large a one;
        DownloadError when the hub does not answer.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the client it has
            RepositoryNotFoundError,
        )

        if not self.allows(name):
            raise UsageError("this id may not be fetched", got=name)
        api = HfApi()
        try:
            about = api.model_info(name, files_metadata=True, timeout=self.seconds)
            sizes = {one.rfilename: one.size for one in about.siblings or ()}
            files = self._chosen(name, sizes)
            folder = api.snapshot_download(
                name, revision=about.sha, allow_patterns=files, etag_timeout=self.seconds, max_workers=1
            )
        except RepositoryNotFoundError:  # or a gated one: for us it is not there
            return None
        except (HTTPError, OSError, ValueError) as error:
            raise DownloadError("the hub does not answer", where=name, got=type(error).__name__) from None
        assert about.sha
        found = Found(Path(folder), about.sha)
        if sum((found.folder / one).stat().st_size for one in files) > self.most:
            raise self._too_large(name)
        return found

    def _chosen(self, name: str, sizes: dict[str, int | None]) -> list[str]:
        """The files to fetch, if they are an adapter and small enough."""
        missing = [one for one in (CONFIG, WEIGHTS) if one not in sizes]
        if missing:
            raise AdapterFileError("this id is no adapter in safetensors", where=name, got=f"no {missing[0]}")
        files = [one for one in (CONFIG, WEIGHTS, OURS) if one in sizes] + [*filter(is_chat_file, sizes)]
        if sum(self.most + 1 if sizes[one] is None else sizes[one] or 0 for one in files) > self.most:
            raise self._too_large(name)
        return files

    def _too_large(self, name: str) -> AdapterFileError:
        return AdapterFileError("this adapter is too large", where=name, expected=f"at most {self.most:,} bytes")
