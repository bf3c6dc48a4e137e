"""Devices by name: memory and promised speed; whether a plan fits one, and the least change that makes it fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import UsageError, nearest
from gossamer.planning.setting import Tuning

if TYPE_CHECKING:
    from gossamer.planning.plan import Plan

GIB = 2**30
UTILISATION = 0.4
"""Share of the promised speed that a training step is taken to reach; good kernels at large sizes reach more."""
CONTEXT = int(0.6e9)
"""Bytes that a GPU's driver, kernels and libraries take before the first tensor."""
SLACK = 0.05
"""Share of the peak that an allocator loses between its blocks."""


@dataclass(frozen=True)
class Device:
    """A card, or this machine.

    Attributes:
        name: as sold. memory: bytes.
        half, single: dense matrix operations a second in 16 bits and in float32, as promised; 0 where not known.
    """

    name: str
    memory: int
    half: float = 0.0
    single: float = 0.0
    driver: bool = True

    def speed(self, width: int) -> float:
        """Promised operations a second with numbers of that many bytes."""
        return self.half if width == 2 else self.single

    def need(self, peak: int) -> int:
        """What a peak of tensors takes there, with what the driver and the allocator take."""
        return round(peak * (1 + SLACK)) + (CONTEXT if self.driver else 0)

    def fits(self, peak: int) -> bool:
        """Whether it has that."""
        return self.need(peak) <= self.memory


_CARDS = {
    "T4": (16, 65, 8.1), "V100": (32, 125, 15.7), "RTX 3060": (12, 51, 12.7), "RTX 3090": (24, 71, 35.6),
    "RTX 4090": (24, 165, 82.6), "RTX 5090": (32, 210, 104.8), "A10": (24, 125, 31.2), "L4": (24, 121, 30.3),
    "L40S": (48, 362, 91.6), "A100": (80, 312, 19.5), "A100 40GB": (40, 312, 19.5), "H100": (80, 989, 67),
    "H200": (141, 989, 67), "B200": (180, 2250, 75), "MI300X": (192, 1307, 163),
}  # fmt: skip
DEVICES = {name: Device(name, size * GIB, half * 1e12, single * 1e12) for name, (size, half, single) in _CARDS.items()}
"""Name -> device; speeds are those of the makers' data sheets, without sparsity."""


def this_machine() -> Device:
    """This computer's main memory; a container's limit, where it is lower."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        text = limit.read_text(encoding="utf-8").strip()
        memory = min(memory, int(text)) if text.isdigit() else memory
    except OSError:
        pass
    return Device("this machine", memory, driver=False)


def device_of(device: Any) -> Device | None:
    """A device by name, by its bytes of memory, or as it is. Raises `UsageError` with the nearest names."""
    if device is None or isinstance(device, Device):
        return device
    if isinstance(device, int | float) and not isinstance(device, bool):
        return Device(f"{device / GIB:.0f} GB", int(device))
    name = str(device)
    if name.lower() in ("this machine", "cpu", "here"):
        return this_machine()
    found = next((one for one in DEVICES if one.lower() == name.lower()), None)
    if found is None:
        raise UsageError(
            "no such device",
            got=name,
            expected=f"{', '.join(DEVICES)}, this machine, or bytes of memory",
            hint=nearest(name, DEVICES),
        )
    return DEVICES[found]


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
