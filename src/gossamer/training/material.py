"""What a run learns from and is measured on: read, encoded and checked before anything else happens."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Any

from gossamer.training import formats
from gossamer.training.batches import largest_part, plan_batches, split_batch
from gossamer.training.config import TrainConfig
from gossamer.training.evaluate import Evaluation, make_evaluation, read_data
from gossamer.training.formats import Row
from gossamer.training.masks import Encoding, Example, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Material:
    """The examples of a run, how they are measured, and what identifies both."""

    examples: Encoding
    held_out: tuple[Row, ...]
    evaluation: Evaluation | None
    """None when there are no held-out rows."""
    identity: dict[str, Any]
    """sha256 of the files and of the tokens that the tokenizer made of them."""

    @classmethod
    def read(cls, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> Material:
        """Read and encode the files of a config, saying what was found. Raises `DataError` with every fault."""
        data = config.data
        encoding: dict[str, Any] = {
            "max_length": config.max_length,
            "on_overlong": config.overlong,
            "chat_template": data.chat_template,
        }
        rows = read_data(data.train, data.format)
        say(rows.describe())
        examples = encode(rows, tokenizer, **encoding)
        say(examples.describe())
        identity = {"train": rows.digest, "tokens": _digest(examples)}
        if data.eval is None:
            return cls(examples, (), None, identity)
        held_out = read_data(data.eval, data.format)
        say(held_out.describe())
        labels = formats.labels([*rows, *held_out]) if config.task == "classify" else None
        evaluation = make_evaluation(
            held_out, tokenizer, task=config.task, batch_size=config.eval_batch_size, labels=labels, **encoding
        )
        return cls(examples, held_out.rows, evaluation, identity | {"eval": held_out.digest})


class Steps:
    """Which examples each optimiser step learns from: `steps[n]` is a list of batches, each a list of indices.

    The order follows from the seed and the epoch alone, so any step can be asked for at any time.
    """

    def __init__(self, examples: Encoding, config: TrainConfig) -> None:
        self.config, self.lengths = config, [len(example) for example in examples]
        self._epoch = lru_cache(maxsize=1)(self._plan)
        self._ends: list[int] = []  # of the epochs looked at so far; batches filled by tokens differ in their number
        epochs = config.epochs or (None if config.max_steps else 1)
        limits = [config.max_steps, epochs and self._end(epochs - 1)]
        self.total: int = min(limit for limit in limits if limit)

    def place(self, step: int) -> tuple[int, int]:
        """The epoch that a step is in, and which of its steps it is."""
        while not self._ends or self._ends[-1] <= step:
            self._end(len(self._ends))
        epoch = bisect_right(self._ends, step)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def epochs(self, step: int) -> float:
        """Passes over the data after so many steps."""
        epoch, position = self.place(step)
        return epoch + position / (self._end(epoch) - (step - position))

    def largest(self) -> tuple[int, int]:
        """Rows and tokens a row of the largest part that any step can have."""
        filled, most = self.config.batch_tokens, self.config.micro_batch_tokens
        if filled is not None:
            return largest_part(self.lengths, len(self.lengths), min(filled, most))
        return largest_part(self.lengths, self.config.batch_size, most)

    def _end(self, epoch: int) -> int:
        """Steps until the end of an epoch."""
        while len(self._ends) <= epoch:
            batches = ceil(len(self.lengths) / self.config.batch_size)
            if self.config.batch_tokens is not None:
                batches = len(self._epoch(len(self._ends)))
            self._ends.append((self._ends or [0])[-1] + ceil(batches / self.config.accumulation))
        return self._ends[epoch]

    def __getitem__(self, step: int) -> list[list[int]]:
        epoch, position = self.place(step)
        first = position * self.config.accumulation
        batches = self._epoch(epoch)[first : first + self.config.accumulation]
        most = self.config.micro_batch_tokens
        return [part for batch in batches for part in split_batch(batch, self.lengths, most)]

    def _plan(self, epoch: int) -> list[list[int]]:
        tokens = self.config.batch_tokens
        return plan_batches(self.lengths, self.config.batch_size, seed=self.config.seed, epoch=epoch, tokens=tokens)


def _digest(examples: Iterable[Example]) -> str:
    total = hashlib.sha256()
    for example in examples:
        total.update(array("q", example.ids).tobytes() + bytes(example.supervised) + b"|")
    return total.hexdigest()
