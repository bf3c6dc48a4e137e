"""The texts of tokens are what they add to the text; their bytes are its bytes; no two likely ones have one name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from gossamer.models import tiny_tokenizer
from gossamer.serving.api.builders import ChatBuilder, ResponseBuilder, TextBuilder
from gossamer.serving.detokenizer import Detokenizer, Spelling
from gossamer.serving.sequence import Reply

WORDS = ["true", "false", "the", "cat", "é", "日本"]


def sentencepiece_like(strips: bool = True) -> Any:
    """Words with and without `▁`, single bytes for the rest; with or without the first space taken away."""
    letters = {"▁", *"".join(WORDS)}
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(letters)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for word in [f"▁{one}" for one in WORDS] + WORDS:
        made = word[0]
        for letter in word[1:]:
            if made + letter not in vocabulary:
                merges.append((made, letter))
                vocabulary[made + letter] = len(vocabulary)
            made += letter
    inner = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strips else [])])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    made.add_tokens(["<call>"])
    return made


def merged() -> Any:
    """Byte-level, with a token that is a space and half a character, and one that is three bytes of four."""
    symbols = {one: number for number, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ġ", "Ã"), ("Ã", "©"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ġ", "a"), ("Ġa", "b")]
    for one, other in merges:
        symbols[one + other] = len(symbols)
    inner = Tokenizer(BPE(vocab=symbols, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", clean_up_tokenization_spaces=False)


def wordpiece() -> Any:
    letters = [*"abcdeé"]
    pieces = ["[UNK]", "[SEP]", *letters, *(f"##{one}" for one in letters), "ab", "##cd", "cab"]
    inner = Tokenizer(WordPiece({one: number for number, one in enumerate(pieces)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", eos_token="[SEP]", clean_up_tokenization_spaces=False
    )


TOKENIZERS = {
    "bytes": tiny_tokenizer(),
    "merged": merged(),
    "sentencepiece": sentencepiece_like(),
    "sentencepiece, first space kept": sentencepiece_like(strips=False),
    "wordpiece": wordpiece(),
}
TEXTS = st.lists(st.sampled_from([" ", " ab", "é", "😀", "日本", "the cat", " true", "true", "\n", "\ufffd", "cab"]))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(parts=TEXTS | st.lists(st.characters(exclude_categories=["Cs"])), data=st.data())
def test_joined_they_are_the_text(name: str, parts: list[str], data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
    writer = Detokenizer(tokenizer)
    text = "".join(map(writer.add, tokens)) + writer.end()
    spelling, spelled = Spelling(tokenizer), []
    for token in tokens:
        others = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=3))
        one, listed = spelling.add(token, [token, *others])
        spelled.append(one)
        assert len(listed) == 1 + len(others)
        assert listed[0].raw == one.raw
    if spelled:
        spelling.end(spelled[-1])
    shown = [one for one, token in zip(spelled, tokens, strict=True) if token not in writer.special]
    assert "".join(one.text for one in shown) == text
    assert b"".join(one.raw or b"" for one in shown) == text.encode()
    at = 0
    for one in shown:
        assert one.offset == at
        at += len(one.text)


@pytest.mark.parametrize("name", ["bytes", "merged"])
@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 255), max_size=30))
def test_so_they_are_where_bytes_are_no_text(name: str, tokens: list[int]) -> None:
    tokenizer, writer = TOKENIZERS[name], Detokenizer(TOKENIZERS[name])
    text = "".join(map(writer.add, tokens)) + writer.end()
    spelling = Spelling(tokenizer)
    spelled = [spelling.add(token)[0] for token in tokens]
    if spelled:
        spelling.end(spelled[-1])
    assert "".join(one.text for one in spelled) == text
    assert b"".join(one.raw or b"" for one in spelled).decode(errors="replace") == text


def builder(tokenizer: Any, chat: bool) -> ResponseBuilder:
    return (ChatBuilder if chat else TextBuilder)("toy", {}, tokenizer, True)


USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("chat", [True, False])
def test_no_likely_token_takes_the_place_of_another(name: str, chat: bool) -> None:
    tokenizer = TOKENIZERS[name]
    count = len(tokenizer)
    for first in (0, 1):
        tops = (tuple((token, -0.01 * token) for token in range(count)),) * (1 + first)
        answer = Reply("", (count // 2,) * (1 + first), (-1.0,) * (1 + first), {}, "length", tuple(tops))
        whole = json.loads(builder(tokenizer, chat).whole([answer], USAGE, {}).json_bytes)
        told: Any = whole["choices"][0]["logprobs"]
        if chat:
            names = [(one["token"], bytes(one["bytes"] or b"")) for one in told["content"][-1]["top_logprobs"]]
            assert len(names) == count
        else:
            assert len(told["top_logprobs"][-1]) == count
            assert sorted(told["top_logprobs"][-1].values(), reverse=True) == [value for _, value in tops[0]]


def test_halves_of_characters_have_bytes() -> None:
    tokenizer = TOKENIZERS["merged"]
    half = tokenizer.convert_tokens_to_ids("ĠÃ")
    _, [label, end] = Spelling(tokenizer).add(tokenizer.convert_tokens_to_ids("Ġa"), [half, tokenizer.eos_token_id])
    assert (label.text, label.raw) == (r"bytes:\x20\xc3", b" \xc3")
    assert (end.text, end.raw) == ("<|end|>", None)


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_the_whole_in_pieces_and_ends_without_text(chat: bool) -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    tokens = [*tokenizer("true é😀 the")["input_ids"], tokenizer.eos_token_id]
    writer, pieces, made = Detokenizer(tokenizer), list[dict[str, Any]](), builder(tokenizer, chat)
    for number, token in enumerate(tokens):
        last = number == len(tokens) - 1
        text = writer.add(token) + (writer.end() if last else "")
        reply = Reply(text, (token,), (-1.0,), {}, "stop" if last else None, (((token, -1.0),),))
        pieces += [json.loads(one.json_bytes)["choices"][0] for one in made.chunks(0, reply)]
    ends = [one for one in pieces if one["finish_reason"]]
    assert ends == pieces[-1:]
    assert not (ends[0]["delta"]["content"] if chat else ends[0]["text"])
    texts = [one["delta"]["content"] if chat else one["text"] for one in pieces]
    assert "".join(texts) == writer.text == "true é😀 the"
    entries = [one for piece in pieces for one in (piece["logprobs"]["content" if chat else "tokens"])]
    assert "".join(one["token"] if chat else one for one in entries) == writer.text + "</s>"
