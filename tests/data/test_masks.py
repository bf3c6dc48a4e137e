"""Masks are right for every tokenizer and template, or the row is refused: there is no third way."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from gossamer.data import masks
from gossamer.data.masks import Encoding, Example, encode, label_ids, preview
from gossamer.data.rows import Chat, Completion, Instruction, Row, Text, Turn
from gossamer.errors import DataError
from gossamer.models import tiny_tokenizer
from tests.data.dialects import (
    DIALECTS,
    FORGETS_THOUGHTS,
    LAST_TURN_ONLY,
    NO_END,
    SHOUTS,
    TOY,
    byte_level,
    chat,
    composing,
    llama_2,
)


def spans(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What each supervised run says, in its place."""
    return [text for text, supervised in preview(example, tokenizer) if supervised]


def refusal(row: Row, tokenizer: PreTrainedTokenizerFast) -> str:
    with pytest.raises(DataError) as caught:
        encode([row], tokenizer)
    return str(caught.value)


# Completions and plain text ---------------------------------------------------------------------------------------


def test_a_completion_is_learned_with_its_eos_and_the_prompt_is_not():
    (example,) = encode([Completion("f:1", prompt="1 + 2 =", completion=" 3")], TOY)
    assert preview(example, TOY) == [("1 + 2 =", False), (" 3<|im_end|>", True)]
    assert example.ids[: example.prompt_length] == TOY("1 + 2 =")["input_ids"]
    assert example.ids[-1] == TOY.eos_token_id


def test_without_eos_only_the_label_is_learned():
    (example,) = encode([Completion("f:1", prompt="Grade:", completion=" good")], TOY, add_eos=False)
    assert spans(example, TOY) == [" good"]


