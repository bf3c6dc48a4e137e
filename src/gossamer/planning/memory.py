"""Bytes: what is always there, and what each moment of a training step adds to it.

    always    W (weights)  +  A (trained numbers)  +  O (AdamW's moments)  +  the batch and what all layers share
    moments   the head's backward       all S_l, the top's peak
              backward of layer l       S_1 .. S_{l-1}, the layer's peak, gradients of what is above it
              the embedding's backward  all gradients; of a tied one two more on their way (full fine-tuning only)
              the optimiser's step      all gradients (and with path="peft" the roots of all second moments)

S_l is what layer l keeps. All layers but the first keep the same, so every moment between two layers is a sum of those
at the ends, and the largest is at an end: the formulas need one layer, the first one and the top. With checkpointing a
layer keeps its input alone until its backward runs it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from gossamer.errors import UnsupportedError
from gossamer.planning.layers import Layers
from gossamer.planning.method import Tuning
from gossamer.planning.setting import Setting, moments, packed
from gossamer.planning.shape import ModelShape

INTEGERS = 8
"""Bytes of a token id; a batch holds ids, mask and labels."""


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


@dataclass(frozen=True)
class Memory:
    """The bytes of one model under one method and setting; `checkpointing` is decided here."""

    shape: ModelShape
    tuning: Tuning
    setting: Setting
    checkpointing: bool

    def __post_init__(self) -> None:
        full = self.tuning.name == "full"
        if full and self.setting.quant:
            raise UnsupportedError("quantised weights are codes and cannot be trained", hint="a method such as lora")
        if self.shape.encoder:
            raise UnsupportedError(
                "only causal language models are trained by this version",
                where=self.shape.name,
                hint="ModelShape counts an encoder's parameters",
            )
        if self.shape.family == "falcon":
            raise UnsupportedError(
                "Falcon's parameters are counted, but what its attention keeps is not known to the plan",
                where=self.shape.name,
            )
        if self.setting.path == "peft" and self.tuning.name == "dora":
            raise UnsupportedError("what DoRA keeps in PEFT is not known to the plan", expected="lora or full")

    @property
    def full(self) -> bool:
        """Whether every parameter is trained."""
        return self.tuning.name == "full"

    @cached_property
    def layers(self) -> Layers:
        """Its pieces."""
        return Layers(self.shape, self.tuning, self.setting)

    # What is always there --------------------------------------------------------------------------------------

    @property
    def weights(self) -> int:
        """W: the base as it is stored in memory."""
        whole, width = self.shape.total, self.setting.width
        if not self.setting.quant:
            return whole * width
        codes = sum(packed(linear.outer, linear.weights, self.setting.quant) for linear in self.shape.linears)
        beside = [(inner * outer, outer) for part in self.shape.parts for _, inner, outer in part.linears]
        codes = self.shape.layers * codes + sum(packed(outer, count, self.setting.quant) for count, outer in beside)
        return codes + (whole - self.shape.quantisable - sum(count for count, _ in beside)) * width

    @property
    def trained(self) -> int:
        """Trained numbers."""
        return self.tuning.trained(self.shape)

    @property
    def trained_width(self) -> int:
        """Bytes of one of them: full fine-tuning here trains float32 copies, elsewhere the weights themselves."""
        if not self.full:
            return self.setting.adapter_width
        return 4 if self.setting.path == "gossamer" else self.setting.width

    @property
    def adapters(self) -> int:
        """A: the trained numbers, and the constants that some starts keep beside them."""
        if self.full and self.setting.path == "peft":
            return 0
        return self.trained * self.trained_width * (self.tuning.pairs if not self.full else 1)

    @property
    def gradients(self) -> int:
        """One for each trained number."""
        return self.trained * self.trained_width

    @property
    def moments(self) -> int:
        """AdamW's, of all trained tensors."""
        width, optimizer, shape = self.trained_width, self.setting.optimizer, self.shape
        if self.full:
            return moments(self.trained, width, optimizer)
        each = 0
        for linear in self.tuning.targets(shape):
            each += sum(moments(self.tuning.r * size, width, optimizer) for size in (linear.inner, linear.outer))
            each += moments(linear.outer, width, optimizer) if self.tuning.name == "dora" else 0
        return shape.layers * each

    @property
    def optimizer(self) -> int:
        """O: the moments on the device."""
        return 0 if self.setting.optimizer.startswith("paged") else self.moments

    @property
    def paged(self) -> int:
        """Moments that lie in the host's memory when the device needs its own."""
        return self.moments - self.optimizer

    @property
    def shared(self) -> int:
        """The batch, and what all layers read: cosines and sines, the mask."""
        setting = self.setting
        angles = 2 * setting.sequence * round(self.shape.head_dim * self.shape.rotary) * setting.width
        mask = setting.batch * setting.sequence**2 if setting.masked else 0
        held = setting.labelled * self.shape.vocabulary * setting.width if setting.path == "peft" else 0
        return 3 * INTEGERS * setting.tokens + angles + mask + held

    @property
    def always(self) -> int:
        """W + A + O and what is shared."""
        return self.weights + self.adapters + self.optimizer + self.shared

    # What comes and goes ---------------------------------------------------------------------------------------

    @cached_property
    def row(self) -> int:
        """Bytes of one hidden state of the whole batch."""
        return self.setting.tokens * self.shape.hidden * self.setting.width

    @cached_property
    def pieces(self) -> tuple:
        """Profiles of the first layer, any other layer, and the top."""
        resident = self.checkpointing
        layers = self.layers
        return layers.decoder(first=True, resident=resident), layers.decoder(resident=resident), layers.top()

    @property
    def activations(self) -> int:
        """What the forward keeps: of all layers, or their inputs."""
        first, other, _ = self.pieces
        if self.checkpointing:
            return self.shape.layers * self.row
        return first.saved + (self.shape.layers - 1) * other.saved

    @property
    def head(self) -> int:
        """What the last norm, the logits and the loss take at their fullest, forwards and backwards."""
        top = self.pieces[2]
        return max(top.forward, top.backward)

    @property
    def dequantisation(self) -> int:
        """The largest matrix that is rebuilt while it is used."""
        largest = max(linear.weights for linear in self.shape.linears)
        return largest * self.setting.width if self.setting.quant else 0

    @cached_property
    def during(self) -> tuple[Moment, ...]:
        """The moments of which one is the largest."""
        first, other, top = self.pieces
        kept, count = self.activations, self.shape.layers
        last = other if count > 1 else first
        below_last, below_first = (kept, self.row) if self.checkpointing else (kept - last.saved, 0)
        above_first = top.gradients + (count - 1) * other.gradients
        found = [
            ("the head, forwards", kept, top.forward, 0),
            ("the head, backwards", kept, top.backward, 0),
            ("the top layer, backwards", below_last, last.backward, top.gradients),
            ("the first layer, backwards", below_first, first.backward, above_first),
        ]
        if self.full:
            rows = (self.shape.vocabulary + self.shape.positions) * self.shape.hidden * self.trained_width
            others = self.gradients - (0 if self.shape.tied else rows)
            twice = 2 if self.shape.tied else 1  # its gradient as a head waits, and both are added into a third
            found.append(("the embedding, backwards", 0, self.row + twice * rows, others))
        roots = self.gradients if self.setting.path == "peft" else 0  # torch's default AdamW takes all roots at once
        found.append(("the optimiser's step", 0, roots, self.gradients))
        accumulated = self.setting.accumulation > 1
        return tuple(
            Moment(name, kept, passing, self.gradients if accumulated else gradients)
            for name, kept, passing, gradients in found
        )

    @property
    def fullest(self) -> Moment:
        """The moment of the peak."""
        return max(self.during, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """The most that is in memory at once."""
        return self.always + self.fullest.total
