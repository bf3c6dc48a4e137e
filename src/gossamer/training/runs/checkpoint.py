"""Checkpoints: all that a run needs to go on as if it had never stopped.

    step-N/  adapter.safetensors    "<path>.<slot>" -> parameter
             optimizer.safetensors  "<path>.<slot>/<moment>" -> the optimiser's state, each tensor in its own dtype
             rng.safetensors        torch's random state, on the CPU and on the device
             state.json             step, position in the data, figures so far, the identity of the run, and those
                                    numbers of the optimiser's state that are not tensors
             manifest.json          sha256 of every other file

A checkpoint is written beside its place and renamed into it, so it is there whole or not at all. What the disk did to
it later, the manifest tells: a damaged one is named and the one before it used.
"""

from __future__ import annotations
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from gossamer.errors import CheckpointError
from gossamer.files.atomic import TEMPORARY_SUFFIX, new_folder
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from gossamer.adapter import Adapter
from gossamer.training.config import FREE_ON_RESUME, SPLITS_ON_RESUME, LoopConfig, RunConfig
from gossamer.training.memory import stored_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST = "manifest.json"
NUMBERS = "optimizer_numbers"
FILES = ("adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte agreed with its manifest."""

    path: Path
    state: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]

    def refuse_other_run(self, identity: Mapping[str, Any], free: Collection[str] = ()) -> None:
        """Raise `CheckpointError` with every difference unless the checkpoint is of a run with this identity.

        `free` names may differ: an older version counted them to the identity.
        """
        then, now = _flat(self.state["identity"]), _flat(identity)
        names = [name for name in {**then, **now} if then.get(name) != now.get(name) and name not in free]
        if names:
            listing = [f"  - {name}: {then.get(name, 'absent')} then, {now.get(name, 'absent')} now" for name in names]
            raise CheckpointError(
                "\n".join(["the checkpoint is of another run", *listing]),
                where=str(self.path),
                hint="resume with the settings, data and base of then, or start anew in another folder",
            )

    def restore(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        """Put parameters, moments and random state back, bit for bit. Raises `CheckpointError`."""
        ours = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in self.parameters.items()}
        if ours != theirs:
            first = next(name for name in sorted({**ours, **theirs}) if ours.get(name) != theirs.get(name))
            raise CheckpointError(
                "the checkpoint's parameters are not this adapter's",
                where=f"{self.path}: {first}",
                got=str(theirs.get(first)),
                expected=str(ours.get(first)),
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.parameters[name])
        _lay_out(optimizer)
        for key, value in {**self.moments, **self.state[NUMBERS]}.items():
            name, _, moment = key.rpartition("/")
            state, place = optimizer.state[parameters[name]], parameters[name].device
            there = state.get(moment)
            if isinstance(there, Tensor) and (there.shape, there.dtype) == (value.shape, value.dtype):
                there.copy_(value)
            else:
                state[moment] = value.to(place) if isinstance(value, Tensor) else value
        set_random_state(self.rng, device)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where torch's random numbers are, on the CPU and on a CUDA device."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on with the random numbers that come after `state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    keep: int,
    spare: int | None = None,
) -> Path:
    """Write `folder/step-N`, and only then remove the oldest ones so that `keep` remain, and that of step `spare`.

    `state` is JSON with at least "step" and "identity". Raises `DiskError`; the checkpoints that were there still are.
    """
    step = state["step"]
    kept = {
        f"{name}/{moment}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state[parameter].items()
    }
    moments = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in kept.items() if key not in moments}
    contents = (*map(_packed, (parameters, moments, random_state(device))), _json({**state, NUMBERS: numbers}))
    with new_folder(folder / f"step-{step}", replace=True) as fresh:
        for name, content in zip(FILES, contents, strict=True):
            (fresh / name).write_bytes(content)
        manifest = {name: hashlib.sha256(content).hexdigest() for name, content in zip(FILES, contents, strict=True)}
        (fresh / MANIFEST).write_bytes(_json(manifest))
    for old in [number for number in _steps(folder) if number <= step][keep:]:
        if old != spare:
            shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    return folder / f"step-{step}"


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; None when none was begun, `CheckpointError` when none of them is whole."""
    for leftover in sorted(folder.glob(f".*{TEMPORARY_SUFFIX}")):
        say(f"removing {leftover}: a checkpoint that was not written to its end")
        shutil.rmtree(leftover, ignore_errors=True)
    faults = []
    for step in _steps(folder):
        try:
            return checkpoint_at(folder, step)
        except CheckpointError as error:
            faults.append(f"{error.where}: {error.what}")
            say(f"passing over {faults[-1]}")
    if faults:
        what = "\n".join(["no checkpoint of this run is whole", *(f"  - {fault}" for fault in faults)])
        raise CheckpointError(what, where=str(folder), hint="start anew in another folder")
    return None


def checkpoint_at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step. Raises `CheckpointError` for one that is not there, or not whole.

    Each file is read once, and nothing of it believed before its digest was compared.
    """
    path = folder / f"step-{step}"
    try:
        contents = {name: (path / name).read_bytes() for name in (*FILES, MANIFEST)}
    except OSError as error:
        raise CheckpointError(f"incomplete: {error.strerror}", where=str(error.filename or path)) from None
    expected = {name: hashlib.sha256(contents[name]).hexdigest() for name in FILES}
    if contents[MANIFEST] != _json(expected):
        damaged = next((name for name in FILES if expected[name].encode() not in contents[MANIFEST]), MANIFEST)
        raise CheckpointError("damaged: its content is not what the manifest says", where=str(path / damaged))
    parameters, moments, rng = (load(contents[name]) for name in FILES[:3])
    return Checkpoint(path, json.loads(contents["state.json"]), parameters, moments, rng)