def test_the_eos_is_learned_even_where_it_is_the_pad_token():
    tokenizer = byte_level(None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (example,) = encode([Completion("f:1", prompt="a", completion="b")], tokenizer)
    assert example.supervised == [False, True, True]


def test_text_is_learned_whole_but_for_the_bos():
    (example,) = encode([Text("f:1", text="go home")], llama_2())
    assert example.ids[0] == 1
    assert example.supervised == [False] + [True] * (len(example) - 1)
    assert example.ids[-1] == 2


def test_the_prompt_is_tokenised_as_it_is_when_the_model_answers():
    """BOS included, although the pieces are tokenised apart."""
    tokenizer = llama_2()
    (example,) = encode([Completion("f:1", prompt="grade:", completion=" good")], tokenizer)
    assert example.ids[: example.prompt_length] == tokenizer("grade:")["input_ids"]
    assert spans(example, tokenizer) == [" good</s>"]


def test_a_token_across_the_cut_is_refused():
    """`grade: ` + `good` is one token `▁g` at the cut, and half a token cannot be learned."""
    assert "expected 'good</s>'" in refusal(Completion("f:1", prompt="grade: ", completion="good"), llama_2())


def test_a_tokenizer_that_composes_accents_is_no_lie():
    (example,) = encode([Completion("f:1", prompt="cafe\u0301?", completion=" cafe\u0301!")], composing())
    assert spans(example, composing()) == [" caf\u00e9!</s>"]


def test_a_tokenizer_that_loses_text_is_refused():
    tokenizer = composing()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "decode to ' yes</s>', expected ' Yes</s>'" in refusal(
        Completion("f:7", prompt="a", completion=" Yes"), tokenizer
    )


def test_an_end_token_inside_the_text_is_refused():
    assert "holds the end token" in refusal(Completion("f:1", prompt="a", completion="b<|im_end|>c"), TOY)
    assert "holds the end-of-turn token" in refusal(chat("a", "b<|im_end|>c"), TOY)


def test_no_eos_token_is_said_at_once():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        encode([Text("f:1", text="a")], tokenizer)


# Chats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_assistant_turn_is_learned_with_its_end_and_nothing_else(dialect: str):
    tokenizer, end = DIALECTS[dialect]
    row = chat("go on", "yes", "more", "no thanks")
    (example,) = encode([row], tokenizer)
    assert [span.replace(" ", "") for span in spans(example, tokenizer)] == [f"yes{end}", f"nothanks{end}"]
    assert example.ids[: example.prompt_length] == rendered(row, 1, tokenizer)


def rendered(row: Row, count: int, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids a model is given before it answers turn `count`."""
    messages = [{"role": turn.role, "content": turn.text} for turn in row.turns[:count]]
    head = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(str(head), add_special_tokens=False)["input_ids"]


def test_headers_and_default_system_prompts_belong_to_the_prompt():
    tokenizer, _ = DIALECTS["chatml"]
    (example,) = encode([chat("Hi", "Hello")], tokenizer)
    assert preview(example, tokenizer) == [
        ("<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello<|im_end|>", True),
    ]


def test_turns_without_weight_and_turns_after_the_last_learned_one():
    turns = (*chat("a", "b", "c", "d", "e").turns[:3], Turn("assistant", "d", True), Turn("user", "e", False))
    off = turns[1]._replace(supervised=False)
    (example,) = encode([Chat("f:1", turns=(turns[0], off, *turns[2:]))], TOY)
    assert spans(example, TOY) == ["d<|im_end|>"]
    assert "e<|im_end|>" not in TOY.decode(example.ids)


def test_two_assistant_turns_in_a_row():
    row = Chat("f:1", turns=(Turn("user", "a", False), Turn("assistant", "b", True), Turn("assistant", "c", True)))
    (example,) = encode([row], TOY)
    assert spans(example, TOY) == ["b<|im_end|>", "c<|im_end|>"]


def test_an_answer_that_looks_like_its_header():
    (example,) = encode([chat("assistant", "assistant", "user", "\nassistant\n")], TOY)
    assert spans(example, TOY) == ["assistant<|im_end|>", "\nassistant\n<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (FORGETS_THOUGHTS, "turn 2: the chat template rewrites the assistant's text"),
        (LAST_TURN_ONLY, "turn 2: the chat template rewrites the turns before it"),
        (SHOUTS, "expected 'hm</think>yes', got 'HM</THINK>YES<|im_end|>"),
        (NO_END, "turn 2: no end-of-turn token follows"),
        ("{{ messages[0]['content'] + 1 }}", "the chat template refuses the first 4 turns"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses the first 4 turns"),
        ("{% macro deep() %}{{ deep() }}{% endmacro %}{{ deep() }}", "the chat template refuses the first 4 turns"),
        ("{% for", "the chat template refuses the first 4 turns"),
    ],
)
def test_templates_that_cannot_be_proven_are_refused(template: str, reason: str):
    shown = refusal(chat("a", "hm</think>yes", "b", "hm</think>no"), byte_level(template))
    assert reason in shown
    assert "chat.jsonl:1: " in shown


def test_a_rewriting_template_is_fine_where_the_rewritten_turn_is_not_learned():
    first, answer, *rest = chat("a", "hm</think>yes", "b", "hm</think>no").turns
    tokenizer = byte_level(FORGETS_THOUGHTS)
    (example,) = encode([Chat("f:1", turns=(first, answer._replace(supervised=False), *rest))], tokenizer)
    assert spans(example, tokenizer) == ["hm</think>no<|im_end|>"]


def test_a_chat_without_a_template_is_refused_with_a_hint():
    shown = refusal(chat("a", "b"), byte_level(None))
    assert "no chat template" in shown
    assert "tokenizer of a chat model" in shown


def test_alpaca_uses_the_chat_template_if_there_is_one_and_it_may():
    row = Instruction("f:1", chat("Add 1 2", "3"), Completion("f:1", "### Instruction:\nAdd", "3"))
    assert "<|im_start|>user\nAdd 1 2" in TOY.decode(encode([row], TOY)[0].ids)
    assert TOY.decode(encode([row], TOY, chat_template=False)[0].ids) == "### Instruction:\nAdd3<|im_end|>"
    assert TOY.decode(encode([row], byte_level(None))[0].ids) == "### Instruction:\nAdd3<|im_end|>"


# The property -----------------------------------------------------------------------------------------------------

SPECIAL = "<|"  # text that spells a special token is refused, and has its own test
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40).filter(
    lambda text: text.strip() and SPECIAL not in text and "<s>" not in text and "</s>" not in text
)


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_supervised_tokens_say_the_assistants_text_and_its_end(dialect: str, texts: list[str]):
    tokenizer, end = DIALECTS[dialect]
    (example,) = encode([chat(*texts)], tokenizer, max_length=10_000)
    said = [span.removesuffix(end) for span in spans(example, tokenizer)]
    assert [span.strip() for span in said] == [text.strip() for text in texts[1::2]]
    assert sum(example.ids[at] == tokenizer.convert_tokens_to_ids(end) for at in learned(example)) == len(texts) // 2
    if dialect == "chatml":  # this template keeps white space, so not even that may change
        assert said == texts[1::2]


@settings(max_examples=150, deadline=None)
@given(prompt=TEXTS, completion=TEXTS)
def test_supervised_tokens_say_the_completion_and_eos(prompt: str, completion: str):
    (example,) = encode([Completion("f:1", prompt=prompt, completion=completion)], TOY)
    assert TOY.decode([example.ids[at] for at in learned(example)]) == f"{completion}{TOY.eos_token}"
    assert TOY.decode(example.ids[: example.prompt_length]) == prompt


@settings(max_examples=150, deadline=None)
@given(prompt=TEXTS, completion=TEXTS)
def test_under_sentencepiece_a_row_is_right_or_refused(prompt: str, completion: str):
    tokenizer = DIALECTS["llama 2 with sentencepiece"][0]
    try:
        (example,) = encode([Completion("f:1", prompt=prompt, completion=completion)], tokenizer)
    except DataError:
        return
    assert spans(example, tokenizer) == [completion + "</s>"]


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_proof_notices_a_mask_that_is_off_by_one(shift: int, monkeypatch: pytest.MonkeyPatch):
    """Both ways to tokenise are made to cut one token too early or too late."""

    def shifted(cut):
        def cut_elsewhere(written, tokenizer):
            rows = ([token for piece in row for token in piece] for row in cut(written, tokenizer))
            return [[ids[: (at := len(ids) - 3 + shift)], ids[at:]] for ids in rows]

        return cut_elsewhere

    row = Completion("f:1", prompt="good", completion="no")
    assert encode([row], TOY)[0].prompt_length == len(encode([row], TOY)[0]) - 3
    monkeypatch.setattr(masks, "_apart", shifted(masks._apart))
    monkeypatch.setattr(masks, "_at_once", shifted(masks._at_once))
    assert "f:1: the supervised tokens decode to" in refusal(row, TOY)


def learned(example: Example) -> list[int]:
    return [at for at, supervised in enumerate(example.supervised) if supervised]


# Length -----------------------------------------------------------------------------------------------------------


def completions(*lengths: tuple[int, int]) -> list[Row]:
    return [Completion(f"f:{n}", prompt="p" * a, completion="c" * b) for n, (a, b) in enumerate(lengths, start=1)]


def test_overlong_rows_are_an_error_by_default_all_of_them():
    with pytest.raises(DataError) as caught:
        encode(completions((3, 3), (90, 20), (5, 5), (200, 1)), TOY, max_length=100)
    assert "f:2: 111 tokens, 21 of them supervised, but max_length is 100" in str(caught.value)
    assert "f:4: 202 tokens" in str(caught.value)


def test_overlong_rows_can_be_dropped_and_are_counted():
    encoding = encode(completions((3, 3), (90, 20), (5, 5)), TOY, max_length=100, on_overlong="drop")
    assert [example.where for example in encoding] == ["f:1", "f:3"]
    assert encoding.dropped == ("f:2",)
    assert encoding.describe() == "2 examples, 18 tokens, 10 of them supervised (55.6%); 1 longer than 100 dropped"


def test_truncation_takes_from_the_left_of_the_prompt_after_the_bos():
    tokenizer = llama_2()
    row = Completion("f:1", prompt="abcdefg:", completion=" yes")
    (whole,) = encode([row], tokenizer)
    encoding = encode([row], tokenizer, max_length=10, on_overlong="truncate")
    (example,) = encoding
    assert example.ids == [1, *whole.ids[-9:]]
    assert spans(example, tokenizer) == [" yes</s>"]
    assert encoding.truncated == ("f:1",)


def test_truncation_never_cuts_an_answer():
    with pytest.raises(DataError, match="f:1: 112 tokens, 101 of them supervised"):
        encode(completions((11, 100)), TOY, max_length=100, on_overlong="truncate")


def test_truncation_cuts_plain_text_at_its_end():
    (example,) = encode([Text("f:1", text="abcdef")], TOY, max_length=4, on_overlong="truncate")
    assert TOY.decode(example.ids) == "abcd"
    assert all(example.supervised)


def test_a_set_in_which_everything_is_dropped_is_refused():
    with pytest.raises(DataError, match="every one of the 2 rows"):
        encode(completions((90, 20), (90, 30)), TOY, max_length=100, on_overlong="drop")


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        encode([], TOY)


def test_a_row_that_teaches_nothing_is_named():
    with pytest.raises(DataError, match="f:1: no supervised token"):
        encode([Text("f:1", text="a")], TOY, add_eos=False)  # one token, and none before it to predict it from


# Labels, preview, speed -------------------------------------------------------------------------------------------


def test_label_ids_are_what_training_saw():
    rows = [Completion("f:1", prompt="good pie. grade:", completion=label) for label in (" good", " bad")]
    for tokenizer in (TOY, llama_2()):
        ids = label_ids((" good", " bad"), tokenizer, rows[0])
        for row, label in zip(rows, ids, strict=True):
            (example,) = encode([row], tokenizer, add_eos=False)
            assert tuple(example.ids[example.prompt_length :]) == label


def test_label_ids_of_a_chat_are_its_last_turn():
    good, bad = label_ids(("good", "bad"), TOY, chat("a", "b", "c", "good"))
    assert TOY.decode(list(good)) == "good<|im_end|>"
    assert TOY.decode(list(bad)) == "bad<|im_end|>"


def test_labels_with_the_same_tokens_are_refused():
    with pytest.raises(DataError, match="same tokens"):
        label_ids((" caf\u00e9", " cafe\u0301"), composing(), Completion("f:1", prompt="a", completion="b"))


def test_text_has_no_label():
    with pytest.raises(DataError, match="no label"):
        label_ids(("a", "b"), TOY, Text("f:1", text="a"))


def test_preview_is_the_whole_text():
    for tokenizer, _ in DIALECTS.values():
        (example,) = encode([chat("go on", "yes é", "more", "no")], tokenizer)
        shown = preview(example, tokenizer)
        assert "".join(text for text, _ in shown) == tokenizer.decode(example.ids)
        assert [supervised for _, supervised in shown] == [False, True, False, True]


def test_an_encoding_is_a_sequence():
    encoding = encode(completions((3, 3), (4, 2)), TOY)
    assert isinstance(encoding, Encoding)
    assert len(encoding) == len(encoding[:2]) == 2
    assert encoding[1].where == "f:2"
    assert (encoding.tokens, encoding.supervised) == (14, 7)


def test_three_thousand_chats_take_about_a_second():
    rows = [chat("How is the camera? " * 5, f"It is number {n}.", where=f"f:{n}") for n in range(3000)]
    start = time.process_time()
    assert len(encode(rows, TOY)) == 3000
    assert time.process_time() - start < 6  # CPU time of all threads, with room for a slow and busy machine
