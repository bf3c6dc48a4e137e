"""Whether a plan fits a device, and the least change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gossamer.planning.devices import GIB, Device, device_of, this_machine
from gossamer.planning.setting import Tuning

if TYPE_CHECKING:
    from gossamer.planning.plan import Plan


@dataclass(frozen=True)
class DeviceVerdict:
    """One device's answer.

    Attributes:
        device: which. fits: the plan as it is.
        change: what would make it fit, in words; "" where it fits or nothing tried does.
        plan: the plan with that change.
    """

    device: Device
    fits: bool
    change: str
    plan: Plan | None

    def __str__(self) -> str:
        if self.fits:
            return "fits"
        return f"with {self.change}" if self.plan else "no, whatever was tried"


def verdicts(plan: Plan, devices: tuple[Any, ...]) -> list[DeviceVerdict]:
    """One for each device: a number is GiB of a card, anything else what `plan` takes; and this machine."""
    sized = [
        Device(f"{one} GB", round(one * GIB)) if isinstance(one, int | float) else device_of(one) for one in devices
    ]
    ladder = [*changes(plan)]
    found = []
    for device in filter(None, (*sized, this_machine())):
        fits = device.fits(plan.peak)
        enough = ("", plan) if fits else next((one for one in ladder if device.fits(one[1].peak)), ("", None))
        found.append(DeviceVerdict(device, fits, *enough))
    return found


def changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes from the least to the largest, each on top of the one before.

    1. checkpointing: the same gradients, a third more time. 2. one row at a time, as many gathered into a step: the
    same gradients. 3. the base in nf4: other numbers, about a percent of loss; full fine-tuning becomes LoRA first.
    4. moments in 8 bits that may leave the device. 5. shorter rows, halved down to 256 tokens.
    """
    words: list[str] = []
    setting = plan.setting

    def then(text: str, changed: Plan) -> tuple[str, Plan]:
        nonlocal plan
        words.append(text)
        plan = changed
        return " + ".join(words), changed

    if not plan.checkpointing:
        yield then("checkpointing", plan.changed(checkpointing=True))
    if setting.batch > 1:
        rows = setting.batch * setting.accumulation
        yield then(f"batch 1 x {rows}", plan.changed(batch=1, accumulation=rows, padded=False))
    if plan.full:
        yield then("LoRA instead of full", replace(plan, tuning=Tuning.of({"r": 16})))
    if not plan.setting.quant:
        yield then(f"nf4 instead of {setting.dtype}", plan.changed(quant="nf4"))
    if setting.optimizer == "adamw":
        yield then("paged 8-bit AdamW", plan.changed(optimizer="paged_adamw8bit"))
    while plan.setting.sequence > 256:
        shorter = max(256, plan.setting.sequence // 2)
        words[:] = [one for one in words if not one.startswith("sequence")]
        yield then(f"sequence {shorter}", plan.changed(sequence=shorter))
