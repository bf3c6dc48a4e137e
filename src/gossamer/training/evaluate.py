"""How good is a model on held-out rows: perplexity of the answers, or accuracy over a set of labels.

    sft        loss = mean over supervised tokens of -ln p(token), perplexity = exp(loss)
    classify   prediction = argmax over labels of ln p(label | prompt), exactly: no sampling, no parsing of text

A label counts with its end token only where one label's tokens begin another's; otherwise the end adds nothing that
tells them apart. When every label is one token, a row costs one forward with the head at one position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.catalog.catalog import data_file
from gossamer.data import rows as data_rows
from gossamer.data.batches import Batch, collate, plan_batches
from gossamer.data.formats import Rows, read_rows
from gossamer.data.masks import Example, Overlong, encode, label_ids
from gossamer.data.rows import Row
from gossamer.errors import DataError, NonFiniteError, UsageError, nearest
from gossamer.training.audit import refuse_misfits
from gossamer.training.loss import supervised_logits, supervised_nll

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tick = Callable[[], None]
"""Called after each batch; it may raise to stop an evaluation."""
Encoded = tuple[int, ...]


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Rows | Sequence[Row],
    *,
    task: str = "sft",
    batch_size: int = 16,
    labels: Sequence[str] | None = None,
    max_length: int = 1024,
    overlong: Overlong = "error",
    format: str | None = None,
    chat_template: bool = True,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Evaluate a model as it stands, adapters and all, without changing it or torch's random state.

    Args:
        model: a causal language model.
        data: a data file, also of a catalog entry (`reviews/eval.jsonl`), or rows that were read from one.
        task: "sft" or "classify".
        batch_size: sequences that go through the model at once.
        labels: what a classifier chooses from; the labels in the data when None.
        max_length, overlong, format, chat_template: as in `TrainConfig`.
        tick: called after each batch.

    Returns:
        sft: {"task", "rows", "loss" (nats a token), "perplexity", "tokens"}.
        classify: {"task", "rows", "accuracy", "loss" (nats a right label), "labels", "confusion" (rows true, columns
        predicted), "predictions" [{"where", "label", "predicted"}]}.

    Raises: DataError for rows or labels that cannot be used; UnsupportedError for a model that is not causal;
        NonFiniteError when the model's output is NaN or infinite.
    """
    rows = read_data(data, format) if isinstance(data, str | Path) else data
    options = {"max_length": max_length, "on_overlong": overlong, "chat_template": chat_template}
    return make_evaluation(rows, tokenizer, task=task, batch_size=batch_size, labels=labels, **options)(model, tick)


def read_data(path: str | Path, format: str | None = None) -> Rows:
    """Read a data file, or one of a fetched catalog entry: `reviews/train.jsonl`. Raises `DataError`."""
    return read_rows(data_file(path), format=format)


def answer_batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path,
    *,
    batch_size: int = 8,
    **encoding: Any,
) -> list[Batch]:
    """The rows of a data file as batches for `answer_loss`, in the file's order. Raises `DataError`."""
    examples = encode(read_data(data), tokenizer, **encoding)
    return [batch for _, batch in _batches(model, examples, tokenizer, batch_size, None)]


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the supervised tokens of `-ln p(token)`, in nats; gradients flow."""
    return supervised_nll(model, batch).mean()


@dataclass(frozen=True)
class Evaluation:
    """Encoded rows, ready to be measured any number of times: `evaluation(model)`."""

    measure: Callable[[nn.Module, Tick | None], dict[str, Any]]
    batches: int
    """How often `tick` is called."""

    def __call__(self, model: nn.Module, tick: Tick | None = None) -> dict[str, Any]:
        return self.measure(model, tick)


def make_evaluation(
    rows: Rows | Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    batch_size: int,
    labels: Sequence[str] | None = None,
    **encoding: Any,
) -> Evaluation:
    """Encode the rows once, to evaluate any number of times."""
    tasks = {"sft": _likelihood, "classify": _classification}
    if task not in tasks:
        raise UsageError(f"unknown task {task!r}", expected=", ".join(tasks), hint=nearest(task, tasks))
    if labels is not None and task != "classify":
        raise UsageError("only the task classify has labels", got=f"task {task!r}")
    return tasks[task](list(rows), tokenizer, batch_size, labels, encoding)


def _likelihood(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, batch_size: int, labels: None, encoding: dict[str, Any]
) -> Evaluation:
    examples = encode(rows, tokenizer, **encoding)

    def measure(model: nn.Module, tick: Tick | None) -> dict[str, Any]:
        scores = _scores(model, examples, tokenizer, batch_size, tick)
        loss, tokens = -sum(scores) / examples.supervised, examples.supervised
        return {
            "task": "sft",
            "rows": len(examples),
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "tokens": tokens,
        }

    return Evaluation(measure, math.ceil(len(examples) / batch_size))


@dataclass(frozen=True)
class _Question:
    """One row to classify: its prompt's tokens, the tokens of each label after it, and which label is right."""

    where: str
    prompt: Encoded
    answers: tuple[Encoded, ...]
    right: int

    def example(self, answer: int) -> Example:
        ids = self.answers[answer]
        return Example([*self.prompt, *ids], [False] * len(self.prompt) + [True] * len(ids), self.where)


