"""Devices by name: memory and promised speed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.errors import UsageError, nearest

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
