"""From rows to examples: token ids with a loss mask that is proven, row by row.

`chat_template` says which text is learned. The proof that the tokens marked are exactly that text: decoding the
supervised tokens, where they stand, gives the piece's text and its end token, and nothing else. It is run for every
row, as a wrong mask costs more than a decode, and a row that fails is an error with its place and reason.

Pieces are tokenised apart, as they are when a model answers: the prompt is complete before the first token of the
answer is drawn. Tokenizers that put a space before any text (SentencePiece's dummy prefix) fail the proof that way; for
their rows the whole text is tokenised at once and cut by the character offsets of the tokens, and proven again.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby
from typing import TYPE_CHECKING, Any, Literal, overload

from gossamer.data.chat_template import ChatRenderer, MaskedText, Unprovable
from gossamer.data.containers import RowFaults
from gossamer.data.rows import Chat, Instruction, Row
from gossamer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["error", "drop", "truncate"]
RowIds = list[list[int]]
"""The token ids of one row, a list for each of its pieces."""

_IDS_ONLY: dict[str, Any] = {
    "add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. `supervised[t]` says whether token t is learned, that is, predicted from those before it."""

    ids: list[int]
    supervised: list[bool]
    where: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def terms(self) -> int:
        """Terms of the loss: the first token has none before it to be predicted from."""
        return sum(self.supervised[1:])

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first supervised one."""
        return self.supervised.index(True)

    @property
    def answer_start(self) -> int:
        """Where the last run of supervised tokens begins."""
        return len(self.ids) - [*self.supervised[::-1], False].index(False)


@dataclass(frozen=True)
class Encoding(Sequence[Example]):
    """The examples of a data set, and what `max_length` did to them."""

    examples: tuple[Example, ...]
    max_length: int
    dropped: tuple[str, ...] = ()
    """Where the rows stand that were too long and left out."""
    truncated: tuple[str, ...] = ()
    """Where the rows stand that were too long and cut."""
    notes: tuple[str, ...] = ()
    """What else is worth saying of the rows, such as `3 rows with a name that the chat template does not write`."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """All tokens of all examples."""
        return sum(map(len, self.examples))

    @property
    def supervised(self) -> int:
        """The tokens that are learned."""
        return sum(sum(example.supervised) for example in self.examples)

    def describe(self) -> str:
        """One line, such as `2,966 examples, 84,312 tokens, 5,932 of them supervised (7.0%)`."""
        counts = {"dropped": len(self.dropped), "truncated": len(self.truncated)}
        long = [f"; {count:,} longer than {self.max_length:,} {fate}" for fate, count in counts.items() if count]
        share = self.supervised / self.tokens
        return (f"{len(self):,} examples, {self.tokens:,} tokens, {self.supervised:,} of them supervised ({share:.1%})"
                + "".join((*long, *(f"; {note}" for note in self.notes))))  # fmt: skip


def encode(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    add_eos: bool = True,
    chat_template: bool = True,
    on_overlong: Overlong = "error",
    date: str | None = None,
) -> Encoding:
    """Tokenise rows and prove their loss masks.

    - A completion is learned with the EOS after it, its prompt is not.
    - In a chat every supervised assistant turn is learned with its end-of-turn token, and with the EOS where the
      template writes it next; headers and other turns are not.
    - Plain text is learned whole, with EOS; a BOS that the tokenizer adds is not learned.

    Args:
        rows: what `read_rows` gives.
        tokenizer: any transformers tokenizer. Labels go by position, so its pad token may well be its EOS.
        max_length: tokens. No example is longer.
        add_eos: end completions and texts with EOS; off where only the label itself is to be scored.
        chat_template: write rows that have a plain form too (Alpaca) with the tokenizer's chat template, if it has one.
        on_overlong: what becomes of longer rows: `"error"`; `"drop"`; or `"truncate"`. That leaves out the earliest
            turns of a chat, whole, up to a user's turn, and keeps its system text and tools; takes tokens from the left
            of a prompt (after BOS) without special tokens; or from the end of plain text. No turn is cut open and no
            answer shortened: where that is not enough, the row is refused.
        date: the day that a chat template is told, as `2026-12-31`; today when None.

    Raises `DataError` with every row whose mask cannot be proven or that does not fit, and if nothing is left to learn.
    """
    rows = list(rows)
    if not rows:
        raise DataError("there are no rows to encode")
    renderer = ChatRenderer(tokenizer, add_eos=add_eos, chat_template=chat_template, date=date)
    forms = [renderer.form(row) for row in rows]
    leading = _leading_ids(tokenizer)
    examples = _examples(forms, renderer, leading)
    notes = tuple(f"{count:,} rows {note}" for note, count in renderer.notes.items())

    def shorter(index: int) -> Example | None:
        if isinstance(form := forms[index], Chat):
            return _fewer_turns(form, renderer, leading, max_length)
        if isinstance(rows[index], Instruction):
            return None  # the beginning of its form is as fixed as a template's
        return _shortened(examples[index], max_length, len(leading), {*tokenizer.all_special_ids})

    return replace(_fitted(examples, max_length, shorter, on_overlong), notes=notes)


def _examples(rows: list[Row], renderer: ChatRenderer, leading: list[int]) -> list[Example]:
    """Every row as tokens with its proven mask, of whatever length. Raises `DataError` with every fault."""
    faults, hints = RowFaults(), dict[str, None]()
    written = [_written(row, renderer, faults, hints) for row in rows]
    faults.check("these rows have no text that can be learned", hint="; ".join(hints))
    tokens, reasons = proven(written, renderer.tokenizer)
    for row, reason in zip(rows, reasons, strict=True):
        if reason:
            faults.at(row.where, reason)
    faults.check("the loss mask of these rows cannot be proven")
    examples = []
    for row, pieces, ids in zip(rows, written, tokens, strict=True):
        before = [] if isinstance(row, Chat) else leading
        flags = [piece.supervised for piece, part in zip(pieces, ids, strict=True) for _ in part]
        examples.append(Example([*before, *chain(*ids)], [*(False for _ in before), *flags], row.where))
    return examples


def _fewer_turns(row: Chat, renderer: ChatRenderer, leading: list[int], max_length: int) -> Example | None:
    """The chat without its earliest turns, as few of them as it takes; None if not even its last exchange fits.

    It begins with a user's turn again, as templates want it, after the system turn if there is one.
    """
    first = int(row.turns[0].role == "system")
    starts = [index for index in range(first + 1, row.last) if row.turns[index].role == "user"]
    found: Example | None = None
    while starts:
        middle = len(starts) // 2
        fewer = replace(row, turns=(*row.turns[:first], *row.turns[starts[middle] :]))
        try:
            (example,) = _examples([fewer], renderer, leading)
        except DataError:  # what the template makes of these turns cannot be proven
            example = None
        if example and len(example) <= max_length:
            found, starts = example, starts[:middle]
        else:
            starts = starts[middle + 1 :]
    return found


def label_ids(labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, row: Row, *, add_eos: bool = False,
              chat_template: bool = True, date: str | None = None) -> tuple[tuple[int, ...], ...]:  # fmt: skip
    """The token ids of each label as it continues the prompt of `row`, to compare their likelihoods.

    Raises `DataError` if two labels have the same tokens, or a label is not provable in that place.
    """
    rows = [replace(row.answering(label), where=f"label {label!r}") for label in labels]
    options: dict[str, Any] = {"add_eos": add_eos, "chat_template": chat_template, "date": date}
    examples = encode(rows, tokenizer, max_length=2**31, **options)
    found = tuple(tuple(example.ids[example.answer_start :]) for example in examples)
    for label, ids in zip(labels, found, strict=True):
        twin = labels[found.index(ids)]
        if twin != label:
            raise DataError("two labels have the same tokens", got=f"{twin!r} and {label!r}: {list(ids)}")
    return found


def preview(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The example as text, cut into `(piece, supervised)` runs, to be shown in two colours."""
    ends = accumulate(len(list(run)) for _, run in groupby(example.supervised))
    shown, pieces = "", []
    for end in ends:
        text = decoded([example.ids[:end]], tokenizer)[0]
        pieces.append((text[len(shown) :], example.supervised[end - 1]))
        shown = text
    return pieces


