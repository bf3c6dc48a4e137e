"""Learning the answers, and choosing among labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.data.batches import Batch, joined
from gossamer.data.masks import Example, encode, label_ids
from gossamer.data.rows import Row
from gossamer.data.rows import labels as labels_of
from gossamer.errors import DataError, nearest
from gossamer.spec import Names
from gossamer.training.audit import refuse_misfits
from gossamer.training.loss import supervised_logits, supervised_nll
from gossamer.training.tasks.language import LanguageTask, finite
from gossamer.training.tasks.task import LOSS, EncodingOptions, EvaluationPass, Figures, LabelTable, Measure, Prediction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ACCURACY = Measure("accuracy", "share", "higher")
LABEL_NATS = Measure(LOSS, "nats per right label")


@dataclass(frozen=True)
class Question:
    """One row to classify: its prompt's tokens, the tokens of each label after it, and which label is right."""

    where: str
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    right: int

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answers[self.right])

    @property
    def terms(self) -> int:
        """One label."""
        return 1

    def example(self, answer: int) -> Example:
        """The prompt with one of its answers, which alone is supervised."""
        ids = self.answers[answer]
        return Example([*self.prompt, *ids], [False] * len(self.prompt) + [True] * len(ids), self.where)


@dataclass(frozen=True)
class Questions(Sequence[Question]):
    """Rows to classify, with the labels that they have in common."""

    labels: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def one_token(self) -> bool:
        """Whether every label is one token."""
        return all(len(answer) == 1 for one in self.questions for answer in one.answers)

    def __getitem__(self, index: Any) -> Any:
        return self.questions[index]

    def __len__(self) -> int:
        return len(self.questions)


class Classify(LanguageTask):
    """Learn the answers, and measure which of the labels is the likeliest for held-out rows.

        prediction = argmax over labels of ln p(label | prompt), exactly: no sampling, no parsing of text

    A label counts with its end token only where one label's tokens begin another's; otherwise the end adds nothing that
    tells them apart. When every label is one token, a row costs one forward with the head at one position; otherwise
    the labels of a row share its prompt where rows can be packed.
    """

    name = "classify"
    measures = (ACCURACY, LABEL_NATS)
    table = "confusion"

    labels: Names | None = None
    """What to choose from; the labels in the data when None."""

    def check(self, rows: Sequence[Row]) -> None:
        """There must be two labels."""
        if self.labels is None:
            labels_of(rows)

    def held_out(self, rows: Sequence[Row], learned: Sequence[Row], processor: PreTrainedTokenizerBase,
                 options: EncodingOptions) -> Questions:  # fmt: skip
        """A question for each row, with the labels of all rows."""
        labels = self.labels if self.labels is not None else labels_of([*learned, *rows])
        _refuse_strangers(rows, labels)
        ends = processor.eos_token is not None
        written: dict[str, Any] = {"chat_template": options.chat_template, "date": options.date, "add_eos": ends}
        by_place = {row.where: row for row in rows}
        shared = label_ids(labels, processor, rows[0], **written)
        questions = []
        for example in encode(rows, processor, add_eos=ends, **vars(options)):
            row = by_place[example.where]
            start, right = example.answer_start, labels.index(row.label)
            fits = tuple(example.ids[start:]) == shared[right]
            answers = shared if fits else label_ids(labels, processor, row, **written)  # cut otherwise by this prompt
            prompt = tuple(example.ids[:start])
            questions.append(Question(row.where, prompt, _distinctive(answers, processor), right))
        return Questions(labels, tuple(questions))

    def sequences(self, examples: Any) -> int:
        """One where the head at one position tells all labels apart, otherwise one for each label."""
        return 1 if examples.one_token else len(examples.labels)

    def judge(self, model: nn.Module, examples: Any, through: EvaluationPass) -> Figures:
        """Likelihoods are summed in float64."""
        refuse_misfits(model, [one.example(answer) for one in examples for answer in range(len(one.answers))])
        score = self._next_token_scores if examples.one_token else self._scores
        scores = torch.zeros(len(examples), len(examples.labels), dtype=torch.float64)
        for indices in through.batches(examples):
            scores[indices] = score(model, [examples[index] for index in indices], through).cpu()
        return self._figures(examples, scores)

    def _next_token_scores(self, model: nn.Module, questions: Sequence[Question], through: EvaluationPass) -> Tensor:
        """ln p of every one-token label, (questions, labels) float64."""
        batch = self.collate([one.example(one.right) for one in questions], through.layout)
        logits = finite(supervised_logits(model, batch), questions, range(len(questions)))
        tokens = torch.tensor([[answer for (answer,) in one.answers] for one in questions], device=logits.device)
        return logits.double().log_softmax(dim=-1).gather(1, tokens)

    def _scores(self, model: nn.Module, questions: Sequence[Question], through: EvaluationPass) -> Tensor:
        """ln p of every label, (questions, labels) float64."""

        def scores(batch: Batch) -> Tensor:
            return -batch.by_example(finite(supervised_nll(model, batch).double(), questions, range(len(questions))))

        answers, layout = range(len(questions[0].answers)), through.layout
        if layout.packed:  # the labels of a question begin with its prompt, which goes through once
            batches = [self.collate([one.example(answer) for answer in answers], layout) for one in questions]
            return scores(joined(batches)).view(len(questions), -1)
        columns = (self.collate([one.example(answer) for one in questions], layout) for answer in answers)
        return torch.stack([scores(batch) for batch in columns], dim=1)

    def _figures(self, examples: Questions, scores: Tensor) -> Figures:
        """`scores` (questions, labels) float64: ln p(label | prompt)."""
        labels, chosen = examples.labels, scores.argmax(dim=1).tolist()
        counts = [[0] * len(labels) for _ in labels]
        for question, answer in zip(examples, chosen, strict=True):
            counts[question.right][answer] += 1
        pairs = zip(examples, chosen, strict=True)
        predictions = (Prediction(one.where, labels[one.right], labels[answer]) for one, answer in pairs)
        right = torch.tensor([[one.right] for one in examples])
        share = sum(row[index] for index, row in enumerate(counts)) / len(examples)
        measures = {ACCURACY: share, LABEL_NATS: -scores.gather(1, right).mean().item()}
        table = LabelTable(self.table, labels, counts)
        return Figures(self.name, len(examples), measures, table=table, predictions=tuple(predictions))


def _refuse_strangers(rows: Sequence[Row], labels: tuple[str, ...]) -> None:
    strangers = sorted({row.label for row in rows} - {*labels})
    if strangers:
        raise DataError(
            "rows whose label is not among the labels",
            where=next(row.where for row in rows if row.label in strangers),
            got=", ".join(map(repr, strangers[:5])),
            expected=", ".join(map(repr, labels)),
            hint=nearest(strangers[0], labels),
        )


def _distinctive(
    answers: tuple[tuple[int, ...], ...], processor: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], ...]:
    """The answers without their end token, unless one of them would then begin another."""
    if not all(answer[-1] in processor.all_special_ids for answer in answers):
        return answers
    short = sorted(answer[:-1] for answer in answers)
    ambiguous = any(later[: len(one)] == one for one, later in pairwise(short))
    return answers if ambiguous else tuple(answer[:-1] for answer in answers)
