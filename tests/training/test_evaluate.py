"""Evaluation: exact likelihoods, whatever the batches, and a model that is left as it was."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gossamer.data.formats import read_rows
from gossamer.errors import DataError, NonFiniteError, UsageError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.training import evaluate
from gossamer.training.loss import refuse_unless_causal
from tests.training.toy_run import write_rows

CHAT = [[{"role": "user", "content": f"n{'!' * n}"}, {"role": "assistant", "content": "yn"[n % 2]}] for n in range(5)]


def log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    """ln p(answer | prompt), one token after the other, in float64."""
    ids = tokenizer(prompt)["input_ids"]
    total = 0.0
    for token in tokenizer(answer)["input_ids"]:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += logits.log_softmax(0)[token].item()
        ids = [*ids, token]
    return total


@pytest.fixture
def model():
    return tiny("llama").double()


def test_perplexity_is_the_mean_over_tokens(model, tmp_path: Path) -> None:
    path, tokenizer = write_rows(tmp_path / "rows.jsonl", 7, [" a", " longer"]), tiny_tokenizer()
    result = evaluate(model, tokenizer, path, batch_size=3)
    rows = read_rows(path)
    total = -sum(log_likelihood(model, tokenizer, row.prompt, row.completion + "<|im_end|>") for row in rows)
    tokens = sum(len(row.completion) + 1 for row in rows)
    assert result == {"task": "sft", "rows": 7, "tokens": tokens, "loss": pytest.approx(total / tokens, rel=1e-6),
                      "perplexity": pytest.approx(math.exp(total / tokens), rel=1e-6)}  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "ending"),
    [
        (["a", "b", "c"], ""),  # one token each: the head at one position
        ([" bad", " good", " neutral"], ""),  # several tokens, none begins another
        ([" good", " good indeed", " goo"], "<|im_end|>"),  # the end is part of the answer
    ],
)
def test_accuracy_is_the_argmax_of_exact_likelihoods(model, tmp_path: Path, labels: list[str], ending: str) -> None:
    path, tokenizer = write_rows(tmp_path / "rows.jsonl", 9, labels), tiny_tokenizer()
    rows, names = read_rows(path), sorted(labels)
    scores = [[log_likelihood(model, tokenizer, row.prompt, name + ending) for name in names] for row in rows]
    predicted = [names[max(range(3), key=row.__getitem__)] for row in scores]
    for batch_size in (1, 4):
        result = evaluate(model, tokenizer, path, task="classify", batch_size=batch_size)
        assert result["labels"] == names
        assert [one["predicted"] for one in result["predictions"]] == predicted
        assert result["accuracy"] == sum(row.label == name for row, name in zip(rows, predicted, strict=True)) / 9
        assert sum(map(sum, result["confusion"])) == 9
        for one in result["predictions"]:
            assert result["confusion"][names.index(one["label"])][names.index(one["predicted"])] > 0
        right = sum(row[names.index(one.label)] for row, one in zip(scores, rows, strict=True)) / 9
        assert result["loss"] == pytest.approx(-right, rel=1e-6)


def test_chats_are_classified_by_their_last_turn(model, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "chat.jsonl", tiny_tokenizer()
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in CHAT))
    result = evaluate(model, tokenizer, path, task="classify")
    for turns, one in zip(CHAT, result["predictions"], strict=True):
        prompt = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
        assert one["predicted"] == max("ny", key=lambda label: log_likelihood(model, tokenizer, prompt, label))


def test_one_forward_a_batch_of_prompts_when_labels_are_one_token(model, tmp_path: Path) -> None:
    path, calls, ticks = write_rows(tmp_path / "rows.jsonl", 10, ["a", "b"]), [], []
    refuse_unless_causal(model)  # what it reads is tried once a model, with a forward of its own
    model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
    evaluate(model, tiny_tokenizer(), path, task="classify", batch_size=4, tick=lambda: ticks.append(1))
    assert calls == [4, 4, 2]
    assert len(ticks) == 3


def test_the_model_and_the_random_state_are_left_as_they_were(model, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 4)
    model.train()
    model.model.layers[0].eval()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    evaluate(model, tiny_tokenizer(), path)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tiny_tokenizer(), path, tick=_interrupt)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_batch_size_changes_nothing(model, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 11)
    losses = [evaluate(model, tiny_tokenizer(), path, batch_size=size)["loss"] for size in (1, 2, 11)]
    assert all(abs(one - other) < 1e-9 for one, other in pairwise(losses))


def test_refusals(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokenizer = write_rows(tmp_path / "rows.jsonl", 6), tiny_tokenizer()
    with pytest.raises(UsageError, match="did you mean 'classify'"):
        evaluate(model, tokenizer, path, task="clasify")
    with pytest.raises(UsageError, match="only the task classify"):
        evaluate(model, tokenizer, path, labels=["a"])
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        evaluate(model, tokenizer, path, task="classify", labels=[" bad", " good"])
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="gossamer fetch reviews"):
        evaluate(model, tokenizer, "reviews/eval.jsonl")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"rows\.jsonl"):
        evaluate(model, tokenizer, path)