def _written(row: Row, renderer: ChatRenderer, faults: RowFaults, hints: dict[str, None]) -> list[MaskedText]:
    try:
        return renderer.render(row)
    except Unprovable as error:
        faults.at(row.where, str(error))
        hints |= {error.hint: None} if error.hint else {}
        return []


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before any text: usually its BOS, or nothing."""
    bare, dressed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = (start for start in range(len(dressed)) if dressed[start : start + len(bare)] == bare)
    return list(dressed[: next(starts, 0)])


def _fitted(
    examples: list[Example], max_length: int, shorter: Callable[[int], Example | None], on_overlong: Overlong
) -> Encoding:
    """Apply `max_length`, then make sure that every example teaches something."""
    faults, kept, dropped, truncated = RowFaults(), [], [], []
    for index, example in enumerate(examples):
        if len(example) <= max_length:
            kept.append(example)
        elif on_overlong == "drop":
            dropped.append(example.where)
        elif on_overlong == "truncate" and (cut := shorter(index)):
            truncated.append(example.where)
            kept.append(cut)
        else:
            answer = f"{sum(example.supervised):,} of them supervised"
            faults.at(example.where, f"{len(example):,} tokens, {answer}, but max_length is {max_length:,}")
    others = {"error": ", or set overlong to drop or truncate", "truncate": ", or set overlong to drop; "
              "turns are not cut open and answers not shortened"}  # fmt: skip
    hint = f"raise max_length{others.get(on_overlong, '')}" if faults.found else ""
    for example in kept:
        if not any(example.supervised[1:]):  # the first token has none before it to be predicted from
            faults.at(example.where, "no supervised token, so there is nothing to learn")
    faults.check("these rows cannot be trained on", hint=hint)
    if not kept:
        raise DataError(f"every one of the {len(examples):,} rows is longer than max_length={max_length:,}")
    return Encoding(tuple(kept), max_length, tuple(dropped), tuple(truncated))


def _shortened(example: Example, max_length: int, fixed: int, special: set[int]) -> Example | None:
    """A shorter prompt, or a shorter plain text; None if an answer or a prompt with special tokens would be cut.

    A prompt with special tokens in it was written by a template, and its beginning belongs to it.
    """
    excess, prompt = len(example) - max_length, example.prompt_length - fixed
    if prompt <= 0:
        return replace(example, ids=example.ids[:max_length], supervised=example.supervised[:max_length])
    if prompt <= excess or not special.isdisjoint(example.ids[fixed : example.prompt_length]):
        return None
    ids, supervised = ([*part[:fixed], *part[fixed + excess :]] for part in (example.ids, example.supervised))
    return replace(example, ids=ids, supervised=supervised)


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
