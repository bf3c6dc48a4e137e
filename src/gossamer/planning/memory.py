"""Bytes: what is always there, and what each moment of a training step adds to it.

    always    W (weights)  +  A (what stands beside them)  +  O (AdamW's moments)
    moments   of the step that was followed; and the optimiser's: all gradients (with path="peft" the roots of all
              second moments too)

The step comes from a profile that was followed before, or is followed now, see `step`. With accumulation all gradients
are there all the time, from the second batch of a step on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from gossamer.errors import UnsupportedError
from gossamer.planning import timeline
from gossamer.planning.method import Tuning
from gossamer.planning.profiles import known_profile
from gossamer.planning.setting import TrainingSetting, moments
from gossamer.planning.shape import ModelShape
from gossamer.planning.timeline import Moment, StepProfile


@dataclass(frozen=True)
class MemoryBreakdown:
    """The bytes of one model under one method and setting; `checkpointing` is decided here.

    `loss` is what is computed instead of the model's usual loss, see `gossamer.planning.losses.StepLoss`.
    """

    shape: ModelShape
    tuning: Tuning
    setting: TrainingSetting
    checkpointing: bool
    loss: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.full and self.setting.quant:
            raise UnsupportedError("quantised weights are codes and cannot be trained", hint="a method such as lora")

    @property
    def full(self) -> bool:
        """Whether every parameter is trained."""
        return self.tuning.name == "full"

    @cached_property
    def step(self) -> StepProfile:
        """What the step takes."""
        setting = replace(self.setting, accumulation=1, optimizer="adamw", checkpointing=self.checkpointing)
        found = None if self.shape.counted or self.loss else known_profile(self.shape, self.tuning, setting)
        return found or _followed(self.shape, self.tuning, setting, self.loss)

    # What is always there --------------------------------------------------------------------------------------

    @property
    def weights(self) -> int:
        """W: the base as it is stored in memory."""
        return self.step.weights

    @property
    def trained(self) -> int:
        """Trained numbers."""
        return self.step.numbers

    @property
    def adapters(self) -> int:
        """A: the trained numbers, and the constants that some methods keep beside them."""
        return self.step.adapters

    @property
    def gradients(self) -> int:
        """One for each trained number."""
        return self.step.nbytes

    @property
    def moments(self) -> int:
        """AdamW's, of all trained tensors."""
        optimizer = self.setting.optimizer
        return sum(one.times * moments(one.numbers, one.width, optimizer) for one in self.step.trained)

    @property
    def optimizer(self) -> int:
        """O: the moments on the device."""
        return 0 if self.setting.optimizer.startswith("paged") else self.moments

    @property
    def paged(self) -> int:
        """Moments that lie in the host's memory when the device needs its own."""
        return self.moments - self.optimizer

    @property
    def always(self) -> int:
        """W + A + O."""
        return self.weights + self.adapters + self.optimizer

    # What comes and goes ---------------------------------------------------------------------------------------

    @cached_property
    def during(self) -> tuple[Moment, ...]:
        """The highest moment of each part of the step."""
        accumulated = self.gradients if self.setting.accumulation > 1 else 0
        found: dict[str, Moment] = {}
        for one in timeline.moments(self.step.stretches, accumulated):
            if one.name not in found or one.total > found[one.name].total:
                found[one.name] = one
        roots = self.gradients if self.setting.path == "peft" else 0  # torch's default AdamW takes all roots at once
        return (*found.values(), Moment("the optimiser's step", 0, roots, self.gradients))

    @property
    def activations(self) -> int:
        """What the forward of all layers keeps, or their inputs alone."""
        found = {one.name: one.activations for one in self.during}
        return found.get(timeline.HEAD, found[timeline.LOSS])

    @property
    def head(self) -> int:
        """What the last norm, the logits and the loss take at their fullest, forwards and backwards."""
        return max(one.transient for one in self.during if one.name in (timeline.HEAD, timeline.LOSS))

    @property
    def dequantisation(self) -> int:
        """The largest matrix that is rebuilt while it is used."""
        return self.step.rebuilt

    @property
    def fullest(self) -> Moment:
        """The moment of the peak."""
        return max(self.during, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """The most that is in memory at once."""
        return self.always + self.fullest.total


@lru_cache(maxsize=64)
def _followed(shape: ModelShape, tuning: Tuning, setting: TrainingSetting, loss: Any) -> StepProfile:
    from gossamer.planning.fake import described
    from gossamer.planning.step import followed

    module = described(shape.config(), shape.name) if shape.module is None else shape.module
    return followed(module, tuning.spec(), setting, bool(setting.checkpointing), loss, shape)
