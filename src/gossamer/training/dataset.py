"""What a run learns from and is measured on: read, encoded and checked before anything else happens."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Any

from gossamer.data import clock
from gossamer.data.batches import largest_part, plan_batches, split_batch
from gossamer.data.chat_template import ChatRenderer
from gossamer.data.formats import Rows
from gossamer.data.masks import Encoding, Example
from gossamer.data.rows import Chat, Instruction, Row
from gossamer.errors import DataError, UnsupportedError
from gossamer.training.config import RunConfig
from gossamer.training.evaluate import Evaluation, pad_id
from gossamer.training.tasks.task import EncodingOptions, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Files = tuple[Rows, Rows | None]
"""The rows to learn from, and the held-out ones."""


@dataclass(frozen=True)
class EncodedDataset:
    """The examples of a run, how they are measured, and what identifies both."""

    examples: Encoding
    held_out: tuple[Row, ...]
    evaluation: Evaluation | None
    """None when there are no held-out rows."""
    identity: dict[str, Any]
    """sha256 of the files and of the tokens that the tokenizer made of them."""
    date: str | None = None
    """The day that the chat template writes, where it writes one."""

    @classmethod
    def read(
        cls,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        say: Callable[[str], None],
        files: Files | None = None,
        *,
        model: PreTrainedModel | None = None,
        began: str | None = None,
    ) -> EncodedDataset:
        """Read and encode the files of a config, saying what was found.

        Args:
            files: what `config.data.read()` gave already.
            model: whose generation must stop where the answers end; None leaves that out.
            began: the day the run began, as `2026-12-31`; today when None. The config's own day comes first.

        Raises `DataError` with every fault.
        """
        data = config.data
        date = data.date or began or clock.today()
        task, loop = config.task, config.train
        options = EncodingOptions(loop.max_length, loop.overlong, data.chat_template, date)
        rows, held_out = files or data.read()
        say(rows.describe())
        every = [*rows, *(held_out or ())]
        _refuse_shapes(task, every)
        task.check(every)
        examples = task.encode(rows.rows, tokenizer, options)
        say(examples.describe())
        chats = any(isinstance(row, Chat | Instruction) for row in rows)
        for line in task.remarks(examples, tokenizer, model) if chats else ():
            say(line)
        renderer = ChatRenderer(tokenizer, add_eos=False, chat_template=data.chat_template)
        date = date if chats and renderer.dated else None
        if date:
            say(f"the chat template writes a date; in this run, resumed or not, it is {date} (data.date)")
        identity = {"train": rows.digest, "tokens": _digest(examples)}
        if held_out is None:
            return cls(examples, (), None, identity, date)
        say(held_out.describe())
        measured = task.held_out(held_out.rows, rows.rows, tokenizer, options)
        evaluation = Evaluation(task, measured, loop.eval_batch_size, pad_id(tokenizer))
        return cls(examples, held_out.rows, evaluation, identity | {"eval": held_out.digest}, date)

    def begun(self, task: Task, model: PreTrainedModel) -> EncodedDataset:
        """The dataset with what the task computes once, while the adapter that will learn from it is off."""
        return replace(self, examples=task.begin(model, self.examples))


class Steps:
    """Which examples each optimiser step learns from: `steps[n]` is a list of batches, each a list of indices.

    The order follows from the seed and the epoch alone, so any step can be asked for at any time.
    """

    def __init__(self, examples: Encoding, run: RunConfig) -> None:
        self.task, self.config, self.lengths = run.task, run.train, [len(example) for example in examples]
        self._epoch = lru_cache(maxsize=1)(self._plan)
        self._ends: list[int] = []  # of the epochs looked at so far; batches filled by tokens differ in their number
        epochs = self.config.epochs or (None if self.config.max_steps else 1)
        limits = [self.config.max_steps, epochs and self._end(epochs - 1)]
        self.total: int = min(limit for limit in limits if limit)
        if not self.task.additive:
            self._refuse_to_split()

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

    def _refuse_to_split(self) -> None:
        """Raise `UnsupportedError` where a batch would have to go through the model in parts."""
        task, most = self.task.name, self.config.micro_batch_tokens
        filled = self.config.batch_tokens
        count, tokens = (len(self.lengths), filled) if filled else (self.config.batch_size, sum(self.lengths) + 1)
        rows, length = largest_part(self.lengths, count, tokens)
        if rows > 1 and rows * length > most:
            raise UnsupportedError(
                f"a batch of the task {task} cannot be split, as its loss is not a sum over examples",
                got=f"{rows} rows of up to {length:,} tokens",
                expected=f"at most {most:,} tokens (micro_batch_tokens)",
                hint="a larger micro_batch_tokens, or fewer rows a batch",
            )

    def _end(self, epoch: int) -> int:
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


def _refuse_shapes(task: Task, rows: Iterable[Row]) -> None:
    if stranger := next((row for row in rows if not isinstance(row, task.rows)), None):
        raise DataError(
            f"the task {task.name} does not learn from rows of this shape",
            where=stranger.where,
            got=type(stranger).__name__,
            expected=" or ".join(shape.__name__ for shape in task.rows),
        )


def _digest(examples: Iterable[Example]) -> str:
    total = hashlib.sha256()
    for example in examples:
        total.update(array("q", example.ids).tobytes() + bytes(example.supervised) + b"|")
    return total.hexdigest()