def _classification(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    labels: Sequence[str] | None,
    encoding: dict[str, Any],
) -> Evaluation:
    names = tuple(labels) if labels is not None else data_rows.labels(rows)
    questions = _questions(rows, tokenizer, names, encoding)
    one_token = all(len(answer) == 1 for question in questions for answer in question.answers)

    def measure(model: nn.Module, tick: Tick | None) -> dict[str, Any]:
        if one_token:
            scores = _next_token_scores(model, questions, tokenizer, batch_size, tick)
        else:
            pairs = [question.example(answer) for question in questions for answer in range(len(names))]
            scores = torch.tensor(_scores(model, pairs, tokenizer, batch_size, tick), dtype=torch.float64).view(
                -1, len(names)
            )
        return _accuracy(questions, names, scores)

    sequences = len(questions) * (1 if one_token else len(names))
    return Evaluation(measure, math.ceil(sequences / batch_size))


def _questions(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], encoding: dict[str, Any]
) -> list[_Question]:
    strangers = sorted({row.label for row in rows} - set(labels))
    if strangers:
        raise DataError(
            "rows whose label is not among the labels",
            where=next(row.where for row in rows if row.label in strangers),
            got=", ".join(map(repr, strangers[:5])),
            expected=", ".join(map(repr, labels)),
            hint=nearest(strangers[0], labels),
        )
    options = {"add_eos": tokenizer.eos_token is not None, "chat_template": encoding.get("chat_template", True)}
    options |= {"date": encoding.get("date")}
    by_place = {row.where: row for row in rows}
    shared = label_ids(labels, tokenizer, rows[0], **options)
    questions = []
    for example in encode(rows, tokenizer, **encoding | options):
        row = by_place[example.where]
        start, right = _answer_start(example), labels.index(row.label)
        fits = (
            tuple(example.ids[start:]) == shared[right]
        )  # else this row's prompt changes how a label is cut into tokens
        answers = shared if fits else label_ids(labels, tokenizer, row, **options)
        questions.append(_Question(row.where, tuple(example.ids[:start]), _telling(answers, tokenizer), right))
    return questions


def _answer_start(example: Example) -> int:
    """Where the last run of supervised tokens begins."""
    return len(example) - [*example.supervised[::-1], False].index(False)


def _telling(answers: tuple[Encoded, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[Encoded, ...]:
    """The answers without their end token, unless one of them would then begin another."""
    if not all(answer[-1] in tokenizer.all_special_ids for answer in answers):
        return answers
    short = sorted(answer[:-1] for answer in answers)
    ambiguous = any(later[: len(one)] == one for one, later in pairwise(short))
    return answers if ambiguous else tuple(answer[:-1] for answer in answers)


def _accuracy(questions: list[_Question], labels: tuple[str, ...], scores: Tensor) -> dict[str, Any]:
    """`scores` (rows, labels) float64: ln p(label | prompt)."""
    chosen = scores.argmax(dim=1).tolist()
    confusion = [[0] * len(labels) for _ in labels]
    for question, answer in zip(questions, chosen, strict=True):
        confusion[question.right][answer] += 1
    predictions = [
        {"where": question.where, "label": labels[question.right], "predicted": labels[answer]}
        for question, answer in zip(questions, chosen, strict=True)
    ]
    right = torch.tensor([question.right for question in questions])
    return {
        "task": "classify",
        "rows": len(questions),
        "accuracy": sum(row[index] for index, row in enumerate(confusion)) / len(questions),
        "loss": -scores.gather(1, right.unsqueeze(1)).mean().item(),
        "labels": list(labels),
        "confusion": confusion,
        "predictions": predictions,
    }


def _scores(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    tick: Tick | None,
) -> list[float]:
    """ln p of the supervised tokens of each example, summed in float64."""
    scores = [0.0] * len(examples)
    with _in_eval_mode(model):
        for indices, batch in _batches(model, examples, tokenizer, batch_size, tick):
            nll = _finite(supervised_nll(model, batch).double(), examples, indices)
            for index, part in zip(indices, nll.split(batch.counts), strict=True):
                scores[index] = -part.sum().item()
    return scores


def _next_token_scores(
    model: nn.Module, questions: list[_Question], tokenizer: PreTrainedTokenizerBase, batch_size: int, tick: Tick | None
) -> Tensor:
    """ln p of every one-token label of each question, (rows, labels) float64."""
    scores = torch.zeros(len(questions), len(questions[0].answers), dtype=torch.float64)
    examples = [question.example(question.right) for question in questions]
    with _in_eval_mode(model):
        for indices, batch in _batches(model, examples, tokenizer, batch_size, tick):
            logits = _finite(supervised_logits(model, batch), examples, indices)
            for index, row in zip(indices, logits.double().log_softmax(dim=-1), strict=True):
                scores[index] = row[[answer[0] for answer in questions[index].answers]].cpu()
    return scores


def _batches(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    tick: Tick | None,
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of examples, with their indices."""
    device = next(model.parameters()).device
    refuse_misfits(model, examples)
    for indices in plan_batches(examples, batch_size, seed=0, epoch=0, shuffle=False):
        yield indices, collate([examples[index] for index in indices], pad_id(tokenizer), device)
        if tick:
            tick()


def _finite(numbers: Tensor, examples: Sequence[Example], indices: list[int]) -> Tensor:
    """The numbers, if that is what they all are."""
    if not torch.isfinite(numbers).all():
        places = ", ".join(examples[index].where for index in indices)
        raise NonFiniteError("the model's output is not finite", where=places)
    return numbers


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients for the length of a block."""
    with keeping_modes(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Give each module its mode, training or not, back after a block."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with. Which one does not matter: padding is neither attended to nor learned."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(one) for one in found if isinstance(one, int))
