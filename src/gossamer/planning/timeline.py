"""Memory along a training step: stretches of operations, and the moments at which the most is there.

    level before a stretch  = sum of `net` over all stretches before it, each as often as layers it stands for
    peak                    = max over stretches of  level before it + its `top`

All layers of a stack but its first and last are alike, so one of them is followed and counted `repeat` times. Between
two of the same layer the level moves by the same number of bytes, so its highest point is at the first or the last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

START, HEAD = "the embedding, forwards", "the head, forwards"
LOSS, END = "the head, backwards", "the embedding, backwards"


@dataclass(frozen=True)
class Stretch:
    """What happens to memory between two marks of a step, in bytes.

    Attributes:
        name: what runs. repeat: how many layers it stands for.
        sizes: bytes that came (above 0) and went (below 0), in their order.
        gradients: those of them that are gradients of trained parameters, and stay.
    """

    name: str
    repeat: int
    sizes: tuple[int, ...]
    gradients: tuple[int, ...]

    @cached_property
    def net(self) -> int:
        """By how much more is there at its end than at its start."""
        return sum(self.sizes)

    @cached_property
    def top(self) -> int:
        """The most that is there beyond its start."""
        return max(accumulate(self.sizes, initial=0))


@dataclass(frozen=True)
class Moment:
    """One moment of a training step, in bytes beside what is always there.

    Attributes:
        name: which one.
        activations: kept by the forward for backwards that are still to come.
        transient: what the running piece has of its own: its activations, gradients on their way, buffers.
        gradients: of trained parameters so far.
    """

    name: str
    activations: int
    transient: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.transient + self.gradients


def moments(stretches: Sequence[Stretch], accumulated: int = 0) -> Iterator[Moment]:
    """The highest moments of all stretches; `accumulated`: bytes of gradients of batches before, if there are any."""
    level = gradients = 0
    for one in stretches:
        for before in {0, one.repeat - 1}:
            there = gradients + before * sum(one.gradients)
            kept = level + before * one.net - there
            yield Moment(one.name, kept, one.top, max(there, accumulated))
        level += one.repeat * one.net
        gradients += one.repeat * sum(one.gradients)


@dataclass(frozen=True)
class Trained:
    """Trained tensors of one size: numbers of one, bytes of a number, how many of them."""

    numbers: int
    width: int
    times: int


@dataclass(frozen=True)
class StepProfile:
    """What a training step of one model, method and setting takes, but for its optimiser.

    Attributes:
        weights: bytes of the base. adapters: of what stands beside it. rebuilt: of the largest weight that is rebuilt.
        trained: the trained tensors. stretches: the step.
    """

    weights: int
    adapters: int
    rebuilt: int
    trained: tuple[Trained, ...]
    stretches: tuple[Stretch, ...]

    @property
    def numbers(self) -> int:
        """Trained numbers."""
        return sum(one.numbers * one.times for one in self.trained)

    @property
    def nbytes(self) -> int:
        """Bytes of the trained numbers, and of their gradients."""
        return sum(one.numbers * one.width * one.times for one in self.trained)
