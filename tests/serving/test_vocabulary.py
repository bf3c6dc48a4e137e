"""Only tokens are drawn, whatever rows a head has; ids that are none are refused; a text is one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import gossamer as gs
from gossamer.errors import UsageError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving.engine import Engine
from gossamer.serving.sampling import Sampling
from gossamer.serving.sequence import Sequence
from gossamer.serving.vocabulary import Vocabulary, encoded, vocabulary_of


def with_holes() -> Any:
    """Ids 0 to 9, 20 to 29, and an added one."""
    words = {f"w{token}": token for token in (*range(10), *range(20, 30))} | {"[UNK]": 30}
    inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="w0")
    tokenizer.add_tokens(["<call>"])
    return tokenizer


def lopsided(kind: str, wanted: set[int], rows: int = 64) -> Any:
    """A model that likes the rows beside its tokens best."""
    model = tiny(kind, vocab_size=rows, tie_word_embeddings=False, eos_token_id=0, pad_token_id=0, bos_token_id=0)
    with torch.no_grad():
        head = model.get_output_embeddings()
        for row in range(rows):
            if row not in wanted:
                head.weight[row] = 30 * head.weight[row] + head.weight[row - row % 7]
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    """With steps of our own, and through the model's own forward."""
    tokenizer = with_holes()
    with Engine((lopsided(request.param, {*tokenizer.get_vocab().values()}), tokenizer)) as made:
        yield made


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "warm": {"temperature": 1.0},
    "hot": {"temperature": 50.0},
    "top_k": {"temperature": 2.0, "top_k": 40},
    "top_p": {"temperature": 2.0, "top_p": 0.9, "min_p": 0.001},
    "penalties": {"temperature": 1.0, "presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 2.0},
    "tops": {"top_logprobs": 20},
    "biased": {"logit_bias": {3: -100.0, 4: 5.0}},
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_only_tokens_are_drawn(engine: Any, name: str) -> None:
    known = {*engine.tokenizer.get_vocab().values()}
    sampling = [Sampling(max_tokens=12, ignore_eos=True, **SAMPLINGS[name] | {"seed": seed}) for seed in range(6)]
    sequences = [engine.submit(Sequence((1, 2 + seed), {}, one)) for seed, one in enumerate(sampling)]
    while engine.busy:
        engine.step()
    for sequence in sequences:
        assert sequence.reply is not None
        assert {*sequence.reply.tokens} <= known
        told = [token for top in sequence.reply.tops for token, _ in top]
        assert {*told} <= known
        assert len(told) == (20 * 12 if name == "tops" else 0)


def test_what_is_told_is_the_models_own_probability(engine: Any) -> None:
    (reply,) = engine.generate("w1 w2", max_tokens=1, ignore_eos=True)
    (other,) = engine.generate("w1 w2", max_tokens=1, ignore_eos=True, top_logprobs=3)
    with torch.no_grad():
        own = engine.model(torch.tensor([[1, 2]]), use_cache=False).logits[0, -1].log_softmax(0)
    assert reply.logprobs[0] == pytest.approx(own[reply.tokens[0]].item(), abs=1e-4)
    assert [value for _, value in other.tops[0]] == pytest.approx(
        [own[one].item() for one, _ in other.tops[0]], abs=1e-4
    )


@pytest.mark.parametrize("temperature", [0.0, 20.0])
def test_so_it_is_one_prompt_at_a_time(engine: Any, temperature: float) -> None:
    seen = list[int]()
    engine.model.get_input_embeddings().register_forward_hook(
        lambda _, args, out: seen.extend(args[0].flatten().tolist())
    )
    gs.generate(engine.model, engine.tokenizer, ["w1 w2"] * 4, max_tokens=20, temperature=temperature)
    assert {*seen} <= {*engine.tokenizer.get_vocab().values()}


def test_schemas_are_followed_in_tokens_alone() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :] *= 100
    with Engine((model, tokenizer)) as engine:
        (reply,) = engine.generate("x", max_tokens=60, schema='{"enum": ["yes", "no"]}')
    assert reply.text in ('"yes"', '"no"')


def test_rows_of_a_head() -> None:
    tokenizer = tiny_tokenizer()
    for rows, width in ((320, 260), (260, 260), (100, 100)):
        assert Vocabulary(tokenizer, rows).width == width
        assert not len(Vocabulary(tokenizer, rows).holes)
    holes = Vocabulary(with_holes(), 64, [40])
    assert holes.width == 41
    assert holes.holes.tolist() == [*range(10, 20), *range(32, 40)]
    logits = torch.zeros(2, 64)
    assert torch.isinf(holes.drawable(logits)).sum() == 2 * 18
    assert not torch.isinf(logits).any()


