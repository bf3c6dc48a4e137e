"""Learning the answers: supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from gossamer.data.masks import Encoding
from gossamer.data.rows import Row
from gossamer.training.audit import refuse_misfits
from gossamer.training.loss import supervised_nll
from gossamer.training.tasks.language import NATS, LanguageTask, finite
from gossamer.training.tasks.task import EncodingOptions, EvaluationPass, Figures, Measure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERPLEXITY = Measure("perplexity")


class SFT(LanguageTask):
    """Learn the answers, and measure how likely the held-out ones are.

    loss = mean over supervised tokens of -ln p(token)        perplexity = exp(loss)
    """

    name = "sft"
    measures = (NATS, PERPLEXITY)

    def held_out(self, rows: Sequence[Row], learned: Sequence[Row], processor: PreTrainedTokenizerBase,
                 options: EncodingOptions) -> Encoding:  # fmt: skip
        """Encoded as the rows of training are."""
        return self.encode(rows, processor, options)

    def judge(self, model: nn.Module, examples: Any, through: EvaluationPass) -> Figures:
        """Sums are float64."""
        refuse_misfits(model, examples)
        total = 0.0
        for indices in through.batches(examples):
            batch = self.collate([examples[index] for index in indices], through.layout)
            total += finite(supervised_nll(model, batch).double(), examples, indices).sum().item()
        loss = total / examples.supervised
        measures = {NATS: loss, PERPLEXITY: math.exp(min(loss, 700.0))}
        return Figures(self.name, len(examples), measures, {"tokens": examples.supervised})
