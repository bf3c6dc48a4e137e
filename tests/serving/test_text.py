"""Text as it comes, joined, is the text of all tokens; stop texts never show."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gossamer.serving.text import Writer

WORDS = ["▁the", "▁a", "the", "x", "▁", "!", "▁é", "s"]


def bytewise() -> PreTrainedTokenizerFast:
    """A token for each byte, as byte-level BPE without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    one = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    one.pre_tokenizer, one.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    one.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=one)


def pieces() -> PreTrainedTokenizerFast:
    """Like sentencepiece: words with a mark for the space before them, and bytes for what is no word."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + at for at, word in enumerate(WORDS)}
    one = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    one.decoder = decoders.Sequence(steps)
    one.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=one)


TOKENIZERS = {"bytes": bytewise(), "pieces": pieces()}
texts = st.text(alphabet="ab é€😀\n", max_size=12)


def tokens_of(name: str, text: str) -> list[int]:
    if name == "bytes":
        return TOKENIZERS[name](text)["input_ids"]
    return [byte for letter in text for byte in letter.encode()]


def whole(name: str, tokens: list[int]) -> str:
    return TOKENIZERS[name].decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_joined_it_is_the_whole_text(name: str, data: st.DataObject) -> None:
    """Of any tokens: whole characters, broken ones, special tokens among them."""
    most = len(TOKENIZERS[name]) - 1
    least = 0 if name == "bytes" else 256  # a broken byte changes how bytes before it are written there
    tokens = tokens_of(name, data.draw(texts)) + data.draw(st.lists(st.integers(least, most), max_size=12))
    writer, said = Writer(TOKENIZERS[name]), ""
    for token in tokens:
        said += writer.add(token)
        assert writer.text == said
    said += writer.end()
    assert said == writer.text == whole(name, tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(texts)
def test_never_half_a_character(name: str, text: str) -> None:
    writer = Writer(TOKENIZERS[name])
    for token in tokens_of(name, text):
        assert "\ufffd" not in writer.add(token)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(texts, st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), min_size=1, max_size=3))
def test_stop_texts_end_it_and_do_not_show(name: str, text: str, stop: list[str]) -> None:
    tokens = tokens_of(name, text)
    full = whole(name, tokens)
    ends = [full.index(one) for one in stop if one in full]
    writer, said = Writer(TOKENIZERS[name], stop), ""
    for token in tokens:
        said += writer.add(token)
        if writer.stopped:
            break
    said += writer.end()
    assert writer.stopped == bool(ends)
    assert said == writer.text
    # of stop texts that end at different tokens, the one that is complete first is the one that ends it
    assert said == full if not ends else said in {full[:end] for end in ends}


def test_what_may_be_the_beginning_of_a_stop_text_is_held_back() -> None:
    writer = Writer(TOKENIZERS["bytes"], ("</end>",))
    said = [writer.add(token) for token in tokens_of("bytes", "a</en b</end> c")]
    assert said == ["a", "", "", "", "", "</en ", "b", *[""] * 8]
    assert (writer.stopped, writer.text, writer.end()) == (True, "a</en b", "")


def test_it_is_not_slower_at_the_end_of_a_long_text() -> None:
    """What is decoded at once does not grow with the text."""
    seen = []

    class Counting:
        def decode(self, tokens: list[int], **options: bool) -> str:
            seen.append(len(tokens))
            return TOKENIZERS["bytes"].decode(tokens, **options)

    writer = Writer(Counting())
    for token in tokens_of("bytes", "a" * 500):
        writer.add(token)
    assert max(seen) <= 2
