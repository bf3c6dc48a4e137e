"""Whose tokenizer, chat template, processor and generation settings a result holds.

An adapter that was trained with another tokenizer or template than the base's says something else without it, so its
own files go where its change goes: into a merged model's folder, and into the folder of an adapter made of it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.errors import AdapterFileError, UsageError
from gossamer.files import companions
from gossamer.files.companions import SETTINGS, TEMPLATES, VOCABULARIES, contents_of, has_template, held
from gossamer.files.folder import read_json
from gossamer.models.load import read_tokenizer
from gossamer.models.scrutiny import read_config

_FREE = ("transformers_version", "_from_model_config")
"""What two equal files of settings may differ in."""


@dataclass(frozen=True)
class Companions:
    """The files that a merged model takes from its adapters; none where they say what the base's say.

    Attributes:
        files: name -> content, of every such file of the result; None leaves the base's.
        notes: in words, what differs from the base's.
        tokens: numbers of tokens in use; 0 where that is not known.
    """

    files: dict[str, bytes] | None = None
    notes: tuple[str, ...] = ()
    tokens: int = 0

    @classmethod
    def of(cls, base: Path, adapters: Sequence[Path]) -> Companions:
        """Those of adapter folders, seen from a base's folder or GGUF file.

        Raises: UsageError for adapters whose files disagree; AdapterFileError for a tokenizer that cannot be read.
        """
        holders = [folder for folder in adapters if held(folder)]
        if not holders:
            return cls()
        with tempfile.TemporaryDirectory() as scratch:
            before = _laid(base, None, Path(scratch, "base"))
            places = [_laid(base, one, Path(scratch, str(number))) for number, one in enumerate(holders)]
            plain = _facts(before, base)
            each = [_facts(place, one) for place, one in zip(places, holders, strict=True)]
            _require_agreement(holders, each)
            differing = [name for name in each[0] if each[0][name] != plain.get(name)]
            if not differing:
                return cls()
            files = contents_of(places[0])
        more = len(each[0]["vocabulary"].keys() - plain["vocabulary"].keys())
        words = [f"{name} ({more} tokens more)" if name == "vocabulary" and more else name for name in differing]
        note = f"of the adapter, not of the base: {', '.join(words)}"
        return cls(files, (note,), 1 + max(each[0]["vocabulary"].values(), default=-1))

    def require_rows(self, rows: int) -> None:
        """Raise `AdapterFileError` where the tokenizer has tokens for which a model has no embedding."""
        if self.tokens > rows:
            raise AdapterFileError(
                "the adapter's tokenizer has tokens that the merged model has no embedding for",
                got=f"{self.tokens} tokens",
                expected=f"at most {rows}",
                hint="train the embedding and the head with it (modules_to_save), "
                "or delete the tokenizer's files from the adapter's folder to merge with the base's",
            )

    def write(self, folder: Path) -> None:
        """Put them in place of what a folder has of them."""
        if self.files is not None:
            companions.remove(folder)
            companions.write(self.files, folder)


def hand_on(sources: Sequence[Path], output: Path) -> list[str]:
    """Copy the companions of adapter folders into the folder of what was made of them; returns their names.

    Raises `UsageError` where two of them disagree.
    """
    holders = require_one(sources)
    companions.write(contents_of(holders[0]) if holders else {}, output)
    return held(holders[0]) if holders else []


def require_one(sources: Sequence[Path]) -> list[Path]:
    """The folders that hold companions. Raises `UsageError` where they are different ones."""
    holders = [folder for folder in sources if held(folder)]
    if len(holders) > 1 and any(contents_of(one) != contents_of(holders[0]) for one in holders):
        _require_agreement(holders, [_facts(one, one) for one in holders])
    return holders


def _laid(base: Path, adapter: Path | None, place: Path) -> Path:
    """A folder with the base's companions and in their place what an adapter holds of them."""
    place.mkdir()
    if base.is_file():
        read_tokenizer(base.parent, gguf_file=base.name).save_pretrained(place)
    else:
        shutil.copyfile(base / "config.json", place / "config.json")
        companions.write(contents_of(base), place)
    if adapter is not None:
        whole = held(adapter, VOCABULARIES) and not has_template(adapter)  # its chats are written as the base's
        template = read_tokenizer(place).chat_template if whole else None
        companions.overlay(adapter, place)
        if isinstance(template, str):
            (place / TEMPLATES[0]).write_text(template, encoding="utf-8")
    return place


def _facts(folder: Path, source: Path) -> dict[str, Any]:
    """What a folder's tokenizer does and what its settings say, for comparing. Raises `AdapterFileError`."""
    facts: dict[str, Any] = {"vocabulary": {}}
    try:
        if (folder / "config.json").is_file():
            read_config(folder)  # no code of its own
        if held(folder, (*VOCABULARIES, "tokenizer_config.json")):
            tokenizer = read_tokenizer(folder)
            facts["vocabulary"] = tokenizer.get_vocab()
            facts["chat template"] = tokenizer.chat_template
            facts["special tokens"] = {name: str(one) for name, one in sorted(tokenizer.special_tokens_map.items())}
            rules = companions.rules_of(tokenizer)
            model = {key: value for key, value in rules.get("model", {}).items() if key != "vocab"}
            facts["tokenizer"] = rules | {"model": model}
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise AdapterFileError(
            "a tokenizer that cannot be read",
            where=str(source),
            got=reason,
            hint="delete the tokenizer's files from the adapter's folder to use the base's",
        ) from error
    for name, words in SETTINGS.items():
        found = read_json(folder / name) if (folder / name).is_file() else {}
        facts.setdefault(words, {})[name] = {key: value for key, value in found.items() if key not in _FREE}
    return facts


def _require_agreement(holders: Sequence[Path], facts: Sequence[dict[str, Any]]) -> None:
    for folder, one in zip(holders[1:], facts[1:], strict=True):
        different = [name for name in one | facts[0] if one.get(name) != facts[0].get(name)]
        if different:
            raise UsageError(
                "these adapters were made with different tokenizers or settings, and a result can have one",
                where=str(folder),
                got=f"another {', '.join(different)}",
                expected=f"that of {holders[0]}",
                hint=f"delete the files that shall not count from the adapter folders: {', '.join(held(folder))}",
            )
