"""Small helpers to make adapters that do something."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gossamer as gs
from gossamer.methods import TargetedMethod


def shaken(model: nn.Module, name: str, scale: float = 0.1, seed: int = 0) -> None:
    """Give every parameter of an adapter a random value, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in gs.trainable_parameters(model, name).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)


def trained(model: nn.Module, spec: TargetedMethod, name: str = "default", seed: int = 0) -> gs.Adapter:
    """Attach a spec, shake it, and capture it; the adapter stays attached and active."""
    gs.attach(model, spec, name, seed=seed)
    shaken(model, name, seed=seed)
    return gs.capture(model, name)


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    """Token ids that every toy's vocabulary holds."""
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(1))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all the model's own parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items() if "gossamer" not in name.split(".")}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two such copies agree in every bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def as_peft_writes(folder: Path) -> Path:
    """A folder of ours with nothing in it that PEFT would not write: no `gossamer.json`, no seal."""
    (folder / "gossamer.json").unlink()
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})
    return folder
