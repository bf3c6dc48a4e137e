"""A task of one's own: a number for each prompt, from a linear head on the last hidden state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gossamer.data.batches import collate
from gossamer.data.masks import Encoding, Example
from gossamer.data.rows import Completion
from gossamer.errors import UnsupportedError
from gossamer.training.tasks import TASKS, Figures, Measure, Task

ERROR, SQUARE = Measure("error", "stars"), Measure("loss", "squared stars")


@dataclass(frozen=True, slots=True)
class Scored(Example):
    score: float = 0.0


class Regression(Task):
    name = "regression"
    rows = (Completion,)
    measures = (ERROR, SQUARE)
    loss_unit = SQUARE.unit
    packs = False

    def fits(self, model):
        if getattr(model.config, "num_labels", 0) != 1:
            raise UnsupportedError("a regression needs a model with a head of one number", where=type(model).__name__)

    def encode(self, rows, processor, options):
        examples = []
        for row in rows:
            ids = processor(row.question)["input_ids"]
            examples.append(Scored(ids, [*[False] * (len(ids) - 1), True], row.where, float(row.label)))
        return Encoding(tuple(examples), options.max_length)

    def held_out(self, rows, learned, processor, options):
        return self.encode(rows, processor, options)

    def collate(self, examples, layout):
        batch = collate(examples, layout.pad_id, layout.device)
        return replace(batch, extras={"score": torch.tensor([one.score for one in examples], device=layout.device)})

    def losses(self, model, batch):
        return (model(**batch.inputs()).logits[:, 0].float() - batch.extras["score"]) ** 2

    def judge(self, model, examples, through):
        squares = []
        for indices in through.batches(examples):
            squares += self.losses(model, self.collate([examples[index] for index in indices], through.layout)).tolist()
        error, loss = (sum(square**power for square in squares) / len(squares) for power in (0.5, 1))
        return Figures(self.name, len(examples), {ERROR: error, SQUARE: loss})


TASKS[Regression.name] = Regression