def test_a_token_that_was_added_later_is_one() -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    assert 260 not in vocabulary_of(model, tokenizer)
    tokenizer.add_tokens(["<call>"])
    assert 260 in vocabulary_of(model, tokenizer)


@pytest.mark.parametrize("token", [10, 19, 32, 63, 64, 191222])
def test_ids_that_are_no_tokens_are_refused(engine: Any, token: int) -> None:
    for request, where in (
        (Sequence((1, token), {}), "prompt"),
        (Sequence((1,), {}, Sampling(logit_bias={token: 100.0})), "logit_bias"),
    ):
        with pytest.raises(UsageError) as caught:
            engine.submit(request)
        assert (caught.value.where, caught.value.got) == (where, str(token))
        assert "0 to 31" in caught.value.expected
    assert not engine.busy


class _Letters:
    """Iterates, but is no list of prompts."""

    def __iter__(self) -> Iterator[int]:
        return iter([1])


@pytest.mark.parametrize("through", ["engine", "generate"])
def test_a_text_is_one_prompt(engine: Any, through: str) -> None:
    def texts(prompts: Any) -> list[str]:
        if through == "engine":
            return [one.text for one in engine.generate(prompts, max_tokens=3, ignore_eos=True)]
        made = gs.generate(engine.model, engine.tokenizer, prompts, max_tokens=3)
        return [str(one["text"]) for one in made]

    [alone] = texts("w1 w2 w3")
    assert texts(["w1 w2 w3"] * 2) == [alone] * 2
    assert texts(("w1 w2 w3",)) == texts(one for one in ["w1 w2 w3"]) == [alone]
    assert texts([]) == []
    for wrong in (b"w1", [b"w1"], None, 5, [None], [[1, 2]], {"prompt": "w1"}, [{"role": "user"}], _Letters()):
        with pytest.raises(UsageError) as caught:
            texts(wrong)
        assert caught.value.where == "prompts[0]"


def test_a_stop_text_alone_is_one() -> None:
    assert Sampling(stop="END").stop == ("END",)  # pyright: ignore[reportArgumentType]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # pyright: ignore[reportArgumentType]


def test_a_mix_is_for_all_prompts(engine: Any) -> None:
    with pytest.raises(UsageError) as caught:
        [*engine.generate(["w1", "w2"], {"one": 0.5, "two": 0.5}, max_tokens=1)]
    assert "no adapter" in str(caught.value)  # not: one of them for each prompt


def beginning(added: int = 1) -> Any:
    """With so many beginnings of a sequence before a text."""
    tokenizer = tiny_tokenizer()
    single = "<|im_start|> " * added + "$A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<|im_start|>", 257)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("text", "special", "ids"),
    [
        ("hi", True, [257, 104, 105]),
        ("<|im_start|>hi", True, [257, 104, 105]),
        ("<|im_start|>hi", False, [257, 104, 105]),
        ("<|im_start|><|im_start|>hi", False, [257, 257, 104, 105]),
        ("<|im_start|><|im_start|>hi", True, [257, 257, 104, 105]),
        (" <|im_start|>hi", True, [257, 32, 257, 104, 105]),
        ("", True, [257]),
    ],
)
def test_a_text_that_begins_a_sequence_does_so_once(text: str, special: bool, ids: list[int]) -> None:
    tokenizer = beginning()
    plain = tiny_tokenizer()
    expected = [one if one > 255 else plain(chr(one))["input_ids"][0] for one in ids]
    assert [*encoded(tokenizer, text, special)] == expected


def test_so_it_does_wherever_texts_are_continued() -> None:
    tokenizer = beginning()
    model, seen = tiny("llama"), list[list[int]]()
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].flatten().tolist()))
    gs.generate(model, tokenizer, "<|im_start|>hi", max_tokens=1)
    gs.generate(model, tokenizer, "hi", max_tokens=1, chat=True)
    assert [one[:3].count(257) for one in seen] == [1, 1]
    with Engine((tiny("llama"), tokenizer)) as engine:
        submitted = list[Sequence]()
        submit = engine.submit
        engine.submit = lambda request: (submitted.append(request), submit(request))[1]
        [*engine.generate("<|im_start|>hi", max_tokens=1)]
    assert submitted[0].prompt[:2].count(257) == 1
