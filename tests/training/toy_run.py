"""A small run that every training test starts from: a toy model, two dozen rows, dropout and accumulation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import gossamer as gs
from gossamer.files.atomic import sha256_file
from gossamer.models import tiny, tiny_tokenizer
from gossamer.training import Run, TrainConfig, train

torch.set_num_threads(
    1
)  # toys are too small to share out; with several test processes the threads only wait for each other

LABELS = (" bad", " fine", " good")


class Watcher:
    """A progress that keeps what it is told and calls back after each training step."""

    def __init__(self, after_step: Callable[[int], None] | None = None) -> None:
        self.lines: list[str] = []
        self.after_step, self.what, self.done = after_step, "", 0

    def start(self, total: int, what: str) -> None:
        self.what = what

    def step(self, **metrics: float) -> None:
        if self.what == "training" and self.after_step:
            self.after_step(int(metrics["step"]))

    def say(self, line: str) -> None:
        self.lines.append(line)

    def finish(self) -> None: ...

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def write_rows(path: Path, count: int = 24, labels: Sequence[str] = LABELS) -> Path:
    rows = [
        {"prompt": "item " + "x" * (index % 7) + ":", "completion": labels[index % len(labels)]}
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def toy_config(folder: Path, **fields: Any) -> TrainConfig:
    """Eight steps: two epochs of four, each of two batches of three rows."""
    data = folder / "rows.jsonl"
    settings = {
        "data": data if data.exists() else write_rows(data),
        "output": folder / "run",
        "epochs": 2,
        "batch_size": 3,
        "accumulation": 2,
    }
    return TrainConfig(**(settings | {"lr": 0.01, "checkpoint_every": 3} | fields))


def toy_model(architecture: str = "llama", *, dtype: torch.dtype = torch.float32, **method: Any) -> Any:
    model = tiny(architecture, dtype=dtype)
    gs.attach(model, gs.LoRA(**({"r": 2, "dropout": 0.1} | method)), seed=3)
    return model


def toy_train(config: TrainConfig, *, resume: bool = False, progress: Any = None, model: Any = None) -> Run:
    return train(model or toy_model(), tiny_tokenizer(), config, resume=resume, progress=progress or Watcher())


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[int, float, float, float]]:
    """What of the metrics must not depend on the clock."""
    return [(one["step"], one["loss"], one["grad_norm"], one["lr"]) for one in metrics_of(run) if "loss" in one]


def fingerprint(run: Path) -> dict[str, str]:
    """Digests of all that must be equal bit for bit after a resumed run."""
    last = max((run / "checkpoints").iterdir(), key=lambda place: int(place.name.removeprefix("step-")))
    files = [run / "adapter" / "adapter_model.safetensors", *sorted(last.glob("*.safetensors"))]
    return {str(file.relative_to(run)): sha256_file(file) for file in files}