def _steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint folder, whole or not, newest first."""
    names = [re.fullmatch(r"step-(\d+)", place.name) for place in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(found[1]) for found in names if found), reverse=True)


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser whose state has a place of its own, such as memory that can leave the card, make it now."""
    make = getattr(optimizer, "init_state", None)
    if make is None:
        return
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            make(group, parameter, number, index)


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    """As safetensors, which wants memory of its own for each; a table may serve the state of many parameters."""
    plain: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        place = here.untyped_storage().data_ptr()
        plain[name] = here.clone() if place in places else here
        places.add(place)
    return save(plain)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, Mapping):
        return {path: list(value) if isinstance(value, tuple) else value}
    return {
        name: leaf
        for key, part in value.items()
        for name, leaf in _flat(part, f"{path}.{key}" if path else str(key)).items()
    }


def identity(
    model: PreTrainedModel, config: RunConfig, lr: float, start: Adapter, data: Mapping[str, Any]
) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run. What is only shown or kept may change."""
    free = FREE_ON_RESUME | (set() if config.train.patience else {"eval_every"})
    settings = config.train.to_dict() | {"task": config.task.named(), "lr": lr}
    train = {name: value for name, value in settings.items() if name not in free}
    return {
        "train": train,
        "method": start.spec.to_dict(),
        "data": data,
        "base": dict(start.base or {}),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quant": stored_as(model),
        "device": model.device.type,
    }


def split_settings(config: LoopConfig) -> dict[str, Any]:
    """Settings that change no step but the order of its sums."""
    return {name: getattr(config, name) for name in SPLITS_ON_RESUME}


def split_anew(config: LoopConfig, checkpoint: Mapping[str, Any], draws: bool) -> str:
    """A line on a run that goes on with its steps split otherwise than before; empty where it does not."""
    now = split_settings(config)
    then = now | checkpoint.get("split", {})
    changes = [f"{name} was {then[name]} and is {value}" for name, value in now.items() if then[name] != value]
    drawn = " and the numbers that dropout draws" if draws else ""
    rounded = f"the steps are the same but for rounding{drawn}, no longer bit for bit"
    return f"{', '.join(changes)}: {rounded}" if changes else ""
