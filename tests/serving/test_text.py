"""Text as it comes: joined, it is what the tokenizer makes of all tokens; what was told is never taken back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from gossamer.models import tiny_tokenizer
from gossamer.serving.detokenizer import Detokenizer


def sentencepiece_like() -> Any:
    """Pieces with `▁` for a space, single bytes for what has no piece, the first space taken away: as in Llama 2."""
    pieces = [
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁a",
        "▁b",
        "a",
        "b",
        "é",
        "▁▁",
        ".",
        "\ufffd",
    ]
    tokenizer = Tokenizer(
        BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte-level": tiny_tokenizer(), "sentencepiece-like": sentencepiece_like()}
TEXTS = ["héllo wörld ", "日本語のテキスト", "😀👩‍👩‍👧", " a  b ", "\ufffd", "\n\t"]


def whole(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def tokens_of(tokenizer: Any) -> st.SearchStrategy[list[int]]:
    """Anything, real text, and long runs of one token: half characters, broken ones, special ones."""
    anything = st.integers(0, len(tokenizer) - 1)
    bytes_of = [[*text.encode()] for text in TEXTS]
    first = 0 if tokenizer is TOKENIZERS["byte-level"] else 2
    real = st.sampled_from(bytes_of).map(lambda text: _tokens(tokenizer, text, first))
    runs = st.tuples(anything, st.integers(1, 50)).map(lambda run: [run[0]] * run[1])
    few = st.lists(anything, max_size=6)
    return st.lists(st.one_of(few, real, runs), max_size=14).map(lambda parts: [one for part in parts for one in part])


def _tokens(tokenizer: Any, text: list[int], first: int) -> list[int]:
    if first:
        return [first + byte for byte in text]
    return tokenizer(bytes(text).decode())["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_joined_are_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = data.draw(tokens_of(tokenizer))
    writer, told = Detokenizer(tokenizer), ""
    for token in tokens:
        told += writer.add(token)
        assert writer.text == told
    told += writer.end()
    assert told == writer.text == whole(tokenizer, tokens)


def test_no_half_character_is_told() -> None:
    for name, tokenizer in TOKENIZERS.items():
        tokens = _tokens(tokenizer, [*"é日😀".encode()], 0 if name == "byte-level" else 2)
        writer = Detokenizer(tokenizer)
        pieces = [*map(writer.add, tokens), writer.end()]
        assert "".join(pieces) == "é日😀"
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_is_told_as_soon_as_it_is_whole() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    writer = Detokenizer(tokenizer)
    assert [writer.add(token) for token in tokenizer("aé")["input_ids"]] == ["a", "", "é"]


@settings(max_examples=150, deadline=None)
@given(text=st.text("ab\u00e9 ", max_size=60), stop=st.lists(st.text("ab\u00e9", min_size=1, max_size=5), max_size=4))
def test_stop_texts_end_it_and_their_beginnings_wait(text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    writer = Detokenizer(tokenizer, stop)
    ends = min((text.index(one) for one in stop if one in text), default=None)
    for token in tokenizer(text)["input_ids"]:
        before = writer.text
        piece = writer.add(token)
        assert writer.text == before + piece
    assert writer.stopped == (ends is not None)
    writer.end()
    if ends is None:
        assert writer.text == text
    else:  # the stop text that was complete first
        complete = min(text.index(one) + len(one) for one in stop if one in text)
        first = min(text.index(one) for one in stop if one in text[:complete])
        assert writer.text == text[:first]


def test_the_beginning_of_a_stop_text_is_told_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    writer = Detokenizer(tokenizer, ["STOP"])
    told = "".join(map(writer.add, tokenizer("go ST")["input_ids"]))
    assert told == "go "
    assert writer.end() == "ST"
    assert writer.text == "go ST"


def test_nothing_follows_a_stop_text() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    writer = Detokenizer(tokenizer, ["\n"])
    for token in tokenizer("one\ntwo")["input_ids"]:
        writer.add(token)
    assert writer.stopped
    assert writer.end() == ""
    assert writer.text == "one"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["text", "broken", "special", "anything"])
def test_the_work_for_a_token_does_not_grow(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, draw, decoded = TOKENIZERS[name], random.Random(0), 0
    writer, decode = Detokenizer(tokenizer), type(tokenizer).decode

    def counted(self: Any, tokens: list[int], **options: Any) -> Any:
        nonlocal decoded
        decoded += len(tokens)
        return decode(self, tokens, **options)

    letter = tokenizer.convert_tokens_to_ids("a")
    broken = tokenizer("é")["input_ids"][0] if name == "byte-level" else tokenizer.convert_tokens_to_ids("\ufffd")
    one = {"text": letter, "broken": broken, "special": tokenizer.eos_token_id}.get(kind)
    monkeypatch.setattr(type(tokenizer), "decode", counted)
    for _ in range(600):
        writer.add(draw.randrange(len(tokenizer)) if one is None else one)
    assert decoded <= 600 * 48


PIECES = ["a", "b", "é", "日", " ", "<|im_end|>", "<|im_start|>", "<|mask|>"]
SPECIAL = [one for one in PIECES if one.startswith("<")]


def _ended(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    """By definition: the first place where a stop text is complete; the text before it, without special tokens."""
    seen = "".join(pieces)
    found = [end for end in range(len(seen) + 1) if any(seen[:end].endswith(one) for one in stop)]
    cut = min((seen.index(one) for one in stop if one in seen[: found[0]]), default=len(seen)) if found else len(seen)
    text, at = "", 0
    for piece in pieces:
        text += "" if piece in SPECIAL else piece[: max(cut - at, 0)]
        at += len(piece)
    return text, bool(found)


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=25),
    stop=st.lists(
        st.one_of(
            st.sampled_from(SPECIAL),
            st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join),
            st.sampled_from(["im_end", "|>a", "<|im_", "é<"]),
        ),
        max_size=3,
    ),
)
def test_the_text_of_a_special_token_is_a_stop_text_too(pieces: list[str], stop: list[str]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    text, stopped = _ended(pieces, stop)
    writer, told = Detokenizer(tokenizer, stop), ""
    for token in tokenizer("".join(pieces))["input_ids"]:
        if writer.stopped:
            break
        told += writer.add(token)
    told += writer.end()
    assert (told, writer.text, writer.stopped) == (text, text, stopped)


def test_a_stop_text_alone_is_no_list_of_letters() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    writer = Detokenizer(tokenizer, "END")
    told = "".join(map(writer.add, tokenizer("DEN EN END")["input_ids"]))
    assert (told, writer.stopped) == ("DEN EN ", True)


def test_special_tokens_of_sentencepiece_stop_it_after_bytes() -> None:
    tokenizer = TOKENIZERS["sentencepiece-like"]
    end = tokenizer.convert_tokens_to_ids("</s>")
    for stop in ("</s>", "é</s>"):
        writer = Detokenizer(tokenizer, [stop])
        told = "".join(map(writer.add, [*_tokens(tokenizer, [*"aé".encode()], 2), end]))
        assert (told, writer.stopped) == ("aé".removesuffix(stop.removesuffix("</s>")), True)
