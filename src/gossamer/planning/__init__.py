"""What a training run will take, before anything is downloaded: memory, time, disk. Pure arithmetic, no torch."""

from gossamer.planning.devices import DEVICES, Device
from gossamer.planning.plan import Plan, compare, plan
from gossamer.planning.shape import ModelShape

__all__ = ["DEVICES", "Device", "ModelShape", "Plan", "compare", "plan"]
