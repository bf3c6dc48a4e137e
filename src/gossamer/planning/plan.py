"""A training run on paper: what it takes, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.planning.devices import UTILISATION, Device, device_of
from gossamer.planning.memory import MemoryBreakdown
from gossamer.planning.method import Tuning
from gossamer.planning.page import write_page
from gossamer.planning.setting import TrainingSetting
from gossamer.planning.shape import ModelShape
from gossamer.planning.source import shape_of
from gossamer.planning.table import as_dict, as_text
from gossamer.planning.timeline import Moment
from gossamer.planning.verdicts import DeviceVerdict, verdicts

if TYPE_CHECKING:
    from gossamer.planning.losses import StepLoss


@dataclass(frozen=True)
class Plan:
    """Memory, operations and disk of one training run; `print(plan)` shows it.

    Attributes:
        memory: where every byte comes from.
        device: where it is meant to run, if that was said.
        notes: what was decided, and what is not certain.
    """

    memory: MemoryBreakdown
    device: Device | None = None
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> ModelShape:
        """The model."""
        return self.memory.shape

    @property
    def tuning(self) -> Tuning:
        """What is trained."""
        return self.memory.tuning

    @property
    def setting(self) -> TrainingSetting:
        """How it is trained."""
        return self.memory.setting

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward."""
        return self.memory.checkpointing

    @property
    def parameters(self) -> dict[str, int]:
        """The base's parameters by kind."""
        return self.shape.parameters

    @property
    def trainable(self) -> int:
        """Trained numbers."""
        return self.memory.trained

    @property
    def share(self) -> float:
        """Trained numbers over the base's."""
        return self.trainable / self.shape.total

    @property
    def peak(self) -> int:
        """Bytes of tensors at the fullest moment."""
        return self.memory.peak

    @property
    def moment(self) -> Moment:
        """The fullest moment."""
        return self.memory.fullest

    @property
    def pieces(self) -> dict[str, int]:
        """Bytes at the fullest moment, piece by piece; they add up to the peak."""
        memory, moment = self.memory, self.moment
        return {
            "weights": memory.weights,
            "adapters": memory.adapters,
            "gradients": moment.gradients,
            "optimizer": memory.optimizer,
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
        whole = 4 if self.memory.full else 2
        again = self.forward_flops if self.checkpointing else 0
        return whole * self._multiplied + 4 * self._beside + 2.5 * self._attention + again

    @property
    def _multiplied(self) -> float:
        """Weights that meet a token; the head meets those with a label."""
        head = self.shape.vocabulary * self.shape.hidden
        return self.shape.multiplied - head * (1 - self.setting.labelled / self.setting.tokens)

    @property
    def _beside(self) -> int:
        return 0 if self.memory.full else self.trainable

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
        return self.memory.gradients

    def changed(self, **changes: Any) -> Plan:
        """The plan with some of `plan`'s settings changed."""
        checkpointing = changes.get("checkpointing", self.checkpointing)
        setting = replace(self.setting, **{**changes, "checkpointing": checkpointing})
        return replace(
            self,
            memory=MemoryBreakdown(self.shape, self.tuning, setting, bool(checkpointing), self.memory.loss),
            notes=(),
        )

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
    chosen = Plan(
        MemoryBreakdown(shape, tuning, setting, setting.checkpointing is True, loss), place, _notes(shape, setting)
    )
    peak = chosen.peak  # here, so that what cannot be planned is said now
    if setting.checkpointing != "auto":
        return chosen
    needed = place is not None and not place.fits(peak)
    if needed:
        chosen = replace(chosen, memory=replace(chosen.memory, checkpointing=True))
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
