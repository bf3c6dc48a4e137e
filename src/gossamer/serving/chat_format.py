"""How an adapter's chats are written, where its folder says so: trainers save tokenizer and template beside weights."""

import copy
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.files.companions import CHAT, GENERATION, TEMPLATES, VOCABULARIES, files_in, overlay, rules_of
from gossamer.files.folder import read_json
from gossamer.serving.vocabulary import ends_of

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
        """What an adapter folder's own tokenizer and settings say, where there are any.

        Raises: UnsupportedError for a tokenizer that makes other tokens of texts, which rows of a batch cannot share;
            AdapterFileError for one that cannot be read.
        """
        found = chat_files(folder)
        if not found or self.tokenizer is None:
            return PLAIN
        digest = hashlib.sha256()
        for one in found:
            digest.update(f"{one.relative_to(folder)} {one.stat().st_size} ".encode() + one.read_bytes())
        key = digest.hexdigest()
        if key not in self.known:
            self.known[key] = self._read(folder, {one.relative_to(folder).parts[0] for one in found})
        return self.known[key]

    def _read(self, folder: Path, found: set[str]) -> ChatFormat:
        base, own = self.tokenizer, self.tokenizer
        template = base.chat_template
        if found - {GENERATION}:
            try:
                own, template = _own(folder, found, base)
            except Exception as error:  # of many kinds, by what is wrong with the files
                got = type(error).__name__
                what = "the adapter's own tokenizer cannot be read"
                raise AdapterFileError(what, where=str(folder), got=got) from None
            if other := _differing(own, base):
                raise UnsupportedError(
                    "the adapter's own tokenizer makes other tokens than the base's",
                    where=str(folder),
                    got=f"another {other}",
                    hint="serve it on a base that has this tokenizer, or merge it into one",
                )
        tokens = {} if own.special_tokens_map == base.special_tokens_map else dict(own.special_tokens_map)
        template = template.get("default") if isinstance(template, dict) else template
        template = template if template != base.chat_template else None
        ends = frozenset({own.eos_token_id, *_settled_ends(folder)} - {None, base.eos_token_id})
        return ChatFormat(template, tokens, ends) if template or tokens or ends else PLAIN


def _own(folder: Path, found: set[str], base: Any) -> tuple[Any, Any]:
    """The tokenizer and the template of a folder; what it does not say is the base's."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if not found & {*VOCABULARIES}:
            base.save_pretrained(place)
        overlay(folder, place)
        own = type(base).from_pretrained(place, local_files_only=True, trust_remote_code=False)
    if TEMPLATES[1] in found and TEMPLATES[0] not in found:  # a processor's, which tokenizers do not read
        return own, read_json(folder / TEMPLATES[1])["chat_template"]
    return own, own.chat_template or base.chat_template


def chat_files(folder: Path) -> list[Path]:
    """What of it lies in a folder. Raises `AdapterFileError` for what is too large for it."""
    found = files_in(folder, CHAT)
    if sum(one.stat().st_size for one in found) > _MOST:
        raise AdapterFileError("too large to be a tokenizer", where=str(folder))
    return found


def _settled_ends(folder: Path) -> frozenset[int]:
    """Token ids that end an answer by a folder's generation_config.json. Raises `AdapterFileError`."""
    named = read_json(folder / GENERATION).get("eos_token_id") if (folder / GENERATION).is_file() else None
    listed = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(one) is int for one in listed):
        where = str(folder / GENERATION)
        raise AdapterFileError("eos_token_id names tokens by their ids", where=where, got=str(named)[:80])
    return frozenset(listed)


def tokenizer_for(folder: Path, model: Any, tokenizer: Any) -> Any:
    """The tokenizer for a model on which one adapter stands: the base's, with what the adapter's folder says of chats.

    The model's generation config gets what ends the adapter's answers.

    Raises as `ChatFormats.of`: an adapter that was trained on other tokens has no use for the base's.
    """
    found = ChatFormats(tokenizer).of(folder)
    if found == PLAIN:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.chat_template = found.template or own.chat_template
    for name, text in found.tokens.items():
        setattr(own, name, text)
    if found.ends:
        model.generation_config.eos_token_id = sorted(ends_of(model, tokenizer) | found.ends)
    return own


def common_format(chat_formats: Sequence[ChatFormat]) -> ChatFormat:
    """That of a mix: the one of all its adapters. Raises `UnsupportedError` where templates differ."""
    found = {one.template: one for one in chat_formats}
    if len(found) > 1:
        raise UnsupportedError("adapters of a mix that have different chat templates", hint="use /v1/completions")
    return next(iter(found.values()), PLAIN)


def _differing(own: Any, base: Any) -> str:
    """What makes two tokenizers give other tokens; "" where nothing does."""
    ours, theirs = rules_of(own), rules_of(base)
    if not ours or not theirs:
        bos = own.init_kwargs.get("add_bos_token") == base.init_kwargs.get("add_bos_token")
        return "" if own.get_vocab() == base.get_vocab() and bos else "vocabulary"
    parts = [part for part in {*ours, *theirs} if ours.get(part) != theirs.get(part)]
    if "model" in parts:
        return "vocabulary"
    return "set of added tokens" if "added_tokens" in parts else ", ".join(sorted(parts)).replace("_", " ")
