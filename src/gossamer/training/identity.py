"""What makes a resumed run the same run, and which settings may differ at the cost of rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gossamer.adapter import Adapter
from gossamer.training.config import FREE_ON_RESUME, SPLITS_ON_RESUME, LoopConfig
from gossamer.training.memory import stored_as

if TYPE_CHECKING:
    from gossamer.training.state import TrainState


def identity(state: TrainState, start: Adapter) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run. What is only shown or kept may change."""
    free = FREE_ON_RESUME | (set() if state.config.patience else {"eval_every"})
    settings = state.config.to_dict() | {"task": state.task.named(), "lr": state.lr}
    train = {name: value for name, value in settings.items() if name not in free}
    return {
        "train": train,
        "method": start.spec.to_dict(),
        "data": state.dataset.identity,
        "base": dict(start.base or {}),
        "dtype": str(state.model.dtype).removeprefix("torch."),
        "quant": stored_as(state.model),
        "device": state.device.type,
    }


def split_settings(config: LoopConfig) -> dict[str, Any]:
    """Settings that change no step but the order of its sums."""
    return {name: getattr(config, name) for name in SPLITS_ON_RESUME}


def split_anew(state: TrainState, checkpoint: Mapping[str, Any]) -> str:
    """A line on a run that goes on with its steps split otherwise than before; empty where it does not."""
    now = split_settings(state.config)
    then = now | checkpoint.get("split", {})
    changes = [f"{name} was {then[name]} and is {value}" for name, value in now.items() if then[name] != value]
    drawn = " and the numbers that dropout draws" if state.draws else ""
    rounded = f"the steps are the same but for rounding{drawn}, no longer bit for bit"
    return f"{', '.join(changes)}: {rounded}" if changes else ""
