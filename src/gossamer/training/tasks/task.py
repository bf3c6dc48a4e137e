"""What a task is: what methods are to modules, tasks are to rows.

A task says what rows are learned from, how they become examples, what the loss of an example is, and how well held-out
rows are done, in figures that carry their names. The loop knows steps, clipping, schedules and checkpoints; it knows no
label and no vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from gossamer.data.batches import Batch, BatchLayout, plan_batches
from gossamer.data.masks import Encoding, Overlong
from gossamer.data.rows import Row
from gossamer.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tick = Callable[[], None]
"""Called after each batch; it may raise to stop an evaluation."""


@dataclass(frozen=True)
class Measure:
    """The name of a figure, its unit, and which direction is better. "share" is a number from 0 to 1."""

    name: str
    unit: str = ""
    better: Literal["higher", "lower"] = "lower"

    def cost(self, value: float) -> float:
        """The figure so that less is better."""
        return -value if self.better == "higher" else value


LOSS = "loss"
"""The name of the measure that every task has: what early stopping looks at, and what decides between equals."""


@dataclass(frozen=True)
class LabelTable:
    """How often a row of one label (rows) was given another (columns)."""

    name: str
    labels: tuple[str, ...]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prediction:
    """What a model answered for one held-out row."""

    where: str
    label: str
    predicted: str


@dataclass(frozen=True)
class Figures:
    """How well a model does a task on held-out rows; the first of `measures` is what runs are compared by."""

    task: str
    rows: int
    measures: Mapping[Measure, float]
    counts: Mapping[str, int] = field(default_factory=dict)
    table: LabelTable | None = None
    predictions: tuple[Prediction, ...] = ()

    @property
    def headline(self) -> Measure:
        """What runs are compared by."""
        return next(iter(self.measures))

    @property
    def loss(self) -> float:
        """The loss."""
        return next(value for measure, value in self.measures.items() if measure.name == LOSS)

    @property
    def cost(self) -> tuple[float, float]:
        """By which the best of several is found: the smallest."""
        return self.headline.cost(self.measures[self.headline]), self.loss

    def named(self) -> dict[str, float]:
        """Name of each measure -> its figure."""
        return {measure.name: value for measure, value in self.measures.items()}

    def sampled(self, most: int) -> Figures:
        """The same with at most so many of the predictions, evenly spread."""
        stride = max(1, len(self.predictions) // most)
        return replace(self, predictions=self.predictions[::stride][:most])

    def to_dict(self, *, predictions: bool = True) -> dict[str, Any]:
        """As JSON has them; `read_figures` reads them back."""
        found = {"task": self.task, "rows": self.rows, **self.named(), **self.counts}
        if self.table:
            found |= {"labels": [*self.table.labels], self.table.name: [[*row] for row in self.table.counts]}
        if predictions and self.predictions:
            found["predictions"] = [dict(vars(one)) for one in self.predictions]
        return found


@dataclass(frozen=True)
class EncodingOptions:
    """How rows become tokens, as in `LoopConfig` and `DataFiles`; `date` is the day that a chat template is given."""

    max_length: int = 1024
    on_overlong: Overlong = "error"
    chat_template: bool = True
    date: str | None = None


class LearnedExample(Protocol):
    """What the loop asks of an example."""

    @property
    def where(self) -> str:
        """Where its row stands, for messages."""
        ...

    @property
    def terms(self) -> int:
        """Its share of the loss's denominator."""
        ...

    def __len__(self) -> int:
        """Tokens."""
        ...


@dataclass(frozen=True)
class EvaluationPass:
    """How held-out examples go through a model: so many at once, laid out as in training."""

    layout: BatchLayout
    batch_size: int
    tick: Tick | None = None

    def batches(self, examples: Sequence[Any]) -> Iterator[list[int]]:
        """Indices of the examples that go through the model together; each of them comes once."""
        lengths = [len(one) for one in examples]
        for indices in plan_batches(lengths, self.batch_size, seed=0, epoch=0, shuffle=False):
            yield indices
            if self.tick:
                self.tick()


class Task(Spec):
    """What is learned from rows, and how well. It is registered by name in `TASKS`, and its fields are its options."""

    name: ClassVar[str]
    rows: ClassVar[tuple[type[Row], ...]]
    """The shapes of rows that it learns from."""
    measures: ClassVar[tuple[Measure, ...]]
    """What `judge` finds, a loss among it; the first is what runs are compared by."""
    loss_unit: ClassVar[str] = ""
    """Of the loss in training, for charts."""
    table: ClassVar[str] = ""
    """The name of the table of labels that `judge` makes, if it makes one."""
    additive: ClassVar[bool] = True
    """Whether the loss of a batch is the sum of its examples' own, so that it may be split, shared over processes and
    mixed with other adapters' rows."""
    packs: ClassVar[bool] = True
    """Whether `collate` can put rows one after another instead of padding them."""

    @abstractmethod
    def fits(self, model: nn.Module) -> None:
        """Raise `UnsupportedError` for a model that cannot do this task."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, options: EncodingOptions) -> Encoding:
        """The examples to learn from. Raises `DataError` with every fault."""

    @abstractmethod
    def held_out(self, rows: Sequence[Row], learned: Sequence[Row], processor: PreTrainedTokenizerBase,
                 options: EncodingOptions) -> Sequence[Any]:  # fmt: skip
        """The examples that `judge` is given, each with a length in tokens; `learned` are the rows of training.

        Raises `DataError` with every fault.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Any], layout: BatchLayout) -> Batch:
        """Examples as the tensors that go through the model together."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each example, summed over its terms, (examples,); the loop divides by the terms of the step."""

    @abstractmethod
    def judge(self, model: nn.Module, examples: Sequence[Any], through: EvaluationPass) -> Figures:
        """Measure a model that is in evaluation mode, without gradients. Raises `NonFiniteError`."""

    def check(self, rows: Sequence[Row]) -> None:
        """Raise `DataError` for rows, learned and held-out ones together, that are no data set of this task."""
        return

    def begin(self, model: nn.Module, examples: Encoding) -> Encoding:
        """The examples with what is computed once before the first step, while the trained adapter is off."""
        return examples

    def remarks(
        self, examples: Encoding, processor: PreTrainedTokenizerBase, model: PreTrainedModel | None
    ) -> list[str]:
        """What is worth saying of the examples before training."""
        return []

    def sequences(self, examples: Sequence[Any]) -> int:
        """How many sequences go through the model for each held-out example."""
        return 1

    def named(self) -> str | dict[str, Any]:
        """As a config file has it: the name, or a mapping where an option is set."""
        options = self.model_dump(mode="json", exclude_defaults=True)
        return {"name": self.name, **options} if options else self.name
