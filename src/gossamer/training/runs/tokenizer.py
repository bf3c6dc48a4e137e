"""The tokenizer of a run, kept beside its adapter where it is not the base's own: new tokens mean nothing without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import DiskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Write a tokenizer's files into an adapter folder, as PEFT's users do, unless its source holds the same.

    Returns: whether it was written. One that came from nowhere is. Raises `DiskError`.
    """
    if not _is_its_own(tokenizer):
        return False
    try:
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise DiskError("cannot keep the tokenizer", where=str(folder), got=error.strerror or str(error)) from error
    return True


def _is_its_own(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it differs from what lies where it was loaded from: in a token, a special one, or the chat template."""
    source = str(getattr(tokenizer, "name_or_path", "") or "")
    if not source:
        return True
    try:
        then = type(tokenizer).from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return True
    return _meaning(then) != _meaning(tokenizer)


def _meaning(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    return tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template
