"""A training run on paper: what it takes, before anything is downloaded.

    always    W (weights)  +  A (what stands beside them)  +  O (AdamW's moments)
    moments   of the step that was followed; and the optimiser's: all gradients (with path="peft" the roots of all
              second moments and the logits too)

The step comes from a profile that was followed before, or is followed now, see `step`. With accumulation all gradients
are there all the time, from the second batch of a step on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import UnsupportedError
from gossamer.planning import timeline
from gossamer.planning.devices import UTILISATION, Device, device_of
from gossamer.planning.profiles import known_profile
from gossamer.planning.setting import TrainingSetting, Tuning, moments
from gossamer.planning.shape import ModelShape
from gossamer.planning.source import shape_of
from gossamer.planning.table import as_dict, as_text, write_page
from gossamer.planning.timeline import Moment, StepProfile
from gossamer.planning.verdicts import DeviceVerdict, verdicts

if TYPE_CHECKING:
    from gossamer.planning.step import StepLoss


@dataclass(frozen=True)
class Plan:
    """Memory, operations and disk of one training run; `print(plan)` shows it.

    Attributes:
        shape: the model. tuning: what is trained. setting: how it is trained.
        checkpointing: whether activations are computed again in the backward; decided here.
        device: where it is meant to run, if that was said.
        notes: what was decided, and what is not certain.
        loss: what is computed instead of the model's usual loss, see `gossamer.planning.step.StepLoss`.
    """

    shape: ModelShape
    tuning: Tuning
    setting: TrainingSetting
    checkpointing: bool
    device: Device | None = None
    notes: tuple[str, ...] = ()
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

    @property
    def weights(self) -> int:
        """W: the base as it is stored in memory."""
        return self.step.weights

    @property
    def trainable(self) -> int:
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

    @cached_property
    def during(self) -> tuple[Moment, ...]:
        """The highest moment of each part of the step."""
        accumulated = self.gradients if self.setting.accumulation > 1 else 0
        found: dict[str, Moment] = {}
        for one in timeline.moments(self.step.stretches, accumulated):
            if one.name not in found or one.total > found[one.name].total:
                found[one.name] = one
        held = roots = 0
        if self.setting.path == "peft":  # a plain loop's outputs live on; torch's default AdamW takes all roots at once
            predicts = self.loss is None and (self.shape.tied or "head" in self.shape.parameters)
            held = self.setting.labelled * self.shape.vocabulary * self.setting.width if predicts else 0
            roots = self.gradients
        return (*found.values(), Moment("the optimiser's step", held, roots, self.gradients))

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
    def moment(self) -> Moment:
        """The fullest moment."""
        return max(self.during, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """Bytes of tensors at the fullest moment."""
        return self.always + self.moment.total

    @property
    def memory(self) -> Plan:
        """The plan, whose bytes may also be asked for as `plan.memory.weights`."""
        return self

    @property
    def parameters(self) -> dict[str, int]:
        """The base's parameters by kind."""
        return self.shape.parameters

    @property
    def share(self) -> float:
        """Trained numbers over the base's."""
        return self.trainable / self.shape.total

    @property
    def pieces(self) -> dict[str, int]:
        """Bytes at the fullest moment, piece by piece; they add up to the peak."""
        moment = self.moment
        return {
            "weights": self.weights,
            "adapters": self.adapters,
            "gradients": moment.gradients,
            "optimizer": self.optimizer,
            "activations": moment.activations,
            "transient": moment.transient,
        }

    @property
    def forward_flops(self) -> float:
        """Operations a token, forwards: `2 P + 2 r sum(in + out) + 2 S h` a layer for causal attention."""
        return 2 * self._multiplied + 2 * self._beside + self._attention

    @property
    def backward_flops(self) -> float:
        """Backwards: dx costs what the forward did, a trained matrix as much again; attention 2.5 times its forward."""
        whole = 4 if self.full else 2
        again = self.forward_flops if self.checkpointing else 0
        return whole * self._multiplied + 4 * self._beside + 2.5 * self._attention + again

    @property
    def _multiplied(self) -> float:
        """Weights that meet a token; the head meets those with a label."""
        head = self.shape.vocabulary * self.shape.hidden
        return self.shape.multiplied - head * (1 - self.setting.labelled / self.setting.tokens)

    @property
    def _beside(self) -> int:
        return 0 if self.full else self.trainable

    @property
    def _attention(self) -> float:
        return 2.0 * self.setting.sequence * self.shape.queries * self.shape.layers

    @property
    def seconds_per_token(self) -> float | None:
        """On the device named, at `UTILISATION` of its promised speed."""
        speed = self.device.speed(self.setting.width) if self.device else 0
        return (self.forward_flops + self.backward_flops) / (speed * UTILISATION) if speed else None

    @property
    def checkpoint_bytes(self) -> int:
        """A whole model on disk, in the setting's type."""
        return self.shape.total * self.setting.width

    @property
    def adapter_bytes(self) -> int:
        """What was trained, on disk."""
        return self.gradients

    def changed(self, **changes: Any) -> Plan:
        """The plan with some of `plan`'s settings changed."""
        checkpointing = changes.get("checkpointing", self.checkpointing)
        setting = replace(self.setting, **{**changes, "checkpointing": checkpointing})
        return replace(self, setting=setting, checkpointing=bool(checkpointing), notes=())

    def verdicts(self, devices: tuple[Any, ...] = (8, 16, 24, 48, 80)) -> list[DeviceVerdict]:
        """For each size of card in GiB, and this machine: whether it fits, and the least change that makes it fit."""
        return verdicts(self, devices)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; bytes and numbers are whole."""
        return as_dict(self)

    def html(self, path: str | Path) -> Path:
        """Write one offline page with the table and a picture. Raises `DiskError`."""
        return write_page(self, Path(path))

    def __str__(self) -> str:
        return as_text(self)


def plan(
    model: Any,
    method: Any = None,
    *,
    quant: str | None = None,
    sequence: int = 1024,
    batch: int = 1,
    accumulation: int = 1,
    dtype: str = "bfloat16",
    adapter_dtype: str = "float32",
    optimizer: str = "adamw",
    checkpointing: bool | str = False,
    supervised: float = 1.0,
    padded: bool | None = None,
    path: str = "gossamer",
    fused: bool = True,
    device: Any = None,
    loss: StepLoss | None = None,
) -> Plan:
    """What a training run takes: memory by piece and moment, operations and time a token, disk. No weights; torch only
    to count the towers of a model of several parts.

    Args:
        model: a known name, a folder or file with a config.json, a hub id (its config.json alone is fetched), a mapping
            (a config's content, or numbers typed in), or a `ModelShape`.
        method: a LoRA or DoRA spec, "lora", "dora", "full", or a mapping such as `{"name": "lora", "r": 16}`.
        quant: how the base's linear modules are stored: None, "nf4", "nf4-single", "fp4" or "int8".
        sequence, batch: tokens of a row and rows that go through the model at once; accumulation: such batches a step.
        dtype: of the base; adapter_dtype: of the trained numbers, their gradients and moments.
        optimizer: "adamw", "adamw8bit", or "paged_adamw8bit", whose moments may leave the device.
        checkpointing: compute a layer's activations again in the backward; "auto" only where it would not fit `device`.
        supervised: share of the tokens that have a label and so meet the head.
        padded: whether rows are padded and attention needs a mask; by default only several of them with path="peft".
        path: "gossamer", or "peft" for a plain loop over transformers and PEFT: all logits, inputs copied to float32.
        fused: decoder layers that this library has fused ones for run as those.
        device: a name of `DEVICES`, "this machine", or bytes of memory.
        loss: what a step computes, `(model, setting) -> Tensor` on fake tensors, inputs included; by default what the
            model is usually trained on.

    Raises: BaseFileError, SpecError, TargetError, UnsupportedError and UsageError, each with the nearest right answer.
    """
    shape, tuning, place = shape_of(model), Tuning.of(method), device_of(device)
    sizes, types = (sequence, batch, accumulation), (dtype, adapter_dtype, quant)
    setting = TrainingSetting(*sizes, *types, optimizer, checkpointing, supervised, padded, path, fused)
    chosen = Plan(shape, tuning, setting, setting.checkpointing is True, place, _notes(shape, setting), loss)
    peak = chosen.peak  # here, so that what cannot be planned is said now
    if setting.checkpointing != "auto":
        return chosen
    needed = place is not None and not place.fits(peak)
    if needed:
        chosen = replace(chosen, checkpointing=True)
        said = f"checkpointing is on: without it {place.name if place else ''} is too small"
    else:
        said = "checkpointing is off: it fits without" if place else "checkpointing is off: no device was named"
    return replace(chosen, notes=(*chosen.notes, said))


def _notes(shape: ModelShape, setting: TrainingSetting) -> tuple[str, ...]:
    notes = []
    if shape.towers:
        named = ", ".join(f"{one.name} ({one.parameters:,})" for one in shape.towers)
        notes.append(
            f"frozen beside the language model, and counted with the base: {named}; what they keep while they read an "
            "image or a sound is not counted"
        )
    dense = shape.parameters.get("experts", 0)
    if setting.quant and dense:
        notes.append(f"stacked experts, {dense / shape.total:.0%} of the parameters, stay in {setting.dtype}")
    if setting.optimizer.startswith("paged"):
        notes.append("paged moments lie in the host's memory while the device needs its own")
    return tuple(notes)


def compare(model: Any, *, r: int = 16, **settings: Any) -> list[tuple[str, Plan]]:
    """Full fine-tuning, LoRA and QLoRA of one model under the same settings, each with its name.

    Args:
        model: as in `plan`.
        r: rank of the adapters.
        settings: the other arguments of `plan`; quant and path are set here.
    """
    shape = shape_of(model)
    method: Mapping[str, Any] = {"name": "lora", "r": r}

    def planned(what: Any, **changes: Any) -> Plan:
        return plan(shape, what, **{"checkpointing": True, **settings, **changes})

    return [
        ("full, in place", planned("full", path="peft")),
        ("full, float32 copies", planned("full")),
        ("LoRA", planned(method)),
        ("QLoRA", planned(method, quant="nf4")),
    ]


@lru_cache(maxsize=64)
def _followed(shape: ModelShape, tuning: Tuning, setting: TrainingSetting, loss: Any) -> StepProfile:
    from gossamer.planning.fake import described
    from gossamer.planning.step import followed

    module = described(shape.config(), shape.name) if shape.module is None else shape.module
    return followed(module, tuning.spec(), setting, bool(setting.checkpointing), loss, shape)
