"""How an adapter's chats are written, where its folder says so: trainers save tokenizer and template beside weights."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.errors import AdapterFileError, UnsupportedError

TEMPLATE = "chat_template.jinja"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE,
         "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")  # fmt: skip
_SET_BY_BATCHES = ("padding", "truncation")
_MOST = 2**28


@dataclass(frozen=True)
class ChatFormat:
    """What differs from the base's own.

    Attributes:
        template: the chat template; None for the base's.
        tokens: what the template may write: the texts of the special tokens by their names ("eos_token", ...).
        ends: token ids that end an answer, beside those of the base.
    """

    template: str | None = None
    tokens: dict[str, Any] = field(default_factory=dict)
    ends: frozenset[int] = frozenset()


PLAIN = ChatFormat()
"""The base's."""


class ChatFormats:
    """Of the adapters of one base; equal files are looked at once.

    Args:
        tokenizer: the base's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, ChatFormat] = {}

    def of(self, folder: Path) -> ChatFormat:
        """What an adapter folder's own tokenizer says, where there is one.

        Raises: UnsupportedError for one that makes other tokens of texts, which rows of a batch cannot share;
            AdapterFileError for one that cannot be read.
        """
        found = [folder / name for name in FILES if (folder / name).is_file()]
        if not found or self.tokenizer is None:
            return PLAIN
        if sum(one.stat().st_size for one in found) > _MOST:
            raise AdapterFileError("too large to be a tokenizer", where=str(folder))
        digest = hashlib.sha256()
        for one in found:
            digest.update(f"{one.name} {one.stat().st_size} ".encode() + one.read_bytes())
        key = digest.hexdigest()
        if key not in self.known:
            self.known[key] = self._read(folder, {one.name for one in found})
        return self.known[key]

    def _read(self, folder: Path, names: set[str]) -> ChatFormat:
        base = self.tokenizer
        if names == {TEMPLATE}:
            text = (folder / TEMPLATE).read_text(encoding="utf-8")
            return PLAIN if text == base.chat_template else ChatFormat(text)
        try:
            own = type(base).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of many kinds, by what is wrong with the files
            got = type(error).__name__
            raise AdapterFileError("the adapter's own tokenizer cannot be read", where=str(folder), got=got) from None
        if other := _differing(own, base):
            raise UnsupportedError(
                "the adapter's own tokenizer makes other tokens than the base's",
                where=str(folder),
                got=f"another {other}",
                hint="serve it on a base that has this tokenizer, or merge it into one",
            )
        tokens = {} if own.special_tokens_map == base.special_tokens_map else dict(own.special_tokens_map)
        template = own.chat_template.get("default") if isinstance(own.chat_template, dict) else own.chat_template
        template = template if template != base.chat_template else None
        ends = frozenset({own.eos_token_id} - {None, base.eos_token_id})
        return ChatFormat(template, tokens, ends) if template or tokens or ends else PLAIN


def tokenizer_for(folder: Path, tokenizer: Any) -> Any:
    """The tokenizer to use with an adapter: the base's, with what the adapter's folder says of chats and ends.

    Raises as `ChatFormats.of`: an adapter that was trained on other tokens has no use for the base's.
    """
    found = ChatFormats(tokenizer).of(folder)
    if found == PLAIN:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.chat_template = found.template or own.chat_template
    for name, text in found.tokens.items():
        setattr(own, name, text)
    return own


def check_same(folder: Path, tokenizer: Any) -> None:
    """Refuse an adapter folder whose own tokenizer makes other tokens than the base's. Raises as `ChatFormats.of`."""
    ChatFormats(tokenizer).of(folder)


def common_format(chat_formats: Sequence[ChatFormat]) -> ChatFormat:
    """That of a mix: the one of all its adapters. Raises `UnsupportedError` where templates differ."""
    found = {one.template: one for one in chat_formats}
    if len(found) > 1:
        raise UnsupportedError("adapters of a mix that have different chat templates", hint="use /v1/completions")
    return next(iter(found.values()), PLAIN)


def _differing(own: Any, base: Any) -> str:
    """What makes two tokenizers give other tokens; "" where nothing does."""
    one, other = getattr(own, "backend_tokenizer", None), getattr(base, "backend_tokenizer", None)
    if one is None or other is None:
        same = own.get_vocab() == base.get_vocab() and own.init_kwargs.get("add_bos_token") == base.init_kwargs.get(
            "add_bos_token"
        )
        return "" if same else "vocabulary"
    ours, theirs = (json.loads(backend.to_str()) for backend in (one, other))
    parts = [part for part in {*ours, *theirs} - {*_SET_BY_BATCHES} if ours.get(part) != theirs.get(part)]
    if "model" in parts:
        return "vocabulary"
    return "set of added tokens" if "added_tokens" in parts else ", ".join(sorted(parts)).replace("_", " ")
