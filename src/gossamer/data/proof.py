"""From pieces of text to token ids whose loss mask is proven.

The proof: decoding the supervised tokens, where they stand, gives the piece's text and its end token, and nothing else.
It is run for every row, as a wrong mask costs more than a decode.

Pieces are tokenised apart, as they are when a model answers: the prompt is complete before the first token of the
answer is drawn. Tokenizers that put a space before any text (SentencePiece's dummy prefix) fail the proof that way; for
their rows the whole text is tokenised at once and cut by the character offsets of the tokens, and proven again.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from gossamer.data.chat_template import MaskedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RowIds = list[list[int]]
"""The token ids of one row, a list for each of its pieces."""

_IDS_ONLY: dict[str, Any] = {
    "add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False
}  # fmt: skip


def proven(written: list[list[MaskedText]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[RowIds], list[str]]:
    """The tokens of every row, and for every row why its mask cannot be proven: `""` where it is."""
    tokens = _apart(written, tokenizer)
    reasons = _disproofs(written, tokens, tokenizer)
    doubtful = [row for row, reason in enumerate(reasons) if reason]
    if doubtful and tokenizer.is_fast:  # only fast tokenizers know offsets
        again = [written[row] for row in doubtful]
        cut = _at_once(again, tokenizer)
        for row, ids, reason in zip(doubtful, cut, _disproofs(again, cut, tokenizer), strict=True):
            tokens[row], reasons[row] = ids, reason
    return tokens, reasons


def decoded(sequences: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each sequence, special tokens included, nothing tidied."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend:  # the same decoder without transformers' checks of every id: twice as fast
        return backend.decode_batch(sequences, skip_special_tokens=False)
    return tokenizer.batch_decode(sequences, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_id(token: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of a special token; None if the tokenizer has no such token."""
    found = tokenizer.convert_tokens_to_ids(str(token)) if token else None
    return found if isinstance(found, int) else None


def _apart(written: list[list[MaskedText]], tokenizer: PreTrainedTokenizerBase) -> list[RowIds]:
    """Each piece tokenised by itself, all in one call."""
    texts = [piece.text for pieces in written for piece in pieces]
    ids = iter(tokenizer(texts, **_IDS_ONLY)["input_ids"])
    return [[next(ids) for _ in pieces] for pieces in written]


def _at_once(written: list[list[MaskedText]], tokenizer: PreTrainedTokenizerBase) -> list[RowIds]:
    """Each row tokenised as one text and cut where its pieces begin; a token across a cut goes to the piece before."""
    texts = ["".join(piece.text for piece in pieces) for pieces in written]
    tokenised = tokenizer(texts, **_IDS_ONLY, return_offsets_mapping=True)
    cut = []
    for pieces, ids, offsets in zip(written, tokenised["input_ids"], tokenised["offset_mapping"], strict=True):
        starts = [start for start, _ in offsets]
        cuts = [bisect_left(starts, end) for end in accumulate(len(piece.text) for piece in pieces)]
        cut.append([ids[begin:end] for begin, end in zip([0, *cuts], cuts, strict=False)])
    return cut


def _disproofs(written: list[list[MaskedText]], tokens: list[RowIds], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """For each row why its mask is wrong; `""` where it is right.

    A learned piece is decoded after the piece before it, as some decoders treat the first token of a text differently.
    """
    places = [(row, at) for row, pieces in enumerate(written) for at, piece in enumerate(pieces) if piece.supervised]
    before = [tokens[row][at - 1] if at else [] for row, at in places]
    through = [[*ids, *tokens[row][at]] for ids, (row, at) in zip(before, places, strict=True)]
    reasons = [""] * len(written)
    texts = zip(places, decoded(before, tokenizer), decoded(through, tokenizer), strict=True)
    for (row, at), prompt, both in texts:
        piece, last = written[row][at], tokens[row][at][-1:]
        right = both.startswith(prompt) and _same(both[len(prompt) :], piece.text)
        if not right or (piece.end and last != [token_id(piece.end, tokenizer)]):
            got = both.removeprefix(prompt)
            reasons[row] = reasons[row] or f"the supervised tokens decode to {got!r:.80}, expected {piece.text!r:.80}"
    return reasons


def _same(got: str, expected: str) -> bool:
    """Equal, or canonically equivalent: some tokenizers compose accents (NFC), and Unicode calls that the same text."""
    return got == expected or unicodedata.normalize("NFC", got) == unicodedata.normalize("NFC", expected)
